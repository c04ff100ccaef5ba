"""How ranks agree: a rank with itself, or ranks in threads of one process. Over an engine's group it comes with TP."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from kvrdma.cache import Job
from kvrdma.errors import ClosedError, ConfigError, CoordinationLost
from kvrdma.layout import Bitmap

MAX_BATCHES_BEHIND: Final = 64


class Coordinator(Protocol):
    """Ranks agree, over a group made from the engine's process group, or given. Thread-safe.

    A value returned for a job is equal on every rank that gets one; a rank that cannot know raises
    `CoordinationLost` and must not go on with a value of its own. Every wait ends.
    """

    @property
    def rank(self) -> int:
        """This rank's number; rank 0 owns the index."""

    @property
    def world(self) -> int:
        """How many ranks there are."""

    def agree(self, job_id: int, ok: Bitmap, *, timeout: float) -> Bitmap:
        """What all ranks have of a job: the AND of what each brings, bool[n].

        Once a rank and job. Ranks may come to jobs in any order, and to several at once by threads: no job waits
        for another.

        Raises:
            CoordinationLost: a rank did not come within `timeout` seconds, has left, or means another job by this
                number. What this rank brought may still be counted where others get a value.
            ConfigError: this rank has brought its part of the job already.
            ClosedError: this rank has left.
        """

    def share(self, jobs: Sequence[Job] | None, *, timeout: float) -> Sequence[Job]:
        """Rank 0's jobs, on every rank in one order: the next that it shared. Other ranks bring None.

        On rank 0 it may wait until the others have taken earlier ones.

        Raises:
            CoordinationLost: nothing came within `timeout` seconds, or a rank has left. None is skipped: whoever
                asks again gets what comes next, or this again.
            ConfigError: jobs that are not rank 0's.
            ClosedError: this rank has left.
        """

    def close(self) -> None:
        """Leave: whoever waits for this rank, or will, hears of it at once. Idempotent."""


class SoloCoordinator:
    """One rank, which agrees with itself."""

    def __init__(self) -> None:
        self._closed = False

    @property
    def rank(self) -> int:
        """This rank's number: 0."""
        return 0

    @property
    def world(self) -> int:
        """How many ranks there are: 1."""
        return 1

    def agree(self, job_id: int, ok: Bitmap, *, timeout: float) -> Bitmap:
        """What this rank has."""
        self._check_here()
        return np.array(ok, dtype=np.bool_)

    def share(self, jobs: Sequence[Job] | None, *, timeout: float) -> Sequence[Job]:
        """This rank's jobs."""
        self._check_here()
        return tuple(jobs or ())

    def close(self) -> None:
        """Nobody waits for this rank."""
        self._closed = True

    def _check_here(self) -> None:
        if self._closed:
            raise ClosedError("rank 0: has left")


@dataclass(slots=True, eq=False)
class _Ballot:
    """One job's votes, until every rank that still waits has its value."""

    votes: dict[int, Bitmap] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    value: Bitmap | None = None
    lost: str = ""


class ThreadGroup:
    """Several ranks in threads of one process: `coordinators[r]` is rank r's.

    Raises:
        ConfigError: fewer than one rank.
    """

    def __init__(self, world: int) -> None:
        if world < 1:
            raise ConfigError(f"thread group: at least 1 rank is needed, not {world}")
        self.world = world
        self.changed = threading.Condition()
        self.left: set[int] = set()
        self.ballots: dict[int, _Ballot] = {}
        self.shared: list[deque[tuple[Job, ...]]] = [deque() for _ in range(world)]  # what each has yet to take
        self.coordinators: Sequence[Coordinator] = tuple(_ThreadCoordinator(self, rank) for rank in range(world))


class _ThreadCoordinator:
    """One rank of a `ThreadGroup`."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group = group
        self._rank = rank

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._rank

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return self._group.world

    def agree(self, job_id: int, ok: Bitmap, *, timeout: float) -> Bitmap:
        """What all ranks have."""
        group = self._group
        vote = np.array(ok, dtype=np.bool_)  # a copy: it is counted when the caller may be elsewhere
        with group.changed:
            self._check_here()
            ballot = group.ballots.setdefault(job_id, _Ballot())
            if self._rank in ballot.votes:
                raise ConfigError(f"job {job_id}: rank {self._rank} has brought its part already")
            ballot.votes[self._rank] = vote
            ballot.waiting.add(self._rank)
            if any(other.shape != vote.shape for other in ballot.votes.values()):
                ballot.lost = "ranks mean jobs of different sizes"
            elif len(ballot.votes) == group.world:
                ballot.value = np.logical_and.reduce(list(ballot.votes.values()))
            group.changed.notify_all()
            try:
                self._wait(lambda: ballot.value is not None or ballot.lost or self._missing(ballot), timeout)
                if ballot.value is None:
                    self._check_here()
                    why = ballot.lost or self._missing(ballot) or f"not all ranks came within {timeout} s"
                    raise CoordinationLost(f"job {job_id} on rank {self._rank}: {why}")
                return ballot.value.copy()
            finally:
                ballot.waiting.discard(self._rank)
                if not ballot.waiting and group.ballots.get(job_id) is ballot:
                    del group.ballots[job_id]

    def share(self, jobs: Sequence[Job] | None, *, timeout: float) -> Sequence[Job]:
        """Rank 0's jobs, in one order."""
        group = self._group
        if jobs is not None and self._rank != 0:
            raise ConfigError(f"share: rank {self._rank} brings jobs; only rank 0 decides")
        mine = group.shared[self._rank]
        others = group.shared[1:]
        with group.changed:
            self._check_here()
            if self._rank == 0:
                batch = tuple(jobs or ())
                self._wait(lambda: group.left or max(map(len, others), default=0) < MAX_BATCHES_BEHIND, timeout)
                if not group.left and max(map(len, others), default=0) < MAX_BATCHES_BEHIND:
                    for queue in others:
                        queue.append(batch)
                    group.changed.notify_all()
                    return batch
            else:
                self._wait(lambda: mine or group.left, timeout)
                if mine:
                    group.changed.notify_all()
                    return mine.popleft()
            self._check_here()
            why = self._gone() or f"nothing within {timeout} s"
            raise CoordinationLost(f"jobs of rank 0 on rank {self._rank}: {why}")

    def close(self) -> None:
        """Leave the group."""
        with self._group.changed:
            self._group.left.add(self._rank)
            self._group.changed.notify_all()

    # -- inside, with `changed` held

    def _wait(self, holds: Callable[[], object], timeout: float) -> None:
        """Wait until something holds, this rank has left or the time is over."""
        deadline = time.monotonic() + timeout
        while not holds() and self._rank not in self._group.left:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._group.changed.wait(left)

    def _check_here(self) -> None:
        if self._rank in self._group.left:
            raise ClosedError(f"rank {self._rank}: has left the group")

    def _missing(self, ballot: _Ballot) -> str:
        """Which ranks have left without their part."""
        return self._gone(self._group.left - ballot.votes.keys())

    def _gone(self, ranks: set[int] | None = None) -> str:
        gone = self._group.left if ranks is None else ranks
        return f"rank {', '.join(map(str, sorted(gone)))} has left" if gone else ""
