"""Least recently used. Hot: touched at least once since it came in; cold: what has waited longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import filterfalse, islice
from typing import ClassVar

from kvrdma.policies.base import EvictionPolicy


class LruPolicy(EvictionPolicy):
    """Evicts what was not used for the longest time."""

    name: ClassVar[str] = "lru"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._touched: OrderedDict[bytes, bool] = OrderedDict()

    def insert(self, key: bytes, *, parent: bytes | None = None, cost: float = 1.0) -> None:
        """Take in a key as the most recent one."""
        if key in self._touched:
            raise KeyError(f"{key.hex()} is in already")
        self._touched[key] = False

    def touch(self, key: bytes) -> bool:
        """Make a key the most recent one; the first touch makes it hot."""
        was_hot = self._touched[key]
        self._touched[key] = True
        self._touched.move_to_end(key)
        return not was_hot

    def victims(self, n: int, *, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        """The n least recent keys that are not pinned, or none."""
        chosen = list(islice(filterfalse(is_pinned, self._touched), max(0, n)))
        return chosen if len(chosen) == n else []

    def evict(self, key: bytes) -> None:
        """Forget a victim; LRU keeps no ghosts."""
        del self._touched[key]

    def remove(self, key: bytes) -> None:
        """Forget a key."""
        del self._touched[key]

    def clear(self) -> None:
        """Forget everything."""
        self._touched.clear()

    def __contains__(self, key: bytes) -> bool:
        return key in self._touched

    def __len__(self) -> int:
        return len(self._touched)
