"""Slabs that come when the test says so."""

from __future__ import annotations

import threading

from kvrdma.memory import MemfdSlabs, Memory

PATIENCE_S = 30.0
PLENTY = 1 << 60


class PacedSlabs(MemfdSlabs):
    """Real slabs: the first at once, each other one when the test says so."""

    def __init__(self) -> None:
        super().__init__(lock=False)
        self.permits = threading.Semaphore(1)
        self.failure: Exception | None = None
        self.available = PLENTY
        self.asked = threading.Semaphore(0)

    def allocate(self, nbytes: int) -> Memory:
        self.asked.release()
        assert self.permits.acquire(timeout=PATIENCE_S)
        if self.failure is not None:
            raise self.failure
        return super().allocate(nbytes)

    def available_nbytes(self) -> int:
        return min(super().available_nbytes(), self.available)

    def cancel(self) -> None:
        super().cancel()
        self.permits.release()
