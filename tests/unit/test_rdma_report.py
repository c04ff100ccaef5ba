"""A run in the guest is good only if every test that was to report did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPORT = Path(__file__).parents[2] / "scripts" / "rdma" / "report.py"
COLLECTED = """\
tests/rdma/test_a.py::test_one[x::y]
tests/rdma/test_a.py::TestB::test_two
tests/rdma/test_a.py::TestC::test_two

3 tests collected
"""


def report(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, REPORT, *arguments], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("cases", "status"),
    [
        (["test_one[x::y]", "test_two", "test_two"], 0),
        (["test_one[x::y]", "test_two"], 1),
        (["test_two", "test_two"], 1),
        ([], 1),
    ],
)
def test_every_test_that_was_collected_has_to_report(tmp_path: Path, cases: list[str], status: int) -> None:
    (tmp_path / "collected").write_text(COLLECTED)
    (tmp_path / "junit").write_text("<a><b>" + "".join(f'<testcase name="{name}"/>' for name in cases) + "</b></a>")
    got, said = report("check", tmp_path / "junit", tmp_path / "collected")
    assert got == status
    assert f"{len(cases)} of 3 tests reported" in said


@pytest.mark.parametrize("content", [None, "", "<a><testcase name='test_two'/>"], ids=["none", "empty", "cut off"])
def test_a_report_that_is_not_whole_is_none(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "collected").write_text(COLLECTED)
    if content is not None:
        (tmp_path / "junit").write_text(content)
    got, said = report("check", tmp_path / "junit", tmp_path / "collected")
    assert got == 1
    assert "0 of 3 tests reported" in said


def test_nothing_collected_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "collected").write_text("no tests collected")
    (tmp_path / "junit").write_text("<a/>")
    assert report("check", tmp_path / "junit", tmp_path / "collected")[0] == 1


def test_a_skip_says_what_is_missing(tmp_path: Path) -> None:
    assert report("skip", tmp_path / "junit", "needs <qemu>")[0] == 0
    assert '<skipped message="needs &lt;qemu&gt;"' in (tmp_path / "junit").read_text()
