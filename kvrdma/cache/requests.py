"""What the index remembers of one request's lookup."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvrdma.cache.jobs import ProbeAnswer
from kvrdma.cache.slots import Slot, SlotState
from kvrdma.metrics import Reason


class Answer(Enum):
    """What a lookup says."""

    PENDING = "pending"  # ask again: L2 is being asked, or blocks are on their way
    OFFERED = "offered"  # this many blocks are there, and held


@dataclass(frozen=True, slots=True)
class Offer:
    """The answer to a lookup: `n_blocks` can be loaded."""

    answer: Answer
    n_blocks: int


class Phase(Enum):
    """How far a lookup has come; it only goes forward."""

    NEW = 1
    PROBING = 2
    WAITING = 3
    OFFERED = 4
    DONE = 5


@dataclass(slots=True, eq=False)
class Request:
    """A lookup of `keys[first:]`. Rows are positions in `keys`."""

    request_id: str
    keys: list[bytes]
    first: int
    counted: bool = True  # whether its blocks enter the account (those of a prefetch do not)
    refused: bool = False  # a load of it failed: nothing is offered any more
    phase: Phase = Phase.NEW
    probe: int = 0
    probed_from: int = 0
    deadline: float = 0.0
    answer: ProbeAnswer | None = None
    held: list[Slot] = field(default_factory=list)  # the leading READY run, referenced
    n_from_l1: int = 0  # how many of them were in L1 before L2 was asked for more
    waits_for: dict[bytes, tuple[int, Slot]] = field(default_factory=dict)  # key -> (row, slot), referenced
    failures: dict[int, Reason] = field(default_factory=dict)  # by row: fetched, and did not come
    refusals: dict[int, Reason] = field(default_factory=dict)  # by row: not fetched, though L2 has it
    reasons: list[Reason] = field(default_factory=list)  # of the rows that are not offered

    @property
    def n_wanted(self) -> int:
        """How many blocks the lookup is about."""
        return len(self.keys) - self.first

    def arriving(self) -> bool:
        """Whether a block is still being fetched that can lengthen the offer: not one behind a block that is lost."""
        end = min((*self.failures, *self.refusals), default=len(self.keys))
        return any(slot.state is SlotState.FETCHING and row < end for row, slot in self.waits_for.values())

    def in_l2(self, row: int) -> bool:
        """Whether L2 says it has the block of a row."""
        at = row - self.probed_from
        return self.answer is not None and 0 <= at < len(self.answer.present) and bool(self.answer.present[at])
