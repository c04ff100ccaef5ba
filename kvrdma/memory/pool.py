"""`PinnedPool`: slabs cut into numbered slots, and the leases that keep a slot from being used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import CapacityError, ClosedError, RegionError
from kvrdma.layout import Int64s
from kvrdma.memory.slab import MemfdSlabs, Memory, SlabSource
from kvrdma.memory.slots import SlotAllocator

SLOT_ALIGNMENT: Final = 64
DEFAULT_SLAB_NBYTES: Final = 128 << 20
_MAX_SLABS: Final = 256  # each has two descriptors (the mapping has one of its own) and a registration


@dataclass(frozen=True, slots=True)
class Spans:
    """What belongs to each key: int64 columns over a table of memories, one range or several a key.

    `key_row` ascends; an object is its ranges in order.
    """

    memories: tuple[Memory, ...]
    n_keys: int
    key_row: Int64s
    memory_row: Int64s
    offset: Int64s
    nbytes: Int64s

    def __post_init__(self) -> None:
        columns = (self.key_row, self.memory_row, self.offset, self.nbytes)
        if any(column.dtype != np.int64 or column.shape != self.key_row.shape for column in columns):
            raise RegionError("spans: four int64 columns of one length are needed")
        if not self.key_row.size:
            return
        sizes = np.array([memory.nbytes for memory in self.memories], dtype=np.int64)
        if (
            (np.diff(self.key_row) < 0).any()
            or self.key_row[0] < 0
            or self.key_row[-1] >= self.n_keys
            or (self.memory_row < 0).any()
            or (self.memory_row >= len(sizes)).any()
            or (self.offset < 0).any()
            or (self.nbytes < 1).any()
            or (self.offset > sizes[self.memory_row] - self.nbytes).any()
        ):
            raise RegionError("spans: a range lies outside its memory, or its key outside the batch")

    @property
    def total_nbytes(self) -> int:
        """Bytes of all ranges together."""
        return int(self.nbytes.sum())

    def key_nbytes(self) -> Int64s:
        """Bytes that belong to each key: int64[n_keys]."""
        return np.bincount(self.key_row, weights=self.nbytes, minlength=self.n_keys).astype(np.int64)

    def select(self, keep: NDArray[np.bool_]) -> Spans:
        """The ranges of the keys that `keep` (bool[n_keys]) names, their rows numbered anew."""
        chosen = keep[self.key_row]
        rows = np.cumsum(keep) - 1
        return Spans(
            self.memories,
            int(keep.sum()),
            rows[self.key_row[chosen]].astype(np.int64),
            self.memory_row[chosen],
            self.offset[chosen],
            self.nbytes[chosen],
        )

    def parts(self, key_row: int) -> list[NDArray[np.uint8]]:
        """The buffers of one key, in order, without a copy."""
        first, last = np.searchsorted(self.key_row, [key_row, key_row + 1])
        return [
            self.memories[self.memory_row[i]].array()[self.offset[i] : self.offset[i] + self.nbytes[i]]
            for i in range(first, last)
        ]


class Lease:
    """Keeps slots from being used again. Counted: whoever needs it longer retains it, and releases it once.

    A transport or backend that is given a lease to hold retains it at the post and releases it when the
    transfer is terminal. As a context manager it releases the reference it was made with.
    """

    __slots__ = ("_guard", "_on_last", "_refs", "generations", "slots")

    def __init__(
        self, slots: Int64s, *, on_last: Callable[[], None] | None = None, generations: Int64s | None = None
    ) -> None:
        self.slots = slots
        self.generations = generations
        self._on_last = on_last
        self._refs = 1
        self._guard = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether anybody still holds it."""
        return self._refs > 0

    def retain(self) -> Self:
        """Hold it once more; raises `ClosedError` where nobody holds it any longer."""
        with self._guard:
            if self._refs == 0:
                raise ClosedError("lease: released already")
            self._refs += 1
        return self

    def release(self) -> None:
        """Let go once. The last one to do so frees the slots."""
        with self._guard:
            if self._refs == 0:
                raise ClosedError("lease: released more often than retained")
            self._refs -= 1
            last = self._refs == 0
        if last and self._on_last is not None:
            self._on_last()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class PinnedPool:
    """Slots of one size on slabs. Thread-safe.

    Two ways of use: `allocate` takes slots from the pool's own free list; `lease` holds slots whose numbers
    somebody else manages (an engine's index, the same numbers on every rank). A pool is used in one of them.

    With `in_background` it begins with its first slab alone, so that it can be used within a fraction of a second
    whatever its size; a `PoolGrowth` brings it to `n_planned` slots.

    Raises:
        CapacityError: slots of no bytes, or more of them than the host has memory for.
    """

    def __init__(
        self,
        slot_nbytes: int,
        n_slots: int = 0,
        *,
        source: SlabSource | None = None,
        slab_nbytes: int | None = None,
        in_background: bool = False,
    ) -> None:
        if slot_nbytes < 1:
            raise CapacityError(f"pool: slots must hold at least 1 byte, not {slot_nbytes}")
        self.slot_nbytes = slot_nbytes
        self.slot_stride = -(-slot_nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        if slab_nbytes is None:
            slab_nbytes = max(DEFAULT_SLAB_NBYTES, n_slots * self.slot_stride // _MAX_SLABS)
        self.slots_per_slab = max(1, slab_nbytes // self.slot_stride)
        self.n_planned = n_slots
        self._source: SlabSource = MemfdSlabs() if source is None else source
        self._guard = threading.Lock()
        self._growing = threading.Lock()
        self._memories: list[Memory] = []
        self._rows: list[NDArray[np.uint8]] = []
        self._allocator = SlotAllocator()
        self._holds = np.zeros(0, dtype=np.int32)
        self._n_leases = 0
        self._closed = False
        try:
            self._check_available(n_slots)
            self.grow(min(n_slots, self.slots_per_slab) if in_background else n_slots)
        except BaseException:
            self.close()
            raise

    def grow(self, n_slots: int) -> Sequence[Memory]:
        """Add slots, in whole slabs but for the last; gives the new slabs, for whoever registers them.

        Raises:
            CapacityError: more than the host has; nothing was added.
            ClosedError: the pool is closed; nothing was added.
        """
        if n_slots < 1:
            return ()
        with self._growing:
            return self._grow(n_slots)

    def _grow(self, n_slots: int) -> Sequence[Memory]:
        if self.n_slots % self.slots_per_slab:
            raise CapacityError("pool: its last slab is not a whole one, so it cannot grow")
        self._check_available(n_slots)
        added: list[Memory] = []
        counts = [min(self.slots_per_slab, n_slots - first) for first in range(0, n_slots, self.slots_per_slab)]
        try:
            for count in counts:
                added += [self._source.allocate(count * self.slot_stride)]
        except BaseException:
            for memory in added:
                self._source.release(memory)
            raise
        with self._guard:
            if self._closed:
                for memory in added:
                    self._source.release(memory)
            self._check_open()
            for memory, count in zip(added, counts, strict=True):
                self._memories.append(memory)
                whole = memory.array()[: count * self.slot_stride].reshape(count, self.slot_stride)
                self._rows.append(whole[:, : self.slot_nbytes])
            self._allocator.grow(n_slots)
            self._holds = np.concatenate([self._holds, np.zeros(n_slots, dtype=np.int32)])
            self.n_planned = max(self.n_planned, len(self._holds))
        return added

    def available_nbytes(self) -> int:
        """How many bytes it could grow by, as far as can be told."""
        return self._source.available_nbytes()

    def stop_growing(self) -> None:
        """A growth under way ends soon, with `ClosedError`, and so does every later one."""
        self._source.cancel()

    def _check_available(self, n_slots: int) -> None:
        needed, available = n_slots * self.slot_stride, self._source.available_nbytes()
        if needed > available:
            raise CapacityError(
                f"pool of {n_slots} slots of {self.slot_nbytes} bytes ({needed} bytes): {available} bytes are available"
            )

    @property
    def n_slots(self) -> int:
        """How many slots there are by now."""
        return len(self._holds)

    @property
    def n_free(self) -> int:
        """How many slots `allocate` can give now."""
        return self._allocator.n_free

    @property
    def n_leases(self) -> int:
        """How many leases are held."""
        return self._n_leases

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The slabs, in the order of their slots."""
        return tuple(self._memories)

    def rows(self) -> Sequence[NDArray[np.uint8]]:
        """Each slab as uint8[slots, slot_nbytes], without a copy."""
        return self._rows

    def view(self, slot: int) -> NDArray[np.uint8]:
        """One slot's bytes, without a copy: uint8[slot_nbytes]."""
        rows: NDArray[np.uint8] = self._rows[slot // self.slots_per_slab]
        view: NDArray[np.uint8] = rows[slot % self.slots_per_slab]
        return view

    def spans(self, slots: Int64s | Sequence[int], nbytes: int | None = None) -> Spans:
        """One range a key: the first `nbytes` (all by default) of each slot.

        Raises:
            RegionError: a slot that does not exist, or more bytes than it has: they would be its neighbour's.
        """
        numbers = np.asarray(slots, dtype=np.int64)
        n = len(numbers)
        if n and (numbers.min() < 0 or numbers.max() >= self.n_slots):
            raise RegionError(f"spans: slots must lie in 0..{self.n_slots - 1}")
        if nbytes is not None and nbytes > self.slot_nbytes:
            raise RegionError(f"spans: {nbytes} bytes of slots that have {self.slot_nbytes}")
        return Spans(
            self.memories,
            n,
            np.arange(n, dtype=np.int64),
            numbers // self.slots_per_slab,
            numbers % self.slots_per_slab * self.slot_stride,
            np.full(n, self.slot_nbytes if nbytes is None else nbytes, dtype=np.int64),
        )

    def allocate(self, n: int) -> Lease:
        """Take n slots until the lease's last holder lets go; raises `CapacityError` and takes none."""
        with self._guard:
            self._check_open()
            slots = self._allocator.allocate(n)
            generations = self._allocator.generations(slots)
            numbers = np.array(slots, dtype=np.int64)
            self._hold(numbers)

        def free() -> None:
            with self._guard:
                self._unhold(numbers)
                self._allocator.free(slots)

        return Lease(numbers, on_last=free, generations=generations)

    def lease(self, slots: Int64s | Sequence[int], *, exclusive: bool = False) -> Lease:
        """Hold slots that somebody else numbered; `exclusive` for whoever writes into them.

        Raises:
            RegionError: a slot that does not exist, or an exclusive lease on one that is held.
        """
        numbers = np.array(slots, dtype=np.int64)  # a copy: what is held must be what is let go
        with self._guard:
            self._check_open()
            if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.n_slots):
                raise RegionError(f"lease: slots must lie in 0..{self.n_slots - 1}, got {numbers.tolist()}")
            if exclusive and (self._holds[numbers] != 0).any():
                raise RegionError("lease: a slot is still held by a transfer that is not terminal")
            self._hold(numbers)

        def unhold() -> None:
            with self._guard:
                self._unhold(numbers)

        return Lease(numbers, on_last=unhold)

    def close(self) -> None:
        """Give the slabs back. Refused while leases are held: hardware may still be at them."""
        with self._guard:
            if self._closed:
                return
            if self._n_leases:
                raise CapacityError(f"pool: {self._n_leases} leases are still held")
            self._closed = True
            memories, self._memories, self._rows = self._memories, [], []
        for memory in memories:
            self._source.release(memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("pool: closed")

    def _hold(self, numbers: Int64s) -> None:
        np.add.at(self._holds, numbers, 1)
        self._n_leases += 1

    def _unhold(self, numbers: Int64s) -> None:
        np.subtract.at(self._holds, numbers, 1)
        self._n_leases -= 1
