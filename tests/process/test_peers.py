"""benchmarks/peers.py: our own workers, and what becomes of a peer that cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--sizes", "4KiB", "--batch", "4", "--rounds", "1", "--seconds", "0.05")


def peers(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "peers.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, **environment},
    )


def test_we_are_measured_and_a_peer_that_cannot_be_installed_is_named(tmp_path: Path) -> None:
    no_index = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = peers(
        *TINY,
        "--json",
        "--only",
        "kvrdma-tcp,valkey,kvrdma-l1",
        "--env-dir",
        str(tmp_path),
        **no_index,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["errors"]) == ["valkey"]
    assert "installing valkey" in report["errors"]["valkey"]
    assert [(row["system"], row["way"]) for row in report["results"]] == [
        ("kvrdma-tcp", "put"),
        ("kvrdma-tcp", "get"),
        ("kvrdma-l1", "put"),
        ("kvrdma-l1", "get"),
    ]
    for row in report["results"]:
        assert (row["nbytes_per_block"], row["batch"], row["threads"]) == (4096, 4, 1)
        assert row["bytes_per_s"] > 0
        assert row["cpu_s_per_gb"] > 0
        assert 0 < row["p50_s"] <= row["p99_s"] <= row["p999_s"]
        assert min(row[name] for name in ("prepare_s", "post_s", "transfer_s")) > 0
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nixel"), "did you mean 'nixl'?"),
        (("--sizes", "64KiB,x"), "must be bytes"),
        (("--sizes", "5000"), "multiples of 4 KiB"),
        (("--rounds", "0"), "--rounds"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = peers(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
