"""`CacheIndex`: who is where, and every decision of one engine. Pure: no I/O, no threads, no lock.

It is asked by the engine's scheduler (or the manager, or the simulator), emits jobs and probes, and is told
what became of them. Slot numbers are the same on every rank, so one index decides for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.cache.jobs import BlockStatus, Job, JobKind, JobReport, PoolReport, Probe, ProbeAnswer
from kvrdma.cache.listeners import Listeners
from kvrdma.cache.lookups import Gate, Lookups, OpenGate
from kvrdma.cache.offloads import Offloads
from kvrdma.cache.requests import Offer
from kvrdma.cache.slots import Slot, SlotState, SlotTable
from kvrdma.errors import ConfigError
from kvrdma.keys import pack_keys
from kvrdma.layout import Bitmap, Int64s
from kvrdma.metrics import Metrics, Reason
from kvrdma.policies import CacheListener, Event, EvictionPolicy, OffloadPolicy

PUT_BATCH: Final = 64  # blocks a put job: a large save must not hold up what comes after it
FETCH_BATCH: Final = 64  # blocks a fetch job: what has come counts at the deadline, though the rest has not
_DEADLINE_GRACE: Final = 1.25  # a fetch ends by its own time-out; its report takes a step more
_REMEMBERED_PER_SLOT: Final = 4  # evicted keys that are remembered, for the reasons of misses


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Limits of an index; times in seconds."""

    ranks: int = 1
    has_l2: bool = False
    lookup_timeout_s: float = 0.25
    fetch_timeout_s: float = 5.0
    put_timeout_s: float = 30.0
    waiting_share: float = 0.5
    ahead_share: float = 0.05  # of L1: the next victims that are offered for offloading while they are there
    growing: bool = False  # there are no slots but those that every rank has reported (`on_pool`)


@dataclass(slots=True, eq=False)
class _JobState:
    """A job that is not terminal on every rank."""

    job: Job
    slots: list[Slot]
    status: NDArray[np.uint8]  # uint8[ranks, n]
    terminal: Bitmap  # bool[ranks]
    deadline: float
    n_from_l1: int = 0  # a LOAD: so many of its leading blocks were in L1 when they were looked up
    settled: bool = False  # a FETCH: each block is READY or lost, though some rank may not be done


