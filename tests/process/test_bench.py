"""`kvrdma bench`: one JSON object with every figure, or a message that says what was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

TINY_TRANSPORT = ("transport", "--size", "4KiB", "--batch", "4", "--seconds", "0.05")
TINY_CACHE = ("cache", "--size", "4KiB", "--batch", "4", "--working-set", "64KiB", "--pool", "1MiB")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvrdma", "bench", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def figures(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def test_the_cache_is_measured() -> None:
    read = figures(*TINY_CACHE)
    assert (read["nbytes_per_block"], read["batch"], read["working_set_nbytes"]) == (4096, 4, 65536)
    assert read["pool_nbytes"] == 1 << 20
    for name in ("lookup_1000_s", "hash_131072_s", "hash_longest_slice_s", "pool_ready_s"):
        assert 0 < read[name] < 60, name
    for name in ("acquire", "acquire_memcpy", "acquire_scattered", "gather_consecutive", "gather_scattered"):
        assert read[f"{name}_bytes_per_s"] > 0, name
    for way in ("acquire", "acquire_scattered"):
        ratio = read[f"{way}_bytes_per_s"] / read[f"{way}_memcpy_bytes_per_s"]
        assert read[f"{way}_ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_tcp_transport_is_measured(streams: int) -> None:
    read = figures(*TINY_TRANSPORT, "--streams", str(streams))
    assert (read["transport"], read["nbytes_per_block"], read["batch"], read["streams"]) == ("tcp", 4096, 4, streams)
    assert read["baseline_bytes_per_s"] == max(read["baseline_write_bytes_per_s"], read["baseline_read_bytes_per_s"])
    for way in ("write", "read"):
        assert read[f"{way}_bytes_per_s"] > 0
        assert 0 < read[f"{way}_p50_s"] <= read[f"{way}_p99_s"]
        assert read[f"{way}_cpu_s_per_gb"] > 0


def test_shared_memory_is_measured_beside_memcpy() -> None:
    read = figures(*TINY_TRANSPORT, "--transport", "shm")
    assert (read["transport"], read["baseline"]) == ("shm", "memcpy")
    assert all(read[f"{name}_bytes_per_s"] > 0 for name in ("write", "read", "baseline_write", "baseline_read"))


@pytest.mark.parametrize(("arguments", "words"), [(TINY_CACHE, "acquire"), (TINY_TRANSPORT, "plain sockets")])
def test_people_get_a_table(arguments: tuple[str, ...], words: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cache", "--size", "much"), "--size 'much': must be bytes"),
        (("cache", "--pool", "-1"), "--pool '-1': must be bytes"),
        (("cache", "--batch", "0"), "batch: must be at least 1, not 0"),
        (("cache", "--size", "4097"), "nbytes_per_block: must be a multiple of 8, not 4097"),
        (("cache", "--working-set", "1MiB"), "working_set: must hold a batch, 16777216 bytes; 1048576 bytes do not"),
        (("cache", "--pool", "1KiB"), "pool: must hold a block, 262144 bytes; 1024 bytes do not"),
        (("transport", "--size", "x"), "--size 'x': must be bytes"),
        (("transport", "--streams", "0"), "streams: must be at least 1, not 0"),
        (("transport", "--seconds", "0"), "seconds: must be above 0, not 0.0"),
        (("transport", "--transport", "tpc"), "did you mean 'tcp'?"),
        (("transport", "--transport", "inproc"), "cannot be measured between two"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
