"""kvrdma's L1, as `KVCacheManager` gives it to an engine."""

from __future__ import annotations

import numpy as np
from worker import CachePeer, run

from kvrdma.keys import KeySpace
from kvrdma.manager import Hit, KVCacheManager, Reservation
from kvrdma.settings import Settings

BLOCK_TOKENS = 16
SPACE = KeySpace("bench", "bench", "bench", "bfloat16", "bench", 64, 8, BLOCK_TOKENS)


class L1(CachePeer):
    package = "kvrdma"

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        self._manager = KVCacheManager(SPACE, nbytes, Settings(l1_bytes=self.capacity))
        self._manager.wait_until_grown()

    def prepare(self, way: str) -> np.ndarray:
        width = self.batch * BLOCK_TOKENS
        first = self.next_prompt(way) * width
        return np.arange(first, first + width, dtype=np.int32)

    def post(self, way: str, prepared: np.ndarray) -> Hit | Reservation:
        return self._manager.reserve(prepared) if way == "put" else self._manager.acquire(prepared)

    def finish(self, way: str, posted: Hit | Reservation) -> None:
        with posted:
            if isinstance(posted, Hit):
                posted.copy_into(self.buffer)
                return
            for row, view in zip(posted.rows, posted.views, strict=True):
                view[:] = self.buffer[row]
            if not posted.commit():
                raise RuntimeError("a put was not taken")

    def close(self) -> None:
        self._manager.close()


if __name__ == "__main__":
    run(L1)
