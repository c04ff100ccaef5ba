"""Which fault befalls which batch: chosen by a script, a seed or a function, and counted."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Self

from kvrdma.transports.base import TransferBatch


class FaultKind(Enum):
    """What befalls a batch."""

    DELAY = "delay"  # it is posted `seconds` later
    DROP = "drop"  # the peer never answers, not even a cancel: only the end of the endpoint ends it
    LATE = "late"  # its bytes land after a time-out or a cancel was noticed, and before it is terminal
    REORDER = "reorder"  # its completion waits for that of a later batch, `seconds` at most
    CORRUPT = "corrupt"  # a byte is flipped of what a READ brought, or of what a WRITE sends
    RESET = "reset"  # half of it arrives, then the endpoint is aborted


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `byte` is which of the batch's bytes is flipped; by default the one in the middle."""

    kind: FaultKind
    seconds: float = 0.02
    byte: int | None = None


class FaultPlan:
    """Says which fault befalls which post: `choose(number, batch)`, numbers counting from 0. Thread-safe.

    `counts` are the faults so far, by kind; a corruption counts when the byte is flipped. A plan may be shared
    by several transports, whose posts it then counts together.
    """

    def __init__(self, choose: Callable[[int, TransferBatch], Fault | None]) -> None:
        self.counts: Counter[FaultKind] = Counter()
        self._choose = choose
        self._numbers = itertools.count()
        self._guard = threading.Lock()

    @classmethod
    def none(cls) -> Self:
        """No faults."""
        return cls(lambda number, batch: None)

    @classmethod
    def always(cls, fault: Fault) -> Self:
        """The same fault for every post."""
        return cls(lambda number, batch: fault)

    @classmethod
    def script(cls, *faults: Fault | None) -> Self:
        """A fault for each of the first posts; none for those that follow."""
        return cls(lambda number, batch: faults[number] if number < len(faults) else None)

    @classmethod
    def seeded(cls, seed: int, shares: Mapping[Fault, float]) -> Self:
        """Each fault for its share of the posts, the same ones for the same seed, whatever threads do."""

        def choose(number: int, batch: TransferBatch) -> Fault | None:
            drawn = random.Random(f"{seed}/{number}").random()  # noqa: S311 - what is wanted is that it repeats
            for fault, share in shares.items():
                drawn -= share
                if drawn < 0:
                    return fault
            return None

        return cls(choose)

    def next(self, batch: TransferBatch) -> Fault | None:
        """The fault of the next post. `choose` may block: that is a slow caller."""
        with self._guard:
            number = next(self._numbers)
        fault = self._choose(number, batch)
        if fault is not None and fault.kind is not FaultKind.CORRUPT:
            self.note(fault)
        return fault

    def note(self, fault: Fault) -> None:
        """Count a fault."""
        with self._guard:
            self.counts[fault.kind] += 1
