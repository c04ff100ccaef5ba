"""`PoolGrowth`: brings a pool to its planned size on a thread of its own, while its first slots are used already."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from kvrdma.errors import CapacityError
from kvrdma.memory.pool import PinnedPool
from kvrdma.memory.slab import Memory

logger = logging.getLogger(__name__)

HEADROOM_NBYTES: Final = 256 << 20  # a growing pool leaves this much: the engine beside it needs memory too
_NICENESS: Final = 10


class PoolGrowth:
    """Grows a pool slab by slab. `prepare` is called with each slab before its slots count, `on_change` after.

    `prepare` is where a slab is registered with transports and devices. Both are called on the thread, but for
    the slabs that are there already: those are prepared at once, and what that raises is the caller's. A growth
    that fails on the way (no memory, a limit, a registration refused) leaves a smaller pool, and says so once.
    """

    def __init__(self, pool: PinnedPool, *, prepare: Callable[[Memory], None], on_change: Callable[[], None]) -> None:
        self._pool = pool
        self._prepare = prepare
        self._on_change = on_change
        self._closing = False
        self._started = time.monotonic()
        self.failure = ""  # why it ended early
        for memory in pool.memories:
            prepare(memory)
        self.n_ready = pool.n_slots
        self.growing = self.n_ready < pool.n_planned
        self._thread = threading.Thread(target=self._run, name="kvrdma-growth", daemon=True)

    def start(self) -> None:
        """Begin, where there is anything to grow; once."""
        if self.growing:
            self._thread.start()

    def close(self, *, timeout: float) -> bool:
        """Stop growing; True where the thread has ended, which takes milliseconds but for a slow `prepare`."""
        self._closing = True
        if not self._thread.is_alive():
            self.growing = False
            return True
        self._pool.stop_growing()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a nicety
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            while not self._closing and self._grow():
                self._on_change()
        except Exception as error:  # whatever it is: what there is goes on being used
            if not self._closing:
                self.failure = f"{type(error).__name__}: {error}"
                logger.warning(
                    "the pool stays at %d of %d slots: %s", self.n_ready, self._pool.n_planned, error or self.failure
                )
        self.growing = False
        if not self._closing:
            if not self.failure:
                logger.info("all %d slots are ready after %.1f s", self.n_ready, time.monotonic() - self._started)
            self._on_change()

    def _grow(self) -> bool:
        """Add a slab; False where none is left to add."""
        pool = self._pool
        n = min(pool.slots_per_slab, pool.n_planned - pool.n_slots)
        available = pool.available_nbytes()
        if n and n * pool.slot_stride + HEADROOM_NBYTES > available:
            raise CapacityError(
                f"{available} bytes are available, of which {HEADROOM_NBYTES} are left to the engine; "
                "a smaller size would fit, or a higher limit of the container"
            )
        added = pool.grow(n)
        for memory in added:
            self._prepare(memory)
        self.n_ready = pool.n_slots
        return bool(added)