class CacheIndex:
    """Lookup, fetch before promise, load, save, offload, evict: see docs/architecture.md.

    `lookup` is idempotent and cheap. Each looked-up block that is not served is counted under exactly one
    `Reason`: once requests and their loads have ended, looked_up_blocks = served_blocks + all misses,
    and served_blocks = l1_hit_blocks + l2_hit_blocks.
    """

    def __init__(
        self,
        capacity: int,
        policy: EvictionPolicy,
        offload: OffloadPolicy,
        options: IndexOptions,
        *,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"the CPU cache holds {capacity} blocks: l1_bytes is less than one block")
        self.metrics = Metrics()
        self.options = options
        self._clock = clock
        self._listeners = Listeners(self.metrics, clock)
        self._table = SlotTable(
            capacity,
            policy,
            self.metrics,
            self._listeners,
            on_evict=self._on_evict,
            remember=_REMEMBERED_PER_SLOT * capacity,
            n_slots=0 if options.growing else capacity,
        )
        self._pools = [PoolReport(rank, 0, growing=True) for rank in range(options.ranks if options.growing else 0)]
        self._offloads = Offloads(
            self._table, offload, self.metrics, n_ahead=int(options.ahead_share * capacity), put=self._put
        )
        self._lookups = Lookups(
            self._table,
            OpenGate() if gate is None else gate,
            self.metrics,
            fetch=self._fetch,
            number=self._number,
            clock=clock,
            probe_timeout_s=2 * options.lookup_timeout_s if options.has_l2 else None,
            waiting_share=options.waiting_share,
        )
        self._jobs: dict[int, _JobState] = {}
        self._jobs_out: list[Job] = []
        self._last_number = 0

    # -- what goes out

    def take_jobs(self) -> list[Job]:
        """Jobs for every rank since the last call, in order."""
        self._listeners.check_not_called_back()
        self._expire()
        if self.options.has_l2:
            self._offloads.look_ahead()  # behind what was asked for since the last call
        jobs, self._jobs_out = self._jobs_out, []
        return jobs

    def take_probes(self) -> list[Probe]:
        """Questions to L2 since the last call."""
        return self._lookups.take_probes()

    def busy(self, *kinds: JobKind) -> bool:
        """Whether a job of one of these kinds (of any, by default) is not terminal on every rank."""
        return any(not kinds or state.job.kind in kinds for state in self._jobs.values())

    @property
    def has_output(self) -> bool:
        """Whether jobs wait to be taken."""
        return bool(self._jobs_out)

    def listen(self, listener: CacheListener) -> None:
        """Tell a listener from now on what becomes of blocks."""
        self._listeners.add(listener)

    def open_job(self, number: int) -> bool:
        """Whether a job is not terminal on every rank."""
        return number in self._jobs

    # -- requests

    def lookup(
        self, request_id: str, keys: Sequence[bytes], first: int, *, ready_only: bool = False, counted: bool = True
    ) -> Offer:
        """How many blocks of `keys[first:]` can be loaded? Call again while the answer is PENDING.

        `first` counts the leading blocks that the engine has itself. What is offered is held until
        `allocated`, `take` or `finished`. With `ready_only` the answer is what is READY now: nothing is
        begun, and what was begun for the request is not waited for. A lookup that is not `counted` (a
        prefetch) is left out of the account.
        """
        self._listeners.check_not_called_back()
        self._expire()
        return self._lookups.lookup(request_id, keys, first, ready_only=ready_only, counted=counted)

    def allocated(self, request_id: str, blocks: Sequence[int] | Int64s) -> Job | None:
        """The engine takes as many of the offered blocks as it names device blocks for them.

        Gives the LOAD job, or None where nothing is to be loaded. The references pass to the job.
        """
        self._listeners.check_not_called_back()
        taken, n_from_l1 = self._lookups.take(request_id, len(blocks))
        if not taken:
            return None
        self._use(taken)
        job = self._emit(JobKind.LOAD, taken, blocks=np.asarray(blocks, dtype=np.int64))
        self._jobs[job.number].n_from_l1 = n_from_l1
        return job

    def take(self, request_id: str, n_blocks: int) -> list[Slot]:
        """Serve offered blocks in place, without a LOAD: they are held until `let_go`."""
        self._listeners.check_not_called_back()
        slots, n_from_l1 = self._lookups.take(request_id, n_blocks)
        self._use(slots)
        self._served(n_from_l1, len(slots) - n_from_l1)
        return slots

    def let_go(self, slots: Sequence[Slot]) -> None:
        """End what `take` began."""
        self._listeners.check_not_called_back()
        self._table.unref(slots)

    def finished(self, request_id: str) -> None:
        """The request has ended, or was aborted: what is held for it is let go, fetches go on."""
        self._listeners.check_not_called_back()
        self._lookups.finished(request_id)

    def refuse(self, request_id: str) -> None:
        """Offer nothing to this request any more: a load of it failed."""
        self._listeners.check_not_called_back()
        self._lookups.refuse(request_id)

    # -- saving

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The rows of the keys that have no slot, in whatever state."""
        return [row for row, key in enumerate(keys) if self._table.get(key) is None]

    def used(self, keys: Sequence[bytes]) -> None:
        """The engine has computed blocks of a prompt anew though L1 has them (behind a hole): a use as any other."""
        self._listeners.check_not_called_back()
        self._use([slot for key in keys if (slot := self._table.get(key)) is not None])

    def save(
        self,
        keys: Sequence[bytes],
        blocks: Sequence[int],
        *,
        parents: Sequence[bytes | None],
        costs: Sequence[float] | None = None,
    ) -> Job | None:
        """Save device blocks of keys that have no slot (see `missing`); gives the SAVE job.

        Where not all fit, the leading ones are saved: the later ones would be of no use without them.
        """
        room = min(len(keys), self._table.n_available)
        slots = self.reserve(keys[:room], parents=parents[:room], costs=costs)
        self.metrics.add("save_skipped_no_room", len(keys) - len(slots))
        if not slots:
            return None
        return self._emit(JobKind.SAVE, slots, blocks=np.asarray(blocks[: len(slots)], dtype=np.int64))

    def reserve(
        self,
        keys: Sequence[bytes],
        *,
        parents: Sequence[bytes | None],
        costs: Sequence[float] | None = None,
    ) -> list[Slot]:
        """Take slots that the caller fills: all, or an empty list. End it by `seal` or `give_up`."""
        self._listeners.check_not_called_back()
        if not keys:
            return []
        return self._table.allocate(keys, SlotState.WRITING, parents=parents, costs=costs)

    def seal(self, slots: Sequence[Slot]) -> Job:
        """The caller has filled reserved slots: have the agents seal them (a SAVE job without blocks)."""
        self._listeners.check_not_called_back()
        return self._emit(JobKind.SAVE, list(slots))

    def give_up(self, slots: Sequence[Slot]) -> None:
        """The caller will not fill reserved slots."""
        self._listeners.check_not_called_back()
        for slot in slots:
            if slot.state is not SlotState.ZOMBIE:
                self._table.make_zombie(slot)
        self._table.unref(slots)

    def forget(self, keys: Sequence[bytes]) -> int:
        """Drop keys from L1; how many were there."""
        self._listeners.check_not_called_back()
        slots = [slot for key in dict.fromkeys(keys) if (slot := self._table.get(key)) is not None]
        for slot in slots:
            self._lookups.on_lost(slot.key, Reason.NOT_THERE)
            self._table.make_zombie(slot)
        return len(slots)

    def reset(self) -> None:
        """Lose everything: the weights have changed. Jobs under way end without effect."""
        self._listeners.check_not_called_back()
        self._lookups.clear()
        self._table.clear()

    # -- what comes in

    def on_probe(self, answer: ProbeAnswer) -> None:
        """L2 has answered."""
        self._listeners.check_not_called_back()
        if answer.seconds is not None:
            self.metrics.observe("lookup", answer.seconds)
        self._lookups.on_probe(answer)

    def on_report(self, report: JobReport) -> bool:
        """A rank has done something; True once the job is terminal on every rank.

        Reports of unknown jobs, and those after a rank's terminal one, are ignored.
        """
        self._listeners.check_not_called_back()
        state = self._jobs.get(report.number)
        if state is None or state.terminal[report.rank]:
            return False
        state.status[report.rank] = report.status
        state.terminal[report.rank] = report.terminal
        done = bool(state.terminal.all())
        if state.job.kind is JobKind.FETCH and not state.settled:
            self._settle_fetch(state, final=done)
        if done:
            del self._jobs[report.number]
            self._finish(state)
        return done

    def on_pool(self, report: PoolReport) -> None:
        """A rank's pool has grown, or will not grow any more: a slot is used once it is there on every rank."""
        self._listeners.check_not_called_back()
        if not self.options.growing:
            return
        known = self._pools[report.rank]
        self._pools[report.rank] = replace(
            report, n_slots=max(known.n_slots, report.n_slots), growing=known.growing and report.growing
        )
        if report.failure and not known.failure:
            self.metrics.add("l1_growth_failures")
        self._table.grow(min(pool.n_slots for pool in self._pools))

    @property
    def growing(self) -> bool:
        """Whether slots may still be added."""
        return any(pool.growing for pool in self._pools)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            **self.metrics.snapshot(),
            "l1_blocks": len(self._table),
            "l1_capacity_blocks": self._table.capacity,
            "l1_ready_blocks": self._table.n_slots,
            "l1_free_blocks": self._table.n_free,
            "zombies": self._table.n_zombies,
            "jobs": len(self._jobs),
            "requests": len(self._lookups),
            "waiting_slots": self._lookups.n_waiting_slots,
        }

    # -- jobs

    def _emit(self, kind: JobKind, slots: list[Slot], *, timeout: float = 0.0, blocks: Int64s | None = None) -> Job:
        """Send a job to every rank. Each slot's reference, taken before, is the job's until it is terminal."""
        n, ranks = len(slots), self.options.ranks
        job = Job(
            kind,
            self._number(),
            pack_keys(slot.key for slot in slots),
            np.array([slot.number for slot in slots], dtype=np.int64),
            timeout,
            np.zeros(0, dtype=np.int64) if blocks is None else blocks,
        )
        self._jobs[job.number] = _JobState(
            job,
            slots,
            np.full((ranks, n), BlockStatus.PENDING, dtype=np.uint8),
            np.zeros(ranks, dtype=np.bool_),
            self._clock() + _DEADLINE_GRACE * timeout,
        )
        self._jobs_out.append(job)
        return job

    def _fetch(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.offloaded = True  # L2 has it
        self.metrics.add("l2_fetch_asked_blocks", len(slots))
        for first in range(0, len(slots), FETCH_BATCH):
            self._emit(JobKind.FETCH, slots[first : first + FETCH_BATCH], timeout=self.options.fetch_timeout_s)

    def _expire(self) -> None:
        """Settle fetches whose deadline has passed: what is not there on all ranks is given up."""
        now = self._clock()
        for state in self._jobs.values():
            if state.job.kind is JobKind.FETCH and not state.settled and now >= state.deadline:
                self._settle_fetch(state, final=True)

    def _settle_fetch(self, state: _JobState, *, final: bool) -> None:
        """Make READY what is there on every rank; with `final` the rest is lost, each block for one reason."""
        ok = (state.status == BlockStatus.OK).all(axis=0)
        for i, slot in enumerate(state.slots):
            if slot.state is not SlotState.FETCHING:
                continue
            if ok[i]:
                self._table.make_ready(slot)
                self.metrics.add("l2_fetched_blocks")
            elif final:
                self._lookups.on_lost(slot.key, failure_reason(state.status[:, i]))
                self._table.make_zombie(slot)
        state.settled = final

    def _finish(self, state: _JobState) -> None:
        """A job is terminal on every rank: its references end, after what follows from it has taken its own."""
        ok = (state.status == BlockStatus.OK).all(axis=0)
        n_ok = int(ok.sum())
        match state.job.kind:
            case JobKind.SAVE:
                self._commit(state.slots, ok)
            case JobKind.PUT:
                self.metrics.add("l2_put_blocks", n_ok)
                self.metrics.add("l2_put_failed_blocks", len(ok) - n_ok)
                for slot, stored in zip(state.slots, ok, strict=True):
                    self._offloads.ended(slot, stored=bool(stored))
            case JobKind.LOAD:
                self._served(int(ok[: state.n_from_l1].sum()), int(ok[state.n_from_l1 :].sum()))
                self.metrics.miss(Reason.LOAD_FAILED, len(ok) - n_ok)
            case JobKind.FETCH:
                pass  # settled before
        self._table.unref(state.slots)

    def _served(self, n_from_l1: int, n_from_l2: int) -> None:
        self.metrics.add("served_blocks", n_from_l1 + n_from_l2)
        self.metrics.add("l1_hit_blocks", n_from_l1)
        self.metrics.add("l2_hit_blocks", n_from_l2)

    def _commit(self, slots: list[Slot], ok: Bitmap) -> None:
        """What every rank has is READY, and offloaded from the very same slots where the policy picks it."""
        stored: list[Slot] = []
        for slot, whole in zip(reversed(slots), ok[::-1], strict=True):  # the tail of a prompt is its coldest part
            if slot.state is not SlotState.WRITING:
                continue  # dropped or reset meanwhile
            if whole:
                self._table.make_ready(slot)
                stored.append(slot)
            else:
                self._table.make_zombie(slot)
        self.metrics.add("saved_blocks", len(stored))
        self.metrics.add("save_failed_blocks", len(slots) - len(stored))
        self._offer(stored[::-1], Event.STORED)

    def _use(self, slots: Sequence[Slot]) -> None:
        """Note a use of a prompt's blocks, the tail first: of what is equally recent it goes first."""
        self._offer(self._table.touch(reversed(slots))[::-1], Event.HOT)

    def _offer(self, slots: Sequence[Slot], event: Event) -> None:
        if self.options.has_l2:
            self._offloads.offer(slots, event)

    def _on_evict(self, slots: Sequence[Slot]) -> None:
        if self.options.has_l2:
            self._offloads.lost(slots)

    def _put(self, slots: Sequence[Slot]) -> None:
        """Send slots to L2; they are held until that is terminal."""
        for first in range(0, len(slots), PUT_BATCH):
            batch = list(slots[first : first + PUT_BATCH])
            self._table.ref(batch)
            self._emit(JobKind.PUT, batch, timeout=self.options.put_timeout_s)

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number


def failure_reason(statuses: NDArray[np.uint8]) -> Reason:
    """Why a fetched block did not come, from what each rank says of it."""
    if (statuses == BlockStatus.CHECKSUM).any():
        return Reason.CHECKSUM
    if (statuses == BlockStatus.FAILED).any():
        return Reason.TIER_DOWN
    if (statuses == BlockStatus.PENDING).any():
        return Reason.NOT_YET
    if (statuses == BlockStatus.OK).any():
        return Reason.RANK_SHORTER
    return Reason.NOT_THERE
