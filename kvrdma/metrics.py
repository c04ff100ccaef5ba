"""Counters, and the one reason that every looked-up block has when it is not served."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from enum import Enum
from typing import Any, Final

SECONDS_BOUNDS: Final = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
"""Upper bounds of the buckets that durations are counted in; one more bucket is for what lies above."""


class Reason(Enum):
    """Why a block that was looked up was not served. Each such block has exactly one."""

    NOT_THERE = "not_there"  # no tier has it, and none is known to have had it
    EVICTED = "evicted"  # it was there, as far as a bounded list of evicted keys remembers
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


class Histogram:
    """Durations, counted in the buckets of `SECONDS_BOUNDS`."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BOUNDS) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(SECONDS_BOUNDS, seconds)] += 1
        self.total_s += seconds

    def snapshot(self) -> dict[str, Any]:
        """Counts by bucket, and the sum of all durations."""
        return {"counts": list(self.counts), "sum": self.total_s}


def quantile(counts: list[int], share: float) -> float:
    """The upper bound, in seconds, of the bucket in which this share of all durations ends; inf above the last."""
    left = share * sum(counts)
    for bound, count in zip(SECONDS_BOUNDS, counts[:-1], strict=True):
        left -= count
        if left <= 0:
            return bound
    return float("inf")


class Metrics:
    """What happened, by name. Not thread-safe: each owner has its own, and they are added up when read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.misses: Counter[Reason] = Counter()
        self.seconds: dict[str, Histogram] = {}

    def add(self, name: str, n: int = 1) -> None:
        """Count n more of `name`."""
        self.counts[name] += n

    def miss(self, reason: Reason, n: int = 1) -> None:
        """Count n looked-up blocks that were not served, for one reason."""
        if n:
            self.misses[reason] += n

    def observe(self, name: str, seconds: float) -> None:
        """Count how long one `name` took."""
        self.seconds.setdefault(name, Histogram()).observe(seconds)

    def snapshot(self) -> dict[str, Any]:
        """Every counter; misses by reason under `misses`, durations under `seconds`, where there are any."""
        return {
            **self.counts,
            "misses": {reason.value: n for reason, n in self.misses.items() if n},
            "seconds": {name: histogram.snapshot() for name, histogram in self.seconds.items()},
        }
