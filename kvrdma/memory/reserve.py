"""`SlabReserve`: slabs of one size that are handed out whole: what the size classes of a store share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvrdma.errors import CapacityError
from kvrdma.memory.growth import PoolGrowth
from kvrdma.memory.pool import PinnedPool
from kvrdma.memory.slab import MemfdSlabs, Memory, SlabSource

_FIRST_NBYTES: Final = 128 << 20  # as much as takes a fraction of a second


class SlabReserve:
    """Slabs of one size, made at the start, or with `in_background` all but the first `first_nbytes` by `grow`.

    For one thread at a time, but for the growth, which only adds.

    Raises:
        CapacityError: the capacity is less than one slab, or more than the host has.
    """

    def __init__(
        self,
        capacity_nbytes: int,
        slab_nbytes: int,
        *,
        source: SlabSource | None = None,
        in_background: bool = False,
        first_nbytes: int = _FIRST_NBYTES,
    ) -> None:
        n_slabs = capacity_nbytes // slab_nbytes
        if n_slabs < 1:
            raise CapacityError(f"capacity of {capacity_nbytes} bytes: less than one slab of {slab_nbytes} bytes")
        source = MemfdSlabs() if source is None else source
        available = source.available_nbytes()
        if capacity_nbytes > available:
            raise CapacityError(f"capacity of {capacity_nbytes} bytes: the host has {available} bytes available")
        self.slab_nbytes = slab_nbytes
        self._pool = PinnedPool(
            slab_nbytes, n_slabs, source=source, slab_nbytes=slab_nbytes, in_background=in_background
        )
        try:
            while self._pool.n_slots < min(n_slabs, first_nbytes // slab_nbytes):
                self._pool.grow(1)
        except BaseException:
            self._pool.close()
            raise
        self._free = list(reversed(self._pool.memories))
        self._growth: PoolGrowth | None = None

    @property
    def slabs(self) -> tuple[Memory, ...]:
        """Every slab that was made so far, handed out or not."""
        return self._pool.memories

    @property
    def n_slabs(self) -> int:
        """How many slabs there are, or are to be while they are still being made."""
        if self._growth is not None and not self._growth.growing:
            return self._growth.n_ready
        return self._pool.n_planned

    @property
    def n_ready(self) -> int:
        """How many slabs there are by now."""
        return self._pool.n_slots if self._growth is None else self._growth.n_ready

    def grow(self, prepare: Callable[[Memory], None]) -> None:
        """Have the slabs made that are not there yet; once. Each is prepared on a thread, then it can be had."""
        there = set(self.slabs)

        def add(memory: Memory) -> None:
            if memory not in there:
                prepare(memory)
                self._free.insert(0, memory)

        self._growth = PoolGrowth(self._pool, prepare=add, on_change=lambda: None)
        self._growth.start()

    def stop_growing(self, *, timeout: float = 10.0) -> None:
        """Nothing is prepared any more once this has returned, unless `prepare` takes longer than `timeout`."""
        if self._growth is not None:
            self._growth.close(timeout=timeout)

    def available_nbytes(self) -> int:
        """What can be handed out now."""
        return len(self._free) * self.slab_nbytes

    def allocate(self, nbytes: int) -> Memory:
        """Hand out one slab; raises `CapacityError` where none is left or it is too small."""
        if nbytes > self.slab_nbytes or not self._free:
            raise CapacityError(f"{nbytes} bytes asked for: {len(self._free)} slabs of {self.slab_nbytes} are left")
        return self._free.pop()

    def release(self, memory: Memory) -> None:
        """Take a slab back."""
        self._free.append(memory)

    def cancel(self) -> None:
        """Nothing to do: to hand out a slab takes no time."""

    def close(self) -> None:
        """Give every slab back to where they came from. Idempotent."""
        self.stop_growing()
        self._free = []
        self._pool.close()
