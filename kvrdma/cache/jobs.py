"""What the index asks of the agents, and what they report: arrays, so that they cross process borders cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

import numpy as np
from numpy.typing import NDArray

from kvrdma.keys import KeyBatch
from kvrdma.layout import Int64s


class JobKind(Enum):
    """What is to be done with a job's slots."""

    FETCH = "fetch"  # L2 -> slots
    PUT = "put"  # slots -> L2
    SAVE = "save"  # device blocks -> slots; without blocks: the slots are filled already, only seal them
    LOAD = "load"  # slots -> device blocks


class BlockStatus(IntEnum):
    """What became of one block of a job on one rank."""

    OK = 0
    PENDING = 1
    MISSING = 2
    CHECKSUM = 3
    DECLINED = 4
    FAILED = 5


def _no_blocks() -> Int64s:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Work on slots, the same on every rank. `blocks` are device blocks, one a slot, or none."""

    kind: JobKind
    number: int
    keys: KeyBatch
    slots: Int64s
    timeout: float
    blocks: Int64s = field(default_factory=_no_blocks)
    group: int = 0

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True, slots=True, eq=False)
class JobReport:
    """What one rank has done of a job so far: a `BlockStatus` a block; `terminal` once, with the last one."""

    number: int
    rank: int
    status: NDArray[np.uint8]
    terminal: bool


@dataclass(frozen=True, slots=True)
class PoolReport:
    """How far one rank's pool is: its slots 0..n_slots-1 can be used. `failure` says why it ended early."""

    rank: int
    n_slots: int
    growing: bool
    failure: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A question to L2: which of these keys are there on every shard?"""

    number: int
    keys: KeyBatch


@dataclass(frozen=True, slots=True, eq=False)
class ProbeAnswer:
    """L2's answer, as `backends.Lookup` has it; `seconds` is how long it took, None where none came."""

    number: int
    present: NDArray[np.bool_]
    down: bool
    differs: tuple[str, ...]
    seconds: float | None = None
