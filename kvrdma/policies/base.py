"""What an eviction policy and an offload policy are.

A policy is pure bookkeeping over keys: no locks, no I/O, no clock. The cache and the simulator use the very
same objects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum
from typing import ClassVar


class Event(Enum):
    """When an offload policy is asked which blocks go to L2."""

    STORED = "stored"  # it has just been saved
    HOT = "hot"  # a touch has just made it hot, by the eviction policy's own definition
    EVICTING = "evicting"  # it is about to lose its slot


class EvictionPolicy(ABC):
    """Decides which blocks lose their slots. Knows keys only; the cache counts slots and bytes.

    Every operation is O(1) a key. A key is in until the caller lets it go, though there be more than `capacity`;
    what is kept beyond those that are in is bounded by a multiple of it.
    """

    name: ClassVar[str]
    options_type: ClassVar[type | None] = None
    """A dataclass of `kvrdma.settings.option`s, where there is something to set; it is the second argument."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"{type(self).__name__}: capacity must be at least 1 block, not {capacity}")
        self.capacity = capacity

    @abstractmethod
    def insert(self, key: bytes, *, parent: bytes | None = None, cost: float = 1.0) -> None:
        """Take in a key that is not in. `parent` is the block before it, `cost` that of computing it anew."""

    @abstractmethod
    def touch(self, key: bytes) -> bool:
        """Note a use of a key that is in. True where that has just made it hot."""

    @abstractmethod
    def victims(self, n: int, *, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        """Choose n keys to evict, worst first; fewer are not given: an empty list where there are not n.

        Nothing changes: the caller evicts each by `evict` once it is really gone.
        """

    @abstractmethod
    def evict(self, key: bytes) -> None:
        """Let a victim go; a policy may remember it (a ghost)."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Forget a key for a reason of the caller's (deleted, found wrong)."""

    @abstractmethod
    def clear(self) -> None:
        """Forget everything."""

    @abstractmethod
    def __contains__(self, key: bytes) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...


class OffloadPolicy(ABC):
    """Decides which blocks go to L2, and at which event."""

    name: ClassVar[str]

    @abstractmethod
    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        """Of the keys that an event befell, those to offload now."""
