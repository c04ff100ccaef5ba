"""Numbered slots: pure bookkeeping, used where decisions are made (the index) and where memory is (a pool)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kvrdma.errors import CapacityError
from kvrdma.layout import Int64s


class SlotAllocator:
    """Hands out slot numbers, all that are asked for or none, and counts each slot's generations.

    A slot's generation goes up whenever it is freed: whoever remembers slot and generation can tell that
    what it remembers has gone. Not thread-safe.
    """

    def __init__(self, n_slots: int = 0) -> None:
        self._free: list[int] = []
        self._taken: list[bool] = []
        self._generations: list[int] = []
        self.grow(n_slots)

    def __len__(self) -> int:
        return len(self._taken)

    @property
    def n_free(self) -> int:
        """How many slots can be had now."""
        return len(self._free)

    def grow(self, n_slots: int) -> None:
        """Add slots with the next numbers."""
        first = len(self._taken)
        self._free[:0] = range(first + n_slots - 1, first - 1, -1)
        self._taken += [False] * n_slots
        self._generations += [0] * n_slots

    def allocate(self, n: int) -> list[int]:
        """Take n slots, in ascending runs where they are free so; raises `CapacityError` and takes none."""
        if n > len(self._free):
            raise CapacityError(f"{n} slots asked for, {len(self._free)} of {len(self._taken)} are free")
        if n == 0:
            return []
        slots = sorted(self._free[-n:])  # what was freed together, in whatever order, is one run again
        del self._free[-n:]
        for slot in slots:
            self._taken[slot] = True
        return slots

    def free(self, slots: Iterable[int]) -> None:
        """Give slots back, each of which must be taken; their generations go up."""
        for slot in slots:
            if not self._taken[slot]:
                raise AssertionError(f"slot {slot} freed twice")
            self._taken[slot] = False
            self._generations[slot] += 1
            self._free.append(slot)

    def generation(self, slot: int) -> int:
        """How often the slot was freed."""
        return self._generations[slot]

    def generations(self, slots: Iterable[int]) -> Int64s:
        """The generations of several slots."""
        return np.array([self._generations[slot] for slot in slots], dtype=np.int64)
