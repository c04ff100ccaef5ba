"""The suites fail parts that have one fault each; without the fault these parts pass, as the files beside this show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

HERE = Path(__file__).parent
MUTANTS = dict(mutants.mutants())


@pytest.fixture(scope="module")
def failed() -> set[tuple[str, str]]:
    """The tests that failed, by class and name: those in which a check of the suite's did, not a mutant itself."""
    tests = [f"{HERE / 'mutants.py'}::{suite}::{test}" for suite, test in MUTANTS.items()]
    run = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *tests]
    wide = {**os.environ, "COLUMNS": "400"}
    ended = subprocess.run(run, cwd=HERE, env=wide, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    why = r"(?:assert|AssertionError|kvrdma\.errors\.DeadlineError)\b"
    return set(re.findall(rf"^(?:FAILED|ERROR) \S+::(\w+)::(\w+)\S* - {why}", ended.stdout, re.MULTILINE))


@pytest.mark.process
@pytest.mark.parametrize("suite", MUTANTS)
def test_the_fault_is_found(failed: set[tuple[str, str]], suite: str) -> None:
    assert (suite, MUTANTS[suite]) in failed
