"""Warnings that strangers cause: a few lines, and how many there were."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.logs import LINES, PERIOD_S, LimitedLog


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@given(st.lists(st.floats(0, 2 * PERIOD_S), max_size=60), st.integers(0, 50))
def test_there_are_few_lines_and_none_is_lost_from_the_count(pauses: list[float], at_once: int) -> None:
    kept, logger = Kept(), logging.Logger("strangers")
    logger.addHandler(kept)
    now = 0.0
    log = LimitedLog(logger, clock=lambda: now)
    for pause in [*[0.0] * at_once, *pauses]:
        now += pause
        log.warning("from %s", "somebody")
    log.close()
    log.close()
    said = kept.lines.count("from somebody")
    left_out = sum(int(line.split()[0]) for line in kept.lines if "left out" in line)
    assert said + left_out == at_once + len(pauses)
    assert said >= min(LINES, at_once + len(pauses))
    assert len(kept.lines) <= (LINES + 1) * (now // PERIOD_S + 1)


@pytest.mark.parametrize(("n", "last"), [(LINES, "from somebody"), (LINES + 3, "3 more warnings")])
def test_what_was_left_out_is_told_in_the_end(n: int, last: str) -> None:
    kept, logger = Kept(), logging.Logger("strangers")
    logger.addHandler(kept)
    log = LimitedLog(logger)
    for _ in range(n):
        log.warning("from %s", "somebody")
    log.close()
    assert kept.lines[-1].startswith(last)
