"""What holds for `CacheIndex` whatever the engine, the ranks, the store and the clock do, in any order.

The machine keeps the bytes that each rank would have: a slot is written while a FETCH or SAVE of it is not
terminal or its caller fills it, and read while a LOAD or PUT is or somebody was promised it. Wrong bytes, or a
slot with two uses, would be wrong KV. It keeps an account of its own of what was looked up, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrdma.cache import (
    Answer,
    BlockStatus,
    CacheIndex,
    IndexOptions,
    Job,
    JobKind,
    JobReport,
    PoolReport,
    Probe,
    ProbeAnswer,
    Slot,
    SlotState,
)
from kvrdma.cache.requests import Phase
from kvrdma.cache.slots import SlotTable
from kvrdma.keys import unpack_keys
from kvrdma.policies import CacheListener, Event, OffloadPolicy, Removal, open_policy

pytestmark = pytest.mark.timeout(1800)  # with --thorough

OK, PENDING, FAILED = BlockStatus.OK, BlockStatus.PENDING, BlockStatus.FAILED
WRITES = {JobKind.FETCH, JobKind.SAVE}

# A binary tree of prompts, four blocks deep; a block's key is its path.
PROMPTS = ("aaaa", "aaab", "aaba", "abaa", "baaa", "baab", "a", "aa", "aaa", "ab", "ba")
REQUESTS = ("q", "r", "s", "t")


def keys_of(prompt: str) -> list[bytes]:
    return [prompt[: n + 1].encode().ljust(16, b".") for n in range(len(prompt))]


def ready_keys(table: SlotTable) -> set[bytes]:
    return {key for key, slot in table._slots.items() if slot.state is SlotState.READY}


class OffloadSome(OffloadPolicy):
    """Offloads at the events that it was told."""

    def __init__(self, events: set[Event]) -> None:
        self.events = events

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        return list(keys) if event in self.events else []


class Book(CacheListener):
    """Keeps a list of what is in L1, and vetoes, raises or calls back where it was told to."""

    def __init__(self, machine: IndexMachine, keep: set[str], how: str) -> None:
        self.machine = machine
        self.kept = {key for prompt in keep for key in keys_of(prompt)}
        self.how = how
        self.inside: set[bytes] = set()
        self.evicted: list[bytes] = []

    def on_insert(self, key: bytes) -> None:
        assert key not in self.inside
        self.inside.add(key)

    def before_evict(self, key: bytes) -> bool:
        assert key in self.inside
        if key not in self.kept:
            return True
        if self.how == "calls back":
            self.machine.index.reset()
        if self.how == "raises":
            raise RuntimeError("a veto as good as any")
        return False

    def on_removed(self, key: bytes, cause: Removal) -> None:
        self.inside.remove(key)
        if cause is Removal.EVICTED:
            self.evicted.append(key)


class CutGate:
    def __init__(self, n: int) -> None:
        self.n = n

    def cut(self, *, l1_blocks: int, l2_blocks: int) -> int:
        return min(self.n, l2_blocks)


class Progress:
    """What the ranks have done of a job."""

    def __init__(self, job: Job, slots: list[Slot], ranks: int, now: float) -> None:
        self.job = job
        self.slots = slots
        self.status = [[PENDING] * len(job) for _ in range(ranks)]
        self.terminal = [False] * ranks
        self.overdue_at = now + 1.25 * job.timeout
        self.sent = False


prompts = st.sampled_from(PROMPTS)
requests = st.sampled_from(REQUESTS)
picks = st.integers(0, 1000)


class IndexMachine(RuleBasedStateMachine):
    @initialize(
        ranks=st.integers(1, 4),
        capacity=st.integers(4, 12),
        share=st.sampled_from([0.25, 0.5, 1.0]),
        events=st.sets(st.sampled_from(list(Event))),
        cut=st.sampled_from([1, 100, 100]),
        batch=st.sampled_from([1, 3, 64]),
        growing=st.booleans(),
        policy=st.sampled_from(["lru", "fifo", "s3fifo", "s3fifo?small_ratio=0.5&threshold=1"]),
        ahead=st.sampled_from([0.1, 0.3, 1.0]),
        keep=st.none() | st.sets(prompts, max_size=2),
        how=st.sampled_from(["vetoes", "raises", "calls back"]),
    )
    def start(
        self,
        ranks: int,
        capacity: int,
        share: float,
        events: set[Event],
        cut: int,
        batch: int,
        growing: bool,
        policy: str,
        ahead: float,
        keep: set[str] | None,
        how: str,
    ) -> None:
        self.patches = ExitStack()
        for name in ("FETCH_BATCH", "PUT_BATCH"):
            self.patches.enter_context(mock.patch(f"kvrdma.cache.index.{name}", batch))
        self.now = 0.0
        self.ranks = ranks
        self.capacity = capacity
        self.share = share
        self.n_slots = [0 if growing else capacity] * ranks  # that each rank has said it has
        self.index = CacheIndex(
            capacity,
            open_policy(policy)(capacity),
            OffloadSome(events),
            IndexOptions(ranks=ranks, has_l2=True, waiting_share=share, growing=growing, ahead_share=ahead),
            gate=CutGate(cut),
            clock=lambda: self.now,
        )
        self.n_ahead = max(1, int(ahead * capacity))
        self.events = events
        self.book = None if keep is None else Book(self, keep, how)
        if self.book is not None:
            self.index.listen(self.book)
        self.offered = dict.fromkeys(REQUESTS, 0)
        self.prompts: dict[str, str] = {}  # of the requests that live
        self.asked: dict[str, tuple[int, int]] = {}  # lookups that have not ended: first, number of keys
        self.looked_up = 0  # blocks of those that have
        self.silent: set[int] = set()  # ranks that do not report
        self.probes: list[Probe] = []
        self.jobs: dict[int, Progress] = {}
        self.ended: list[Progress] = []
        self.taken: list[list[Slot]] = []
        self.reserved: list[list[Slot]] = []
        self.bytes_of: list[dict[int, bytes | None]] = [{} for _ in range(ranks)]
        self.was_ready: set[Slot] = set()
        self.dropped: set[Slot] = set()  # by forget or reset
        self.in_l2: set[Slot] = set()  # or on the way there
        if growing:
            for rank in range(ranks):
                self.grow(rank, 4)

    # -- the engine

    @rule(request=requests, prompt=prompts, first=st.integers(0, 2), ready_only=st.sampled_from([False] * 4 + [True]))
    def look_up(self, request: str, prompt: str, first: int, ready_only: bool) -> None:
        known = self.prompts.setdefault(request, prompt)
        if not prompt.startswith(known):  # a request's prompt may only grow
            prompt = known
        self.prompts[request] = prompt
        question = (min(first, len(prompt)), len(prompt))
        if self.asked.get(request, question) != question:
            self._answered(request)
        self.asked[request] = question
        offer = self.index.lookup(request, keys_of(prompt), question[0], ready_only=ready_only)
        self.offered[request] = offer.n_blocks
        assert offer.answer is Answer.OFFERED or not (ready_only or offer.n_blocks)
        self.probes += self.index.take_probes()

    @rule(request=requests, prompt=prompts, first=st.integers(0, 2))
    def look_up_until_answered(self, request: str, prompt: str, first: int) -> None:
        """Though no rank and no store says anything: a probe and a fetch have their deadlines."""
        for _ in range(4):
            self.look_up(request, prompt, first, ready_only=False)
            self.now += 7.0
        offer = self.index.lookup(request, keys_of(self.prompts[request]), self.asked[request][0])
        assert offer.answer is Answer.OFFERED

    @rule(prompt=prompts)
    def prefetch(self, prompt: str) -> None:
        offer = self.index.lookup("prefetch", keys_of(prompt), 0, counted=False)
        self.probes += self.index.take_probes()
        if offer.answer is Answer.OFFERED:
            self.index.finished("prefetch")

    @rule(request=requests, less=st.integers(0, 2))
    def allocate(self, request: str, less: int) -> None:
        n = max(0, self.offered[request] - less)
        job = self.index.allocated(request, range(n))
        assert (0 if job is None else len(job)) == n
        if job is not None:
            assert unpack_keys(job.keys) == self._wanted(request)[:n]
            assert job.blocks.tolist() == list(range(n))
        self._used(request)

    @rule(request=requests)
    def take(self, request: str) -> None:
        slots = self.index.take(request, self.offered[request])
        assert [slot.key for slot in slots] == self._wanted(request)[: self.offered[request]]
        self.taken.append(slots)
        self._used(request)

    @precondition(lambda self: self.taken)
    @rule(pick=picks)
    def let_go(self, pick: int) -> None:
        self.index.let_go(self.taken.pop(pick % len(self.taken)))

    @rule(request=requests)
    def finish(self, request: str) -> None:
        self.index.finished(request)
        self._answered(request)
        self.prompts.pop(request, None)
        self.offered[request] = 0

    @rule(request=requests)
    def refuse(self, request: str) -> None:
        self.index.refuse(request)

    @rule(prompt=prompts)
    def save(self, prompt: str) -> None:
        keys, parents = self._missing(prompt)
        self.index.save(keys, range(len(keys)), parents=parents)

    @rule(prompt=prompts)
    def reserve(self, prompt: str) -> None:
        keys, parents = self._missing(prompt)
        table = self.index._table
        room, evicted, before = table.n_available, table.n_evicted, ready_keys(table)
        dropped = self.index.metrics.counts["offload_dropped_blocks"]
        clean = {key for key in before if table._slots[key].offloaded}
        slots = self.index.reserve(keys, parents=parents)
        assert len(slots) in {0, len(keys)}
        vetoes = self.book is not None and self.book.kept
        assert vetoes or (len(slots) == len(keys)) == (len(keys) <= room)  # nobody waits for an offload
        gone = before - ready_keys(table)
        assert len(gone) == table.n_evicted - evicted
        lost = len(gone - clean) if Event.EVICTING in self.events else 0
        assert self.index.metrics.counts["offload_dropped_blocks"] - dropped == lost
        assert not vetoes or gone.isdisjoint(self.book.kept)
        if slots:
            self.reserved.append(slots)
            self._write(slots, None)

    @precondition(lambda self: self.reserved)
    @rule(pick=picks, seal=st.booleans())
    def end_reservation(self, pick: int, seal: bool) -> None:
        slots = self.reserved.pop(pick % len(self.reserved))
        if seal:
            self.index.seal(slots)
        else:
            self.index.give_up(slots)

    @rule(prompt=prompts)
    def save_and_see_it_done(self, prompt: str) -> None:
        self.save(prompt)
        self._finish_jobs(JobKind.SAVE)

    @rule(request=requests, prompt=prompts)
    def look_up_and_load(self, request: str, prompt: str) -> None:
        self.look_up(request, prompt, 0, ready_only=True)
        self.allocate(request, 0)

    @rule(request=requests, prompt=prompts, done=st.booleans())
    def look_up_and_fetch(self, request: str, prompt: str, done: bool) -> None:
        self.look_up(request, prompt, 0, ready_only=False)
        while self.probes:
            self.answer(0, [True] * 4, down=False)
        if done:
            self._finish_jobs(JobKind.FETCH)
            self.look_up(request, prompt, 0, ready_only=False)

    @rule(request=requests, prompt=prompts, others=prompts)
    def look_up_over_a_hole(self, request: str, prompt: str, others: str) -> None:
        """Room for what is fetched may be made only of what the lookup has no use for."""
        self.finish(request)
        self.save_and_see_it_done(prompt)
        self.save_and_see_it_done(others)
        self.forget(prompt[:1], True)
        self.look_up_and_fetch(request, prompt, False)

    @rule(prompt=prompts, really=st.sampled_from([False] * 3 + [True]))
    def forget(self, prompt: str, really: bool) -> None:
        if really:
            self.dropped.update(slot for key in keys_of(prompt) if (slot := self.index._table.get(key)))
            self.index.forget(keys_of(prompt))

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def reset(self, really: bool) -> None:
        if really:
            self.dropped.update(self.index._table._slots.values())
            self.index.reset()
            assert self.index.stats()["l1_blocks"] == 0
            for request in REQUESTS:
                self._answered(request)
                self.offered[request] = 0

    # -- the store, the ranks and the clock

    @precondition(lambda self: self.probes)
    @rule(
        pick=picks, present=st.lists(st.booleans(), min_size=4, max_size=4), down=st.sampled_from([False] * 4 + [True])
    )
    def answer(self, pick: int, present: list[bool], down: bool) -> None:
        probe = self.probes.pop(pick % len(self.probes))
        before = len(self.index._jobs)
        self.index.on_probe(ProbeAnswer(probe.number, np.array(present[: len(probe.keys)]), down, ()))
        if len(self.index._jobs) > before:
            assert self.index._lookups.n_waiting_slots <= self.share * min(self.n_slots)

    @precondition(lambda self: self.jobs)
    @rule(
        pick=picks,
        rank=st.integers(0, 3),
        status=st.lists(st.sampled_from(list(BlockStatus)), min_size=12, max_size=12),
        terminal=st.booleans(),
    )
    def report(self, pick: int, rank: int, status: list[BlockStatus], terminal: bool) -> None:
        self.take_jobs()
        self._report(list(self.jobs.values())[pick % len(self.jobs)], rank % self.ranks, status, terminal)

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def all_ranks_succeed(self, pick: int) -> None:
        self.take_jobs()
        progress = list(self.jobs.values())[pick % len(self.jobs)]
        for rank in range(self.ranks):
            self._report(progress, rank, [OK] * 12, True)

    @precondition(lambda self: self.jobs or self.ended)
    @rule(pick=picks, status=st.sampled_from([OK, FAILED]), terminal=st.booleans())
    def report_again(self, pick: int, status: BlockStatus, terminal: bool) -> None:
        """What comes after a rank's last word on a job says nothing."""
        progresses = [progress for progress in self.jobs.values() if any(progress.terminal)] or self.ended
        if progresses:
            progress = progresses[pick % len(progresses)]
            rank, statuses = progress.terminal.index(True), np.full(len(progress.job), status, dtype=np.uint8)
            assert self.index.on_report(JobReport(progress.job.number, rank, statuses, terminal)) is False

    @rule(rank=st.integers(0, 3))
    def report_of_an_unknown_job(self, rank: int) -> None:
        report = JobReport(1_000_000, rank % self.ranks, np.zeros(2, dtype=np.uint8), terminal=True)
        assert self.index.on_report(report) is False

    @rule(rank=st.integers(0, 3), lost=st.sampled_from([False, False, True]))
    def rank_falls_silent(self, rank: int, lost: bool) -> None:
        """It says nothing from now on. Where it was silent before it is declared lost, or is back."""
        rank %= self.ranks
        if rank not in self.silent:
            self.silent.add(rank)
            return
        self.silent.remove(rank)
        if lost:
            self.take_jobs()
            for progress in list(self.jobs.values()):
                self._report(progress, rank, [FAILED] * 12, True)

    @rule(rank=st.integers(0, 3), n=st.integers(0, 14), growing=st.booleans())
    def grow(self, rank: int, n: int, growing: bool = True) -> None:
        if self.index.options.growing:
            rank %= self.ranks
            self.n_slots[rank] = max(self.n_slots[rank], min(n, self.capacity))
            self.index.on_pool(PoolReport(rank, n, growing))

    @rule(seconds=st.sampled_from([0.1, 1.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take_jobs(self) -> None:
        """A step: each job goes out once, in the order in which they were made."""
        self.every_job_has_its_slots_to_itself()
        unsent = [progress for progress in self.jobs.values() if not progress.sent]
        assert self.index.has_output == bool(unsent)
        jobs = self.index.take_jobs()
        self.every_job_has_its_slots_to_itself()
        ahead = [progress for progress in self.jobs.values() if not progress.sent and progress not in unsent]
        assert all(progress.job.kind is JobKind.PUT for progress in ahead)
        unsent += ahead
        assert jobs == [progress.job for progress in unsent]
        for progress in unsent:
            assert len(progress.job.blocks) in {0, len(progress.job)}
            progress.sent = True
        for progress in self.jobs.values():
            if progress.job.kind is JobKind.FETCH and self.now >= progress.overdue_at:
                assert all(slot.state is not SlotState.FETCHING for slot in progress.slots)

    # -- what must hold

    @invariant()
    def every_job_has_its_slots_to_itself(self) -> None:
        """Each new job: nobody else writes its slots, and what it reads is what it is meant to be."""
        for number in sorted(self.index._jobs.keys() - self.jobs.keys()):
            job, slots = self.index._jobs[number].job, self.index._jobs[number].slots
            if job.kind in {JobKind.FETCH, JobKind.PUT}:
                assert self.in_l2.isdisjoint(slots)
                self.in_l2.update(slots)
            for other in self.jobs.values():
                if job.kind in WRITES:
                    assert not set(job.slots.tolist()) & set(other.job.slots.tolist())
            self.jobs[number] = Progress(job, slots, self.ranks, self.now)
            assert self.index.busy(job.kind)
            assert [(slot.number, slot.key) for slot in slots] == list(
                zip(job.slots.tolist(), unpack_keys(job.keys), strict=True)
            )
            if job.kind in WRITES:
                self._write(slots, None)
            else:
                self._read(slots)

    @invariant()
    def what_is_promised_is_there(self) -> None:
        for slots in self.taken:
            self._read(slots)
        for request in self.index._lookups._requests.values():
            self._read(request.held)
            wanted = request.keys[request.first : request.first + len(request.held)]
            assert [slot.key for slot in request.held] == wanted

    @invariant()
    def every_block_that_was_looked_up_has_one_end(self) -> None:
        self.every_job_has_its_slots_to_itself()  # it has the new jobs entered
        metrics = self.index.metrics
        assert metrics.counts["looked_up_blocks"] == self.looked_up
        loading = sum(len(progress.job) for progress in self.jobs.values() if progress.job.kind is JobKind.LOAD)
        assert self.looked_up == metrics.counts["served_blocks"] + sum(metrics.misses.values()) + loading

    @invariant()
    def what_is_ready_is_there_on_every_rank(self) -> None:
        table = self.index._table
        for key, slot in table._slots.items():
            assert slot.key == key
            assert (slot.state is SlotState.READY) == (key in table.policy)
            if slot.state is SlotState.READY:
                self.was_ready.add(slot)
                assert [bytes_of[slot.number] for bytes_of in self.bytes_of] == [key] * self.ranks
        assert len(table.policy) == sum(slot.state is SlotState.READY for slot in table._slots.values())

    @invariant()
    def references_and_slots_add_up(self) -> None:
        self.every_job_has_its_slots_to_itself()
        table, lookups = self.index._table, self.index._lookups
        asking = [slot for request in lookups._requests.values() for slot in request.held]
        asking += [slot for request in lookups._requests.values() for _, slot in request.waits_for.values()]
        references = Counter(asking)
        for state in self.index._jobs.values():
            references.update(state.slots)
        for slots in (*self.taken, *self.reserved):
            references.update(slots)
        live = set(references) | set(table._slots.values())
        assert len({slot.number for slot in live}) == len(live)
        assert all(slot.refs == references[slot] for slot in live)
        assert all(slot.number < min(self.n_slots) for slot in live)
        assert len(live) + table.n_free == min(self.n_slots)
        assert all(slot.offloaded == (slot in self.in_l2) for slot in live)
        assert table.n_zombies == sum(slot.state is SlotState.ZOMBIE for slot in live)
        assert table.n_available == table.n_free + sum(slot.state is SlotState.READY and not slot.refs for slot in live)
        assert lookups.n_waiting_slots == len(set(asking))
        assert len(self.index._jobs) == len(self.jobs)
        gone = {slot for slot in asking if slot.state is SlotState.ZOMBIE}
        assert gone & self.was_ready <= self.dropped  # what is held is never evicted

    @invariant()
    def what_goes_out_before_its_turn_is_bounded(self) -> None:
        going = {slot for state in self.index._jobs.values() for slot in state.slots if slot.going}
        assert len(going) == self.index._offloads._n_going <= self.n_ahead
        assert all(slot.offloaded and slot.refs for slot in going)

    @invariant()
    def the_listener_knows_what_is_there(self) -> None:
        if self.book is not None:
            assert self.book.inside == ready_keys(self.index._table)
            assert len(self.book.evicted) == self.index._table.n_evicted
            assert self.index.metrics.counts["l1_evicted_blocks"] == self.index._table.n_evicted
            errors = self.index.metrics.counts["listener_errors"]
            assert errors == (0 if self.book.how == "vetoes" else self.index.metrics.counts["eviction_vetoes"])

    def teardown(self) -> None:
        """Everything ends: what is held is let go, and ranks that are silent are lost."""
        if not hasattr(self, "index"):
            return
        self.patches.close()
        for slots in self.taken:
            self.index.let_go(slots)
        for slots in self.reserved:
            self.index.give_up(slots)
        self.taken, self.reserved = [], []
        for request in REQUESTS:
            self.finish(request)
        self.index.finished("prefetch")
        lost, self.silent = self.silent, set()
        self.take_jobs()
        while self.jobs:
            progress = next(iter(self.jobs.values()))
            for rank in range(self.ranks):
                self._report(progress, rank, [FAILED if rank in lost else OK] * 12, True)
            self.take_jobs()
        assert not self.index.busy()
        self.references_and_slots_add_up()
        self.every_block_that_was_looked_up_has_one_end()
        stats = self.index.stats()
        assert stats["jobs"] == stats["zombies"] == stats["requests"] == stats["waiting_slots"] == 0
        assert self.index._table.n_available == min(self.n_slots)
        assert not self.index._lookups._probing

    # -- inside

    def _missing(self, prompt: str) -> tuple[list[bytes], list[bytes | None]]:
        keys = keys_of(prompt)
        rows = self.index.missing(keys)
        return [keys[row] for row in rows], [keys[row - 1] if row else None for row in rows]

    def _wanted(self, request: str) -> list[bytes]:
        """The keys that the request's lookup is about."""
        first, n = self.asked.get(request, (0, 0))
        return keys_of(self.prompts.get(request, ""))[first:n]

    def _answered(self, request: str) -> None:
        first, n = self.asked.pop(request, (0, 0))
        self.looked_up += n - first

    def _used(self, request: str) -> None:
        """Blocks were taken: that ends the lookup if it was answered, with whatever number."""
        lookup = self.index._lookups._requests.get(request)
        if lookup is not None and lookup.phase is Phase.DONE:
            self._answered(request)
        self.offered[request] = 0

    def _write(self, slots: Sequence[Slot], key: bytes | None) -> None:
        for bytes_of in self.bytes_of:
            bytes_of.update((slot.number, key) for slot in slots)

    def _read(self, slots: Sequence[Slot]) -> None:
        for bytes_of in self.bytes_of:
            assert all(bytes_of[slot.number] == slot.key for slot in slots)

    def _finish_jobs(self, kind: JobKind) -> None:
        self.take_jobs()
        for progress in [p for p in self.jobs.values() if p.job.kind is kind]:
            for rank in range(self.ranks):
                self._report(progress, rank, [OK] * 12, True)
        self.every_job_has_its_slots_to_itself()

    def _report(self, progress: Progress, rank: int, drawn: Sequence[BlockStatus], terminal: bool) -> None:
        """What a rank once had it keeps, and a block that is still pending at the end has failed."""
        if progress.terminal[rank] or rank in self.silent:
            return
        assert progress.sent
        job, before = progress.job, progress.status[rank]
        status = [old if old is OK else new for old, new in zip(before, drawn, strict=False)]
        if terminal:
            status = [FAILED if s is PENDING else s for s in status]
        for key, slot, is_ok in zip(unpack_keys(job.keys), job.slots.tolist(), status, strict=True):
            if is_ok is OK and job.kind in WRITES:
                self.bytes_of[rank][slot] = key
            elif job.kind not in WRITES:
                assert self.bytes_of[rank][slot] == key  # still: it was read until now
        progress.status[rank], progress.terminal[rank] = status, terminal
        if all(progress.terminal):
            if job.kind is JobKind.PUT:
                failed = [any(s != OK for s in column) for column in zip(*progress.status, strict=True)]
                self.in_l2.difference_update(slot for slot, bad in zip(progress.slots, failed, strict=True) if bad)
            self.ended.append(self.jobs.pop(job.number))
        done = self.index.on_report(JobReport(job.number, rank, np.array(status, dtype=np.uint8), terminal))
        assert done == all(progress.terminal)


# A fault may need what no other test needs: several jobs, ranks and evictions in one run. So four times as many runs.
IndexMachine.TestCase.settings = settings(max_examples=4 * settings.default.max_examples, deadline=None)
TestIndex = IndexMachine.TestCase
