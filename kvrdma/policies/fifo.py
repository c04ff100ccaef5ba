"""First in, first out. Hot: touched at least once since it came in; cold: what came in first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import filterfalse, islice
from typing import ClassVar

from kvrdma.policies.base import EvictionPolicy


class FifoPolicy(EvictionPolicy):
    """Evicts what came in first, used or not: the yardstick for the others."""

    name: ClassVar[str] = "fifo"

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._touched: OrderedDict[bytes, bool] = OrderedDict()

    def insert(self, key: bytes, *, parent: bytes | None = None, cost: float = 1.0) -> None:
        """Take in a key behind all others."""
        if key in self._touched:
            raise KeyError(f"{key.hex()} is in already")
        self._touched[key] = False

    def touch(self, key: bytes) -> bool:
        """Note a use, which changes no order; the first makes the key hot."""
        was_hot = self._touched[key]
        self._touched[key] = True
        return not was_hot

    def victims(self, n: int, *, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        """The n keys that came in first and are not pinned, or none."""
        chosen = list(islice(filterfalse(is_pinned, self._touched), max(0, n)))
        return chosen if len(chosen) == n else []

    def evict(self, key: bytes) -> None:
        """Forget a victim; there are no ghosts."""
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
