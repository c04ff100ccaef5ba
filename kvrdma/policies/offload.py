"""Offload modes. ALL acts when a block is stored; HOT and COLD are planned and act on the other two events."""

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
