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
    EVICTING = "evicting"  # it is among the next to lose its slot, and still there


class Removal(Enum):
    """Why a block is in L1 no more."""

    EVICTED = "evicted"
    FORGOTTEN = "forgotten"  # its owner dropped it
    RESET = "reset"  # all were dropped: the weights have changed


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


class CacheListener:
    """Is told what becomes of the blocks in L1. Override what is of interest.

    Called where decisions are made, a block at a time: return at once, and do not call the cache. One that
    raises is counted and logged, and nothing comes of it; one that takes longer than 50 ms over a call is
    not called again (but nobody can end a call that never returns).
    """

    def on_insert(self, key: bytes) -> None:
        """A block can be served from now on."""

    def on_hot(self, key: bytes) -> None:
        """A use has just made a block hot, by the eviction policy's own definition."""

    def before_evict(self, key: bytes) -> bool:
        """Whether a block may be evicted. False, or an exception, keeps it; another goes in its place."""
        return True

    def on_removed(self, key: bytes, cause: Removal) -> None:
        """A block that was told of by `on_insert` is there no more."""


class OffloadPolicy(ABC):
    """Decides which blocks go to L2, and at which event."""

    name: ClassVar[str]

    @abstractmethod
    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        """Of the keys that an event befell, those to offload now. L2 has none of them yet."""
