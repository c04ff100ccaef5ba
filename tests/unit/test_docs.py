"""The docs say what the code does: tables that are made of the code are equal to it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from kvrdma.metrics import Reason
from kvrdma.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_setting_stands_in_the_table() -> None:
    table = ["| setting | default | what it is |", "|---|---|---|"]
    table += [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in dataclasses.fields(Settings)]
    assert "\n".join(table) in (DOCS / "vllm.md").read_text()


def test_every_reason_of_a_miss_is_explained() -> None:
    text = (DOCS / "vllm.md").read_text()
    assert [reason.value for reason in Reason if f"| `{reason.value}` | " not in text] == []


def test_every_test_that_the_matrix_names_exists() -> None:
    root = DOCS.parent
    code = "".join(path.read_text() for folder in ("tests", "kvrdma/testing") for path in (root / folder).rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "reliability.md").read_text()))
    files = {path.stem for path in (root / "tests").rglob("test_*.py")}
    assert len(named) > 40
    assert sorted(name for name in named - files if f"def {name}(" not in code) == []
