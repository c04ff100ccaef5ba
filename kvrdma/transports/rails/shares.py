"""How much of a batch each rail gets: so that all are expected to end at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvrdma.layout import Int64s

MIN_SPLIT_NBYTES: Final = 256 << 10  # less than this is not worth a second request
_WEIGHT: Final = 0.25  # of the newest measurement
_FLOOR: Final = 0.05  # of the fastest rail's rate: who gets nothing is never measured again


class Meter:
    """What a rail has under way, and how fast it has been: bytes, and bytes a second. One thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.outstanding = 0
        self.rate: float | None = None
        self._clock = clock
        self._last_end = 0.0

    def begin(self, nbytes: int) -> float:
        """Something is posted; when."""
        self.outstanding += nbytes
        return self._clock()

    def end(self, nbytes: int, begun: float, *, whole: bool) -> None:
        """It is terminal. What waited behind others counts from the end of those."""
        now = self._clock()
        self.outstanding -= nbytes
        if whole and nbytes:
            rate = nbytes / max(now - max(begun, self._last_end), 1e-6)
            self.rate = rate if self.rate is None else (1 - _WEIGHT) * self.rate + _WEIGHT * rate
        self._last_end = now


def split(nbytes: Int64s, meters: Sequence[Meter]) -> list[slice]:
    """Cut ranges (int64[n] bytes each, in order) into a run for each meter; runs may be empty."""
    total = int(nbytes.sum())
    known = [meter.rate for meter in meters if meter.rate is not None]
    usual = sum(known) / len(known) if known else 1e9
    rates = np.array([usual if meter.rate is None else meter.rate for meter in meters])
    rates = np.maximum(rates, _FLOOR * rates.max())
    waiting = np.array([meter.outstanding for meter in meters], dtype=np.float64)
    if len(meters) == 1 or len(nbytes) == 1 or total < MIN_SPLIT_NBYTES:
        quickest = int(np.argmin((waiting + total) / rates))
        return [slice(0, len(nbytes)) if i == quickest else slice(0, 0) for i in range(len(meters))]
    # The time by which all end: rails that have more than that under way already get nothing.
    order = np.argsort(waiting / rates)
    end = 0.0
    for n in range(1, len(order) + 1):
        chosen = order[:n]
        end = (total + waiting[chosen].sum()) / rates[chosen].sum()
        if n < len(order) and end <= (waiting / rates)[order[n]]:
            break
    wanted = np.maximum(0.0, rates * end - waiting)
    middles = np.cumsum(nbytes) - nbytes / 2
    cuts = np.searchsorted(middles, np.cumsum(wanted) * (total / wanted.sum()))
    cuts[-1] = len(nbytes)
    return [slice(int(first), int(last)) for first, last in zip([0, *cuts[:-1]], cuts, strict=True)]
