"""Offload modes: all blocks, those that have proved hot, or those that are about to be evicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvrdma.policies.base import Event, OffloadPolicy


class OffloadAll(OffloadPolicy):
    """Every block goes to L2 as soon as it is stored."""

    name: ClassVar[str] = "all"

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        """All keys that were stored."""
        return list(keys) if event is Event.STORED else []


class OffloadHot(OffloadPolicy):
    """A block goes to L2 once it was used again; what is hot is for the eviction policy to say."""

    name: ClassVar[str] = "hot"

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        """All keys that have just become hot."""
        return list(keys) if event is Event.HOT else []


class OffloadCold(OffloadPolicy):
    """A block goes to L2 when it is among the next to lose its slot; L2 holds what L1 has no room for."""

    name: ClassVar[str] = "cold"

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        """All keys whose turn is near."""
        return list(keys) if event is Event.EVICTING else []
