"""Warnings that anybody who reaches a port can cause, as often as they like: a few are logged, the others counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

LINES: Final = 10
PERIOD_S: Final = 60.0


class LimitedLog:
    """At most `LINES` warnings in each period of `PERIOD_S`, and a line with the number of those left out.

    That line comes before the next period's first warning, or with `close`. Thread-safe.
    """

    def __init__(self, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._guard = threading.Lock()
        self._ends = float("-inf")  # of this period
        self._n_said = 0
        self._n_left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """Log a warning, or count it; `values` are put into `text` as `logging` does it."""
        with self._guard:
            now = self._clock()
            if now >= self._ends:
                self._tell_left_out()
                self._ends, self._n_said = now + PERIOD_S, 0
            self._n_said += 1
            if self._n_said <= LINES:
                self._logger.warning(text, *values)
            else:
                self._n_left_out += 1

    def close(self) -> None:
        """Say what was left out."""
        with self._guard:
            self._tell_left_out()

    def _tell_left_out(self) -> None:
        if self._n_left_out:
            self._logger.warning(
                "%d more warnings like the last ones were left out: %d are logged in %d s",
                self._n_left_out,
                LINES,
                PERIOD_S,
            )
        self._n_left_out = 0
