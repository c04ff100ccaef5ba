"""The docs say what the code does: tables that are made of the code are equal to it."""

from __future__ import annotations

import dataclasses
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
