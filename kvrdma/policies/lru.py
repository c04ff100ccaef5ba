"""Least recently used. Hot: touched at least once since it came in; cold: what has waited longest."""

from __future__ import annotations

from typing import ClassVar

from kvrdma.policies.fifo import FifoPolicy


class LruPolicy(FifoPolicy):
    """Evicts what was not used for the longest time: FIFO, but that a use puts a key behind all others."""

    name: ClassVar[str] = "lru"

    def touch(self, key: bytes) -> bool:
        """Make a key the most recent one; the first touch makes it hot."""
        became_hot = super().touch(key)
        self._touched.move_to_end(key)
        return became_hot
