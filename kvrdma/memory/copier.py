"""Between device blocks and slots: the `BlockCopier` interface, and the one for CPU tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import ConfigError, RegionError
from kvrdma.layout import BlockLayout, Int64s
from kvrdma.memory.pool import PinnedPool
from kvrdma.memory.slab import Memory, bytes_at


class Fence(Protocol):
    """A point of the engine's work: what was queued before it is done once it is reached."""

    def wait(self) -> None:
        """Block until the engine's work up to here is done."""


class Copy(Protocol):
    """A copy under way."""

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""

    @property
    def seconds(self) -> float:
        """What it took, once done."""

    def done(self) -> bool:
        """Whether all bytes are there, without waiting."""

    def wait(self) -> None:
        """Block until all bytes are there; raises what went wrong."""


class BlockCopier(Protocol):
    """Copies blocks between a device and slots; what it needs is fixed when it is registered.

    `fence` is called on the engine's thread, the copies on the agent's.
    """

    def register(self, layout: BlockLayout, pool: PinnedPool) -> None:
        """Fix where the device's blocks and the slots lie; called once for each group, in order."""

    def prepare(self, memory: Memory) -> None:
        """Make a slab that its pool has gained usable; called on the growing thread, before any of its slots is."""

    def fence(self) -> Fence:
        """Mark the engine's work queued so far."""

    def gather(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Copy device blocks into slots."""

    def scatter(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Copy slots into device blocks."""

    def close(self) -> None:
        """Release streams and page locks; no copy may be under way."""


@dataclass(frozen=True, slots=True)
class FinishedCopy:
    """A copy that was done when it was returned."""

    nbytes: int
    seconds: float

    def done(self) -> bool:
        """Whether all bytes are there: always."""
        return True

    def wait(self) -> None:
        """Return at once."""


class ReachedFence:
    """A fence on a device that works synchronously."""

    def wait(self) -> None:
        """Return at once."""


class CpuCopier:
    """CPU tensors: strided copies, a whole run of consecutive blocks a call.

    Blocks and slots usually come in consecutive runs; then numpy copies each layer of a run in one call.
    Where they do not, one indexed copy a layer does it, through a temporary that fits the CPU's cache.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[list[NDArray[np.uint8]], PinnedPool]] = []
        self._keepalive: list[BlockLayout] = []

    def register(self, layout: BlockLayout, pool: PinnedPool) -> None:
        """Map every run of the layout as uint8[n_blocks, nbytes]; raises `ConfigError` on a misfit."""
        if layout.nbytes != pool.slot_nbytes:
            raise ConfigError(f"a block has {layout.nbytes} bytes, a slot {pool.slot_nbytes}")
        if layout.device != "cpu":
            raise ConfigError(f"the CPU copier was given blocks on {layout.device}")
        runs = []
        for run in layout.runs:
            whole = (layout.n_blocks - 1) * run.block_stride + run.nbytes
            raw = bytes_at(run.address, whole)
            runs.append(
                np.lib.stride_tricks.as_strided(
                    raw, (layout.n_blocks, run.nbytes), (run.block_stride, 1), writeable=True
                )
            )
        self._groups.append((runs, pool))
        self._keepalive.append(layout)

    def prepare(self, memory: Memory) -> None:
        """Nothing to do: the memory is this process's."""

    def fence(self) -> Fence:
        """CPU work is done when its call returns."""
        return ReachedFence()

    def gather(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Copy device blocks into slots, before it returns."""
        return self._copy(group, blocks, slots, to_slots=True, after=after)

    def scatter(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Copy slots into device blocks, before it returns."""
        return self._copy(group, blocks, slots, to_slots=False, after=after)

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._groups.clear()
        self._keepalive.clear()

    def _copy(self, group: int, blocks: Int64s, slots: Int64s, *, to_slots: bool, after: Fence) -> Copy:
        runs, pool = self._groups[group]
        check_pairs(blocks, len(runs[0]), slots, pool.n_slots)
        after.wait()
        started = time.perf_counter()
        slab, within = np.divmod(slots, pool.slots_per_slab)
        # A section is consecutive on both sides and lies in one slab.
        breaks = (np.diff(blocks) != 1) | (np.diff(within) != 1) | (np.diff(slab) != 0)
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(blocks)]]) if len(blocks) else [0]
        if len(starts) - 1 <= max(1, len(blocks) // 4):
            for first, last in itertools.pairwise(starts):
                b, s = int(blocks[first]), int(within[first])
                n = int(last - first)
                _copy_runs(runs, pool.rows()[slab[first]], slice(b, b + n), slice(s, s + n), to_slots)
        else:
            for row in np.unique(slab):
                here = slab == row
                _copy_runs(runs, pool.rows()[row], blocks[here], within[here], to_slots)
        return FinishedCopy(len(blocks) * pool.slot_nbytes, time.perf_counter() - started)


def check_pairs(blocks: Int64s, n_blocks: int, slots: Int64s, n_slots: int) -> None:
    """Raise `RegionError` where blocks and slots are no pairs, or one does not exist: a copy would reach a
    neighbour's bytes.
    """
    if len(blocks) != len(slots):
        raise RegionError(f"copy: {len(blocks)} blocks and {len(slots)} slots")
    for numbers, limit, what in ((blocks, n_blocks, "block"), (slots, n_slots, "slot")):
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < limit):
            raise RegionError(f"copy: {what}s must lie in 0..{limit - 1}, got {numbers.min()}..{numbers.max()}")


def read_slots(slabs: Sequence[NDArray[np.uint8]], slots: Int64s, target: NDArray[np.uint8]) -> None:
    """Copy slots of a pool's slabs (see `PinnedPool.rows`) into uint8[n, slot_nbytes].

    Consecutive slots are copied at once: from 1 MiB on memcpy goes round the CPU's caches, twice as fast.
    """
    if not len(slots):
        return
    slab, within = np.divmod(slots, len(slabs[0]))  # only the last slab may have fewer slots than the others
    starts = np.flatnonzero((np.diff(slots, prepend=-2) != 1) | (within == 0)).tolist()
    for first, last in itertools.pairwise([*starts, len(slots)]):
        row = int(within[first])
        target[first:last] = slabs[slab[first]][row : row + last - first]


def _copy_runs(
    runs: list[NDArray[np.uint8]],
    rows: NDArray[np.uint8],
    blocks: slice | Int64s,
    slots: slice | Int64s,
    to_slots: bool,
) -> None:
    offset = 0
    for run in runs:
        columns = slice(offset, offset + run.shape[1])
        if to_slots:
            rows[slots, columns] = run[blocks]
        else:
            run[blocks] = rows[slots, columns]
        offset = columns.stop
