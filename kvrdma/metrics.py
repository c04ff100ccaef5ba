"""Counters, and the one reason that every looked-up block has when it is not served."""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any


class Reason(Enum):
    """Why a block that was looked up was not served. Each such block has exactly one."""

    NOT_THERE = "not_there"  # no tier has it, and none is known to have had it
    EVICTED = "evicted"  # L1 had it, as far as the bounded list of evicted keys remembers
    OTHER_KEYSPACE = "other_keyspace"  # this key space is empty in L2, one that nearly equals it is not
    GATE = "gate"  # computing it was expected to be faster
    TIER_DOWN = "tier_down"  # L2 did not answer, or its breaker is open
    CHECKSUM = "checksum"  # the bytes that came were not those that were stored
    RANK_SHORTER = "rank_shorter"  # another rank's shard was missing
    BEHIND_HOLE = "behind_hole"  # it is there, but a block before it is not
    NOT_YET = "not_yet"  # under way, and not in time
    NO_ROOM = "no_room"  # L1 had no slot for it, or waiting requests hold their share
    UNUSED = "unused"  # offered, but the engine took fewer, or the request ended first
    LOAD_FAILED = "load_failed"  # the copy to the device failed


class Metrics:
    """What happened, by name. Not thread-safe: each owner has its own, and they are added up when read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.misses: Counter[Reason] = Counter()

    def add(self, name: str, n: int = 1) -> None:
        """Count n more of `name`."""
        self.counts[name] += n

    def miss(self, reason: Reason, n: int = 1) -> None:
        """Count n looked-up blocks that were not served, for one reason."""
        if n:
            self.misses[reason] += n

    def snapshot(self) -> dict[str, Any]:
        """Every counter, and the misses by reason under `misses`."""
        return {**self.counts, "misses": {reason.value: n for reason, n in self.misses.items() if n}}
