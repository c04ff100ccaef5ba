"""The examples that need no engine run as they are printed in the docs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (
            "manager.py",
            ["320 of 320 tokens came back, identical: True", "fetched from L2: 20 blocks"],
        ),
        (
            "transport.py",
            ["READ [ True  True] b'\\x01\\x02\\x03\\x04'", "WRITE [ True]", "the other process sees b'\\t\\t\\t\\t'"],
        ),
    ],
)
def test_example(example: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / example)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == said
