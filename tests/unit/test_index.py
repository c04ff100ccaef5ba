"""What `CacheIndex` promises, by examples: a clock that the test moves, and reports that it makes by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvrdma.cache import (
    Answer,
    BlockStatus,
    CacheIndex,
    IndexOptions,
    Job,
    JobKind,
    JobReport,
    Offer,
    ProbeAnswer,
    SlotState,
)
from kvrdma.cache.index import PUT_BATCH
from kvrdma.cache.slots import Slot
from kvrdma.errors import ConfigError, ReentryError
from kvrdma.keys import unpack_keys
from kvrdma.metrics import Reason
from kvrdma.policies import CacheListener, Event, OffloadPolicy, Removal
from kvrdma.policies.lru import LruPolicy
from kvrdma.policies.offload import OffloadAll, OffloadCold, OffloadHot

OK, PENDING, MISSING = BlockStatus.OK, BlockStatus.PENDING, BlockStatus.MISSING
CHECKSUM, DECLINED, FAILED = BlockStatus.CHECKSUM, BlockStatus.DECLINED, BlockStatus.FAILED
STILL_PENDING = Offer(Answer.PENDING, 0)


def key(name: str) -> bytes:
    return name.encode().ljust(16, b".")


def chain(names: str) -> list[bytes]:
    """One key a letter."""
    return [key(name) for name in names]


class OffloadNothing(OffloadPolicy):
    name = "nothing"

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        return []


class OffloadAt(OffloadPolicy):
    """Offloads everything at one event."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        return list(keys) if event is self.event else []


class CutGate:
    """Finds only the first `n` blocks worth fetching."""

    def __init__(self, n: int) -> None:
        self.n = n

    def cut(self, *, l1_blocks: int, l2_blocks: int) -> int:
        return min(self.n, l2_blocks)


class World:
    """An index, and the ranks, the store and the time around it."""

    def __init__(
        self,
        capacity: int = 8,
        *,
        ranks: int = 1,
        l2: bool = True,
        offload: OffloadPolicy | None = None,
        gate: CutGate | None = None,
        waiting_share: float = 1.0,
        ahead_share: float = 0.05,
    ) -> None:
        self.now = 0.0
        self.index = CacheIndex(
            capacity,
            LruPolicy(max(1, capacity)),
            OffloadNothing() if offload is None else offload,
            IndexOptions(ranks=ranks, has_l2=l2, waiting_share=waiting_share, ahead_share=ahead_share),
            gate=gate,
            clock=lambda: self.now,
        )
        self.ranks = ranks

    # -- the engine

    def lookup(self, request: str, names: str, first: int = 0, **options: bool) -> Offer:
        return self.index.lookup(request, chain(names), first, **options)

    def offered(self, request: str, names: str, first: int = 0) -> int:
        """A lookup that must be answered now."""
        offer = self.lookup(request, names, first)
        assert offer.answer is Answer.OFFERED
        return offer.n_blocks

    def load(self, request: str, n: int) -> Job:
        job = self.index.allocated(request, range(100, 100 + n))
        assert job is not None
        assert [j.number for j in self.index.take_jobs()] == [job.number]
        return job

    def load_and(self, request: str, kind: JobKind) -> Job:
        """Load all that was offered; gives the one job of a kind that follows from it."""
        load = self.index.allocated(request, range(self.index._lookups.n_waiting_slots))
        assert load is not None
        (job,) = (job for job in self.index.take_jobs() if job.kind is kind)
        self.report(load, OK)
        return job

    def end_puts(self, status: BlockStatus = OK) -> None:
        """Every put under way ends, and so do those that follow from it."""
        while self.index.busy(JobKind.PUT):
            self.index.take_jobs()
            for state in list(self.index._jobs.values()):
                if state.job.kind is JobKind.PUT:
                    self.report_all(state.job, status)

    def save(self, names: str) -> None:
        """Blocks that are READY, saved by every rank; nothing else is left of it."""
        job = self.begin_save(names)
        assert len(job) == len(names)
        self.report_all(job, OK)
        self.index.take_jobs()

    def begin_save(self, names: str) -> Job:
        keys = chain(names)
        parents = [None, *keys[:-1]]
        job = self.index.save(keys, range(len(keys)), parents=parents)
        assert job is not None
        return job

    # -- the store

    def probe(self, present: str, *, down: bool = False, differs: tuple[str, ...] = ()) -> None:
        """The store answers the one question that is open."""
        (probe,) = self.index.take_probes()
        there = np.array([k in chain(present) for k in unpack_keys(probe.keys)], dtype=np.bool_)
        self.index.on_probe(ProbeAnswer(probe.number, there, down, differs))

    def fetch(self, request: str, names: str, first: int = 0, *, present: str | None = None) -> Job:
        """A lookup until the FETCH job that follows from it."""
        assert self.lookup(request, names, first) == STILL_PENDING
        self.probe(names if present is None else present)
        (job,) = self.index.take_jobs()
        assert job.kind is JobKind.FETCH
        return job

    # -- the ranks

    def report(self, job: Job, *status: BlockStatus, rank: int = 0, terminal: bool = True) -> bool:
        """One status for all blocks, or one for each."""
        column = np.array(status if len(status) > 1 else [*status] * len(job), dtype=np.uint8)
        assert len(column) == len(job)
        return self.index.on_report(JobReport(job.number, rank, column, terminal))

    def report_all(self, job: Job, *status: BlockStatus) -> None:
        for rank in range(self.ranks):
            self.report(job, *status, rank=rank)

    # -- what must hold

    def slot(self, name: str) -> Slot | None:
        return self.index._table.get(key(name))

    def state(self, name: str) -> SlotState | None:
        slot = self.slot(name)
        return None if slot is None else slot.state

    @property
    def n_ready(self) -> int:
        return len(self.index._table.policy)

    def misses(self) -> dict[Reason, int]:
        return {reason: n for reason, n in self.index.metrics.misses.items() if n}

    def count(self, name: str) -> int:
        return self.index.metrics.counts[name]

    def check_ended(self, *requests: str) -> None:
        """Nothing is held once these have ended, and every block that was looked up was counted once."""
        for request in requests:
            self.index.finished(request)
        stats = self.index.stats()
        assert stats["jobs"] == stats["requests"] == stats["waiting_slots"] == stats["zombies"] == 0
        assert stats["l1_free_blocks"] + stats["l1_blocks"] == stats["l1_capacity_blocks"]
        assert self.index._table.n_available == stats["l1_capacity_blocks"]
        assert self.count("looked_up_blocks") == self.count("served_blocks") + sum(self.misses().values())
        assert self.count("served_blocks") == self.count("l1_hit_blocks") + self.count("l2_hit_blocks")


# -- L1 only


def test_l1_alone_offers_the_leading_run_at_once() -> None:
    world = World(l2=False)
    world.save("ab")
    assert world.offered("r", "abc") == 2
    assert world.index.take_probes() == []
    job = world.load("r", 2)
    assert job.kind is JobKind.LOAD
    assert unpack_keys(job.keys) == chain("ab")
    assert job.slots.tolist() == [world.slot("a").number, world.slot("b").number]
    assert job.blocks.tolist() == [100, 101]
    assert world.report(job, OK) is True
    assert world.misses() == {Reason.NOT_THERE: 1}
    world.check_ended("r")


def test_first_counts_the_blocks_that_the_engine_has_itself() -> None:
    world = World(l2=False)
    world.save("bc")
    assert world.offered("r", "abcd", first=1) == 2
    world.index.finished("r")
    assert world.count("looked_up_blocks") == 3
    assert world.misses() == {Reason.UNUSED: 2, Reason.NOT_THERE: 1}
    world.check_ended()


def test_nothing_to_look_up_is_an_offer_of_nothing() -> None:
    world = World()
    assert world.offered("r", "ab", first=2) == 0
    assert world.index.allocated("r", []) is None
    world.check_ended("r")
    assert world.count("looked_up_blocks") == 0


def test_what_l1_has_wholly_is_offered_without_asking_l2() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    assert world.index.take_probes() == []
    world.check_ended("r")


def test_a_cache_without_room_for_a_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="l1_bytes"):
        World(0)


def test_a_hole_ends_the_run() -> None:
    world = World(l2=False)
    world.save("abd")
    assert world.offered("r", "abcde") == 2
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 2, Reason.NOT_THERE: 2, Reason.BEHIND_HOLE: 1}
    world.check_ended()


def test_lookup_is_idempotent() -> None:
    world = World()
    world.save("a")
    for _ in range(3):
        assert world.lookup("r", "abc") == STILL_PENDING
    world.probe("")
    for _ in range(3):
        assert world.offered("r", "abc") == 1
    assert world.index.take_probes() == []
    assert world.count("looked_up_blocks") == 0
    world.check_ended("r")
    assert world.count("looked_up_blocks") == 3


# -- asking L2


def test_pending_while_l2_is_asked_and_only_about_what_l1_has_not() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "abc") == STILL_PENDING
    (probe,) = world.index.take_probes()
    assert unpack_keys(probe.keys) == chain("bc")
    assert world.lookup("r", "abc") == STILL_PENDING
    assert world.index.take_probes() == []
    world.index.on_probe(ProbeAnswer(probe.number, np.zeros(2, dtype=np.bool_), False, (), seconds=0.25))
    assert world.offered("r", "abc") == 1
    assert world.index.stats()["seconds"]["lookup"]["sum"] == 0.25
    world.check_ended("r")


def test_a_probe_that_is_not_answered_in_time_is_a_miss() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "ab") == STILL_PENDING
    world.now += 10
    assert world.offered("r", "ab") == 1
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 1, Reason.NOT_YET: 1}
    world.check_ended()


def test_a_late_answer_changes_nothing() -> None:
    world = World()
    assert world.lookup("r", "ab") == STILL_PENDING
    (probe,) = world.index.take_probes()
    world.now += 10
    assert world.offered("r", "ab") == 0
    world.index.on_probe(ProbeAnswer(probe.number, np.ones(2, dtype=np.bool_), down=False, differs=()))
    assert world.offered("r", "ab") == 0
    assert world.index.take_jobs() == []
    world.check_ended("r")


def test_an_answer_for_a_request_that_has_ended_changes_nothing() -> None:
    world = World()
    assert world.lookup("r", "ab") == STILL_PENDING
    (probe,) = world.index.take_probes()
    world.index.finished("r")
    world.index.on_probe(ProbeAnswer(probe.number, np.ones(2, dtype=np.bool_), down=False, differs=()))
    assert world.index.take_jobs() == []
    world.check_ended()


def test_l2_down_is_a_miss_and_what_l1_has_is_served() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "abc") == STILL_PENDING
    world.probe("", down=True)
    assert world.offered("r", "abc") == 1
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 1, Reason.TIER_DOWN: 2}
    world.check_ended()


def test_ready_only_neither_asks_nor_waits() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "ab", ready_only=True) == Offer(Answer.OFFERED, 1)
    assert world.index.take_probes() == []
    job = world.fetch("s", "abc")
    assert world.lookup("s", "abc", ready_only=True) == Offer(Answer.OFFERED, 1)
    world.report(job, OK)
    world.check_ended("r", "s")


def test_what_is_not_counted_is_left_out_of_the_account() -> None:
    world = World()
    assert world.lookup("prefetch", "ab", counted=False) == STILL_PENDING
    world.probe("a")
    (job,) = world.index.take_jobs()
    world.report(job, OK)
    assert world.lookup("prefetch", "ab", counted=False) == Offer(Answer.OFFERED, 1)
    world.check_ended("prefetch")
    assert world.count("looked_up_blocks") == 0
    assert world.misses() == {}
    assert world.state("a") is SlotState.READY


# -- fetch before promise


def test_what_l2_has_is_fetched_before_it_is_promised() -> None:
    world = World()
    world.save("a")
    job = world.fetch("r", "abc")
    assert unpack_keys(job.keys) == chain("bc")
    assert len(job.blocks) == 0
    assert world.state("b") is SlotState.FETCHING
    assert world.lookup("r", "abc") == STILL_PENDING
    world.report(job, OK)
    assert world.offered("r", "abc") == 3
    load = world.load("r", 3)
    assert load.slots.tolist()[1:] == job.slots.tolist()
    world.report(load, OK)
    world.check_ended("r")
    assert world.count("served_blocks") == 3
    assert (world.count("l1_hit_blocks"), world.count("l2_hit_blocks")) == (1, 2)
    assert world.misses() == {}


@pytest.mark.parametrize(
    ("status", "reason"),
    [(MISSING, Reason.NOT_THERE), (CHECKSUM, Reason.CHECKSUM), (FAILED, Reason.TIER_DOWN)],
)
def test_a_partial_fetch_shortens_the_offer(status: BlockStatus, reason: Reason) -> None:
    world = World()
    job = world.fetch("r", "abc")
    world.report(job, OK, status, OK)
    assert world.offered("r", "abc") == 1
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 1, reason: 1, Reason.BEHIND_HOLE: 1}
    assert world.state("b") is None
    assert world.state("c") is SlotState.READY
    world.check_ended()


def test_a_fetch_of_which_nothing_comes_offers_nothing() -> None:
    world = World()
    job = world.fetch("r", "ab")
    world.report(job, FAILED)
    assert world.offered("r", "ab") == 0
    assert world.index.allocated("r", []) is None
    assert world.misses() == {Reason.TIER_DOWN: 2}
    world.check_ended("r")


def test_a_hole_in_l2_ends_what_is_fetched() -> None:
    world = World()
    job = world.fetch("r", "abcd", present="abd")
    assert unpack_keys(job.keys) == chain("ab")
    world.report(job, OK)
    assert world.offered("r", "abcd") == 2
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 2, Reason.NOT_THERE: 1, Reason.BEHIND_HOLE: 1}
    world.check_ended()


def test_ready_blocks_behind_a_hole_survive_the_fetch_that_fills_it() -> None:
    world = World(4)
    world.save("bc")  # the least recent ones: any eviction would begin with them
    world.save("xy")
    job = world.fetch("r", "abc", present="a")
    assert unpack_keys(job.keys) == chain("a")
    assert world.state("y") is None  # of a prompt the tail goes first
    world.report(job, OK)
    assert world.offered("r", "abc") == 3
    world.check_ended("r")


def test_two_holes_are_filled_by_one_fetch() -> None:
    world = World()
    world.save("bd")
    job = world.fetch("r", "abcd")
    assert unpack_keys(job.keys) == chain("ac")
    world.report(job, OK)
    assert world.offered("r", "abcd") == 4
    world.check_ended("r")


def test_a_prefix_that_another_request_fetches_is_waited_for_and_not_fetched_twice() -> None:
    world = World()
    first = world.fetch("r", "ab")
    second = world.fetch("s", "abc")
    assert unpack_keys(second.keys) == chain("c")
    world.report(second, OK)
    assert world.lookup("s", "abc") == STILL_PENDING
    world.report(first, OK)
    assert world.offered("r", "ab") == 2
    assert world.offered("s", "abc") == 3
    world.check_ended("r", "s")


def test_a_fetch_is_not_waited_for_behind_a_block_that_will_not_come() -> None:
    world = World(gate=CutGate(1))
    other = world.fetch("r", "b")
    world.index._lookups._gate = CutGate(0)
    assert world.lookup("s", "ab") == STILL_PENDING
    world.probe("a")
    assert world.offered("s", "ab") == 0
    world.index.finished("s")
    assert world.misses() == {Reason.GATE: 1, Reason.NOT_YET: 1}
    world.report(other, OK)
    world.check_ended("r")


def test_a_fetch_is_not_waited_for_behind_a_block_that_was_lost() -> None:
    world = World()
    slow = world.fetch("r", "b")
    quick = world.fetch("s", "ab", present="a")
    world.report(quick, MISSING)
    assert world.offered("s", "ab") == 0
    world.report(slow, OK)
    world.check_ended("r", "s")


def test_blocks_that_came_before_the_rest_can_be_used_by_others() -> None:
    world = World()
    job = world.fetch("r", "ab")
    assert world.report(job, OK, PENDING, terminal=False) is False
    assert world.lookup("r", "ab") == STILL_PENDING
    assert world.offered("s", "a") == 1
    assert world.report(job, OK, OK) is True
    assert world.offered("r", "ab") == 2
    world.check_ended("r", "s")


def test_a_block_that_is_being_saved_is_not_fetched_and_ends_the_run() -> None:
    world = World()
    save = world.begin_save("b")
    world.index.take_jobs()
    job = world.fetch("r", "abc")
    assert unpack_keys(job.keys) == chain("a")
    world.report(job, OK)
    assert world.offered("r", "abc") == 1
    world.report(save, OK)
    world.check_ended("r")
    assert world.misses() == {Reason.UNUSED: 1, Reason.NOT_YET: 1, Reason.BEHIND_HOLE: 1}


def test_what_is_fetched_is_not_put_again() -> None:
    world = World(offload=OffloadAt(Event.HOT))
    job = world.fetch("r", "a")
    world.report(job, OK)
    assert world.offered("r", "a") == 1
    world.report(world.load("r", 1), OK)
    assert world.index.take_jobs() == []
    world.check_ended("r")


def test_the_gate_decides_how_much_is_fetched() -> None:
    world = World(gate=CutGate(1))
    world.save("a")
    job = world.fetch("r", "abc")
    assert unpack_keys(job.keys) == chain("b")
    world.report(job, OK)
    assert world.offered("r", "abc") == 2
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 2, Reason.GATE: 1}
    world.check_ended()


# -- deadlines and zombies


def test_a_rank_that_does_not_report_costs_only_what_it_has_not_reported() -> None:
    world = World(ranks=2)
    job = world.fetch("r", "abc")
    assert world.report(job, OK, OK, OK, rank=0) is False
    assert world.report(job, OK, PENDING, PENDING, rank=1, terminal=False) is False
    assert world.lookup("r", "abc") == STILL_PENDING
    world.now += 100
    assert world.offered("r", "abc") == 1
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 1, Reason.NOT_YET: 2}
    world.report(job, OK, rank=1)
    world.check_ended()


def test_a_slot_of_a_lost_block_is_a_zombie_until_every_rank_is_done_with_it() -> None:
    world = World(2, ranks=2)
    job = world.fetch("r", "ab")
    world.report(job, OK, rank=0)
    world.now += 100
    assert world.offered("r", "ab") == 0
    world.index.finished("r")
    assert world.index.stats()["zombies"] == 2
    assert world.index._table.n_available == 0
    assert world.state("a") is None
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    assert world.index.busy(JobKind.FETCH)
    assert world.report(job, OK, rank=1) is True
    assert world.index.stats()["zombies"] == 0
    assert world.state("a") is None  # too late: it was promised to nobody
    world.save("xy")
    world.check_ended()


def test_a_zombie_slot_is_not_given_to_a_second_fetch_of_the_same_block() -> None:
    world = World(4)
    first = world.fetch("r", "a")
    world.now += 100
    assert world.offered("r", "a") == 0
    second = world.fetch("s", "a")
    assert second.slots.tolist() != first.slots.tolist()
    world.report(second, OK)
    assert world.offered("s", "a") == 1
    world.report(first, OK)
    assert world.slot("a").number == second.slots[0]
    world.check_ended("r", "s")


def test_take_jobs_settles_what_is_overdue() -> None:
    world = World()
    job = world.fetch("r", "a")
    world.now += 100
    assert world.index.take_jobs() == []
    assert world.state("a") is None
    world.report(job, OK)
    world.check_ended("r")


def test_the_shortest_rank_decides() -> None:
    world = World(ranks=2)
    job = world.fetch("r", "abc")
    world.report(job, OK, OK, MISSING, rank=0)
    assert world.lookup("r", "abc") == STILL_PENDING
    world.report(job, OK, MISSING, MISSING, rank=1)
    assert world.offered("r", "abc") == 1
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 1, Reason.RANK_SHORTER: 1, Reason.NOT_THERE: 1}
    world.check_ended()


def test_reports_after_the_last_and_of_unknown_jobs_are_ignored() -> None:
    world = World(ranks=2)
    job = world.begin_save("a")
    assert world.report(job, OK, rank=0) is False
    assert world.report(job, FAILED, rank=0) is False
    assert world.report(job, OK, rank=1) is True
    assert world.state("a") is SlotState.READY
    assert world.report(job, FAILED, rank=1) is False
    assert world.index.on_report(JobReport(10**6, 0, np.zeros(1, dtype=np.uint8), terminal=True)) is False
    assert world.state("a") is SlotState.READY
    world.check_ended()


# -- the end of a request, at any time


def test_abort_while_l2_is_asked() -> None:
    world = World()
    world.save("ab")
    assert world.lookup("r", "abc") == STILL_PENDING
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 2, Reason.NOT_YET: 1}
    world.check_ended()


def test_abort_before_the_question_was_taken() -> None:
    world = World()
    assert world.lookup("r", "a") == STILL_PENDING
    world.index.finished("r")
    for probe in world.index.take_probes():
        world.index.on_probe(ProbeAnswer(probe.number, np.ones(1, dtype=np.bool_), down=False, differs=()))
    assert world.index.take_jobs() == []
    world.check_ended()


def test_a_fetch_goes_on_when_its_first_request_is_aborted() -> None:
    world = World()
    job = world.fetch("r", "ab")
    assert world.lookup("s", "ab") == STILL_PENDING
    world.probe("ab")
    world.index.finished("r")
    assert world.misses() == {Reason.NOT_YET: 2}
    world.report(job, OK)
    assert world.offered("s", "ab") == 2
    world.check_ended("s")


def test_a_fetch_nobody_waits_for_any_more_still_fills_the_cache() -> None:
    world = World()
    job = world.fetch("r", "ab")
    world.index.finished("r")
    assert world.index._table.n_available == 6
    world.report(job, OK)
    assert world.offered("s", "ab") == 2
    world.check_ended("s")


def test_abort_between_the_arrival_and_the_next_lookup() -> None:
    world = World()
    job = world.fetch("r", "ab")
    world.report(job, OK)
    world.index.finished("r")
    assert world.misses() == {Reason.UNUSED: 2}
    world.check_ended()


def test_abort_after_the_offer() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    assert world.index._table.n_available == 6
    world.index.finished("r")
    assert world.index._table.n_available == 8
    assert world.misses() == {Reason.UNUSED: 2}
    world.check_ended()


def test_abort_during_the_load() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    job = world.load("r", 2)
    world.index.finished("r")
    assert world.index._table.n_available == 6  # the copy still reads from the slots
    world.report(job, OK)
    world.check_ended()
    assert world.count("served_blocks") == 2


def test_ending_what_never_began_or_ended_already_is_nothing() -> None:
    world = World()
    world.index.finished("nobody")
    world.index.refuse("nobody")
    assert world.index.allocated("nobody", []) is None
    world.save("a")
    assert world.offered("r", "a") == 1
    world.index.finished("r")
    world.index.finished("r")
    assert world.count("looked_up_blocks") == 1
    world.check_ended()


# -- from the offer to the load


def test_what_is_offered_is_held_until_the_load_is_terminal_on_every_rank() -> None:
    world = World(2, ranks=2)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    job = world.load("r", 2)
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    world.report(job, OK, rank=1)
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    world.report(job, OK, rank=0)
    world.save("x")
    world.check_ended("r")


def test_two_requests_hold_one_block_until_both_are_done() -> None:
    world = World(1, l2=False)
    world.save("a")
    assert world.offered("r", "a") == 1
    assert world.offered("s", "a") == 1
    world.index.finished("r")
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    job = world.load("s", 1)
    world.report(job, OK)
    world.save("x")
    world.check_ended("s")


def test_fewer_blocks_than_were_offered_can_be_taken() -> None:
    world = World()
    world.save("abc")
    assert world.offered("r", "abc") == 3
    job = world.load("r", 1)
    assert unpack_keys(job.keys) == chain("a")
    assert world.index._table.n_available == 7
    world.report(job, OK)
    assert world.misses() == {Reason.UNUSED: 2}
    world.check_ended("r")


def test_no_block_can_be_taken() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    assert world.index.allocated("r", []) is None
    assert world.index._table.n_available == 8
    assert world.misses() == {Reason.UNUSED: 2}
    world.check_ended("r")


def test_more_blocks_than_were_offered_cannot_be_taken() -> None:
    world = World()
    world.save("a")
    assert world.offered("r", "a") == 1
    with pytest.raises(AssertionError, match="1 were offered"):
        world.index.allocated("r", [1, 2])
    world.check_ended("r")


def test_nothing_can_be_taken_before_the_offer() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "ab") == STILL_PENDING
    assert world.index.allocated("r", [1]) is None
    world.check_ended("r")


def test_a_lookup_after_the_allocation_begins_anew() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    world.report(world.load("r", 2), OK)
    world.index.forget(chain("b"))  # the request is preempted, and meanwhile this happens
    assert world.lookup("r", "ab") == STILL_PENDING
    world.probe("")
    assert world.offered("r", "ab") == 1
    world.report(world.load("r", 1), OK)
    world.check_ended("r")
    assert world.count("lookups") == 2
    assert world.count("looked_up_blocks") == 4
    assert world.count("served_blocks") == 3


def test_a_lookup_of_something_else_by_the_same_request_begins_anew() -> None:
    world = World(l2=False)
    world.save("abc")
    assert world.offered("r", "abc") == 3
    assert world.offered("r", "abc", first=1) == 2
    assert world.index.stats()["waiting_slots"] == 2
    world.check_ended("r")
    assert world.count("looked_up_blocks") == 5


def test_blocks_can_be_served_in_place() -> None:
    world = World(2)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    slots = world.index.take("r", 2)
    world.index.finished("r")
    assert [slot.key for slot in slots] == chain("ab")
    assert world.index._table.n_available == 0
    assert world.count("served_blocks") == 2
    world.index.let_go(slots)
    world.check_ended()


def test_a_failed_load_is_counted_and_nothing_is_offered_to_that_request_again() -> None:
    world = World()
    world.save("ab")
    assert world.offered("r", "ab") == 2
    job = world.load("r", 2)
    world.report(job, OK, FAILED)
    world.index.refuse("r")
    assert world.offered("r", "ab") == 0
    assert world.offered("s", "ab") == 2
    world.check_ended("r", "s")
    assert world.count("served_blocks") == 1
    assert world.misses() == {Reason.LOAD_FAILED: 3, Reason.UNUSED: 2}


def test_refused_while_l2_is_asked() -> None:
    world = World()
    assert world.lookup("r", "ab") == STILL_PENDING
    world.index.refuse("r")
    world.probe("ab")
    assert world.index.take_jobs() == []
    assert world.offered("r", "ab") == 0
    assert world.index.allocated("r", []) is None
    assert world.misses() == {Reason.LOAD_FAILED: 2}
    world.check_ended("r")


def test_refused_while_blocks_are_on_their_way() -> None:
    world = World()
    world.save("a")
    job = world.fetch("r", "ab")
    world.index.refuse("r")
    world.report(job, OK)
    assert world.offered("r", "ab") == 0
    assert world.index._table.n_available == 8
    world.index.finished("r")
    assert world.misses() == {Reason.LOAD_FAILED: 2}
    world.check_ended()


# -- what waiting requests may hold


def test_waiting_requests_fetch_no_more_than_their_share() -> None:
    world = World(8, waiting_share=0.5)
    first = world.fetch("r", "abc")
    second = world.fetch("s", "xyz")
    assert unpack_keys(second.keys) == chain("x")
    world.report(first, OK)
    world.report(second, OK)
    assert world.offered("s", "xyz") == 1
    assert world.lookup("t", "uvw") == STILL_PENDING
    world.probe("uvw")
    assert world.offered("t", "uvw") == 0  # r and s still hold their share
    world.index.finished("t")
    assert world.misses() == {Reason.NO_ROOM: 3}
    assert world.offered("r", "abc") == 3
    world.report(world.load("r", 3), OK)
    third = world.fetch("t", "uvw")
    assert len(third) == 3
    world.report(third, OK)
    world.check_ended("r", "s", "t")


def test_beyond_their_share_requests_are_still_offered_what_is_ready() -> None:
    world = World(4, waiting_share=0.25)
    world.save("abc")
    assert world.offered("r", "abc") == 3
    assert world.lookup("s", "abcd") == STILL_PENDING
    world.probe("d")
    assert world.offered("s", "abcd") == 3
    world.check_ended("r", "s")


def test_a_slot_that_several_requests_hold_counts_once_against_their_share() -> None:
    world = World(8, waiting_share=0.5)
    world.save("ab")
    for request in "pqr":
        assert world.offered(request, "ab") == 2
    assert world.index.stats()["waiting_slots"] == 2
    job = world.fetch("s", "abc")
    assert unpack_keys(job.keys) == chain("c")
    world.report(job, OK)
    world.check_ended(*"pqrs")


def test_a_fetch_without_room_is_a_miss() -> None:
    world = World(2)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    assert world.lookup("s", "xy") == STILL_PENDING
    world.probe("xy")
    assert world.offered("s", "xy") == 0
    world.index.finished("s")
    assert world.misses() == {Reason.NO_ROOM: 2}
    world.check_ended("r")


# -- saving


def test_a_save_is_found_once_every_rank_has_it() -> None:
    world = World(ranks=2)
    job = world.begin_save("ab")
    assert job.kind is JobKind.SAVE
    assert job.blocks.tolist() == [0, 1]
    assert world.index.missing(chain("abc")) == [2]
    world.report(job, OK, rank=0)
    assert world.lookup("r", "ab", ready_only=True) == Offer(Answer.OFFERED, 0)
    world.report(job, OK, rank=1)
    assert world.lookup("s", "ab", ready_only=True) == Offer(Answer.OFFERED, 2)
    world.check_ended("r", "s")


def test_a_save_that_one_rank_has_not_is_not_kept() -> None:
    world = World(ranks=2)
    job = world.begin_save("ab")
    world.report(job, OK, rank=0)
    world.report(job, OK, FAILED, rank=1)
    assert world.state("a") is SlotState.READY
    assert world.state("b") is None
    assert world.count("saved_blocks") == 1
    assert world.count("save_failed_blocks") == 1
    world.check_ended()


def test_a_save_is_trimmed_to_the_room_that_there_is() -> None:
    world = World(4)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    job = world.begin_save("wxyz")
    assert unpack_keys(job.keys) == chain("wx")
    assert job.blocks.tolist() == [0, 1]
    assert world.count("save_skipped_no_room") == 2
    assert world.index.save(chain("z"), [9], parents=[None]) is None
    assert world.count("save_skipped_no_room") == 3
    world.report(job, OK)
    world.check_ended("r")


def test_a_save_evicts_the_least_recent_blocks() -> None:
    world = World(3)
    world.save("abc")
    assert world.offered("r", "a") == 1
    world.report(world.load("r", 1), OK)
    world.save("xy")
    assert [world.state(name) for name in "abcxy"] == [SlotState.READY, None, None, SlotState.READY, SlotState.READY]
    assert world.count("l1_evicted_blocks") == 2
    world.check_ended("r")


def test_reserved_slots_are_sealed_or_given_up() -> None:
    world = World(2)
    slots = world.index.reserve(chain("ab"), parents=[None, key("a")])
    assert [slot.state for slot in slots] == [SlotState.WRITING] * 2
    assert world.index.reserve(chain("c"), parents=[None]) == []
    world.index.give_up(slots)
    assert world.index._table.n_free == 2
    slots = world.index.reserve(chain("ab"), parents=[None, key("a")])
    job = world.index.seal(slots)
    assert len(job.blocks) == 0
    assert world.index.open_job(job.number)
    world.report(job, OK)
    assert not world.index.open_job(job.number)
    assert world.n_ready == 2
    world.check_ended()


def test_a_reservation_has_all_its_slots_or_none() -> None:
    world = World(2)
    assert world.index.reserve(chain("abc"), parents=[None] * 3) == []
    assert world.index._table.n_free == 2
    assert world.index.reserve([], parents=[]) == []
    world.check_ended()


# -- offloading


def test_saved_blocks_are_put_from_the_very_same_slots() -> None:
    world = World(offload=OffloadAll())
    save = world.begin_save("ab")
    assert [job.kind for job in world.index.take_jobs()] == [JobKind.SAVE]
    world.report(save, OK)
    (put,) = world.index.take_jobs()
    assert put.kind is JobKind.PUT
    assert put.slots.tolist() == save.slots.tolist()
    assert world.index._table.n_available == 6  # held until the put is terminal
    world.report(put, OK, DECLINED)
    assert world.count("l2_put_blocks") == 1
    assert world.count("l2_put_failed_blocks") == 1
    world.check_ended()


def test_only_what_was_saved_is_put() -> None:
    world = World(offload=OffloadAll())
    save = world.begin_save("abc")
    world.index.take_jobs()
    world.report(save, OK, FAILED, OK)
    (put,) = world.index.take_jobs()
    assert unpack_keys(put.keys) == chain("ac")
    world.report(put, OK)
    world.check_ended()


def test_puts_go_in_batches() -> None:
    n = 2 * PUT_BATCH + 1
    world = World(n, offload=OffloadAll())
    keys = [i.to_bytes(16, "big") for i in range(n)]
    save = world.index.save(keys, range(n), parents=[None] * n)
    world.index.take_jobs()
    world.report(save, OK)
    puts = world.index.take_jobs()
    assert [len(put) for put in puts] == [PUT_BATCH, PUT_BATCH, 1]
    assert [k for put in puts for k in unpack_keys(put.keys)] == keys
    for put in puts:
        world.report(put, OK)
    world.check_ended()


def test_nothing_is_put_twice_while_or_after_it_is_put() -> None:
    world = World(offload=OffloadAll())
    world.index._offloads.policy = OffloadAt(Event.HOT)
    world.save("a")
    for request in "rs":
        assert world.offered(request, "a") == 1
    load = world.index.allocated("r", [0])
    (put,) = (job for job in world.index.take_jobs() if job.kind is JobKind.PUT)
    world.index._offloads.policy = EVERY_TIME
    other = world.index.allocated("s", [0])
    assert [job.kind for job in world.index.take_jobs()] == [JobKind.LOAD]
    for job in (put, load, other):
        world.report(job, OK)
    world.index._table._make_room(8)  # evict it: an event at which all is offloaded, but this is already
    assert world.index.take_jobs() == []
    assert world.count("offload_dropped_blocks") == 0
    world.check_ended("r", "s")


def test_a_put_that_failed_is_tried_again_at_the_next_event() -> None:
    world = World(offload=EVERY_TIME)
    save = world.begin_save("a")
    world.report(save, OK)
    world.report(world.index.take_jobs()[-1], FAILED)
    assert world.offered("r", "a") == 1
    world.report(world.load_and("r", JobKind.PUT), OK)
    world.check_ended("r")


def test_hot_blocks_are_put_when_they_become_hot_and_not_before() -> None:
    world = World(offload=OffloadHot())
    world.save("ab")
    assert world.offered("r", "a") == 1
    put = world.load_and("r", JobKind.PUT)
    assert unpack_keys(put.keys) == chain("a")
    world.report(put, OK)
    assert world.offered("s", "ab") == 2
    world.report(world.load_and("s", JobKind.PUT), OK)
    assert world.count("offload_hot_blocks") == 2
    world.check_ended("r", "s")


def test_blocks_computed_again_behind_a_hole_are_used() -> None:
    world = World(offload=OffloadHot())
    world.save("abc")
    world.index.used(chain("bx"))
    (put,) = world.index.take_jobs()
    assert unpack_keys(put.keys) == chain("b")
    world.report(put, OK)
    world.check_ended()


def cold_world(capacity: int = 8, n_ahead: int = 4) -> World:
    return World(capacity, offload=OffloadCold(), ahead_share=n_ahead / capacity)


def test_cold_blocks_are_put_ahead_of_need_and_serve_meanwhile() -> None:
    world = cold_world()
    for name in "abcdef":  # two are free
        world.save(name)
    assert world.index.take_jobs() == []
    world.report(world.begin_save("g"), OK)  # one is: too few
    put = world.index.take_jobs()[-1]
    assert (put.kind, unpack_keys(put.keys)) == (JobKind.PUT, chain("abcd"))
    assert world.offered("r", "ab") == 2
    world.report(put, OK)
    world.index.finished("r")
    assert world.count("offload_evicting_blocks") == 4
    world.save("hxy")  # of which two take the places of what L2 has
    assert world.state("c") is SlotState.READY
    assert world.state("d") is SlotState.READY
    assert (world.state("a"), world.state("b")) == (None, None)
    assert world.count("offload_dropped_blocks") == 0
    world.end_puts()
    world.check_ended()


def test_nobody_waits_for_cold_blocks_they_are_dropped_and_counted() -> None:
    world = cold_world()
    for name in "abcdefgh":
        world.report(world.begin_save(name), OK)
    jobs = world.index.take_jobs()
    puts = [job for job in jobs if job.kind is JobKind.PUT]
    assert [unpack_keys(put.keys) for put in puts] == [chain("abcd")]
    save = world.begin_save("wxyz")  # all that is not on its way out; and no more is sent on its way
    assert len(save) == 4
    assert [job.kind for job in world.index.take_jobs()] == [JobKind.SAVE]
    assert world.count("offload_dropped_blocks") == 4
    assert [world.state(name) for name in "abcdefgh"] == [SlotState.READY] * 4 + [None] * 4
    world.report(save, OK)
    for put in puts:
        world.report(put, FAILED)
    world.end_puts()
    world.check_ended()


def test_cold_blocks_that_l2_does_not_take_are_not_offered_again_and_again() -> None:
    world = cold_world()
    world.save("abcdefgh")
    world.end_puts(FAILED)
    assert world.index.take_jobs() == []
    world.save("i")
    assert world.count("offload_evicting_blocks") > 4
    world.end_puts()
    world.check_ended()


def test_all_and_hot_drop_nothing_when_blocks_are_evicted() -> None:
    for offload in (OffloadAll(), OffloadHot()):
        world = World(2, offload=offload)
        for name in "abcd":
            world.report(world.begin_save(name), OK)
            world.end_puts()
        assert world.count("l1_evicted_blocks") == 2
        assert world.count("offload_dropped_blocks") == 0
        world.check_ended()


def test_an_offload_policy_that_raises_offloads_nothing() -> None:
    class Raises(OffloadPolicy):
        name = "raises"

        def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
            raise RuntimeError("of the user's making")

    world = World(2, offload=Raises())
    for name in "abc":
        world.save(name)
    assert world.count("offload_policy_errors") > 0
    assert world.state("c") is SlotState.READY
    world.check_ended()


def test_an_offload_policy_cannot_name_what_it_was_not_asked_about() -> None:
    class MakesUp(OffloadPolicy):
        name = "makes up"

        def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
            return [key("z"), *keys, *keys]

    world = World(offload=MakesUp())
    world.report(world.begin_save("ab"), OK)
    world.index.take_jobs()
    assert world.count("offload_stored_blocks") == 2


# -- listeners


class Listener(CacheListener):
    """Writes down what it is told, and keeps what it was told to keep."""

    def __init__(self, keep: str = "") -> None:
        self.keep = set(chain(keep))
        self.told: list[tuple[str, bytes]] = []
        self.asked: list[bytes] = []

    def on_insert(self, key: bytes) -> None:
        self.told.append(("insert", key))

    def on_hot(self, key: bytes) -> None:
        self.told.append(("hot", key))

    def before_evict(self, key: bytes) -> bool:
        self.asked.append(key)
        return key not in self.keep

    def on_removed(self, key: bytes, cause: Removal) -> None:
        self.told.append((cause.value, key))


def test_a_listener_is_told_of_everything() -> None:
    world, listener = World(2), Listener()
    world.index.listen(listener)
    world.save("a")
    world.save("b")
    assert world.offered("r", "b") == 1
    world.report(world.load("r", 1), OK)
    world.save("c")
    world.index.forget(chain("b"))
    world.index.reset()
    events = ("insert", "a"), ("insert", "b"), ("hot", "b"), ("evicted", "a"), ("insert", "c")
    events += ("forgotten", "b"), ("reset", "c")
    assert listener.told == [(event, key(name)) for event, name in events]


def test_a_veto_keeps_a_block_and_another_goes() -> None:
    world, listener = World(3), Listener(keep="a")
    world.index.listen(listener)
    for name in "abc":
        world.save(name)
    world.save("x")
    assert world.state("a") is SlotState.READY
    assert world.state("b") is None
    assert listener.asked == chain("ab")
    assert world.count("eviction_vetoes") == 1
    world.check_ended()


def test_where_everything_is_vetoed_nothing_is_evicted_and_not_everything_asked_about() -> None:
    names = "abcdefghijklmnop"
    world, listener = World(16), Listener(keep=names)
    world.index.listen(listener)
    for name in names:
        world.save(name)
    assert world.index.save(chain("x"), [0], parents=[None]) is None
    assert all(world.state(name) is SlotState.READY for name in names)
    assert len(listener.asked) < 8
    assert world.count("l1_evicted_blocks") == 0
    assert world.count("save_skipped_no_room") == 1
    listener.keep = set()
    world.save("x")
    world.check_ended()


@pytest.mark.parametrize("where", ["on_insert", "on_hot", "before_evict", "on_removed"])
def test_a_listener_that_raises_or_calls_back_does_no_harm(where: str) -> None:
    world = World(2)
    caught: list[Exception] = []

    def calls_back(*arguments: object) -> None:
        for call in (
            lambda: world.index.forget(chain("a")),
            lambda: world.index.lookup("r", chain("a"), 0),
            lambda: world.index.save(chain("z"), [0], parents=[None]),
            world.index.reset,
            world.index.take_jobs,
        ):
            try:
                call()
            except ReentryError as error:
                caught.append(error)
        raise RuntimeError("of the user's making")

    listener = CacheListener()
    setattr(listener, where, calls_back)
    world.index.listen(listener)
    world.save("a")
    world.save("b")
    assert world.offered("r", "a") == 1
    world.report(world.load("r", 1), OK)
    evicts = world.index.save(chain("x"), [0], parents=[None]) is not None
    assert evicts == (where != "before_evict")  # who raises there has vetoed, and both are where they were
    assert world.state("b") is (None if evicts else SlotState.READY)
    assert world.state("a") is SlotState.READY
    assert len(caught) == 5 * world.count("listener_errors") > 0


def test_a_listener_that_blocks_does_so_once() -> None:
    world = World(4)

    class Blocks(CacheListener):
        calls = 0

        def on_insert(self, key: bytes) -> None:
            self.calls += 1
            world.now += 1.0

    slow, quick = Blocks(), Listener()
    world.index.listen(slow)
    world.index.listen(quick)
    world.save("ab")
    assert slow.calls == 1
    assert len(quick.told) == 2
    assert world.count("listeners_dropped") == 1


# -- without L2


def test_without_l2_nothing_is_put() -> None:
    world = World(l2=False, offload=OffloadAll())
    world.report(world.begin_save("ab"), OK)
    assert [job.kind for job in world.index.take_jobs()] == [JobKind.SAVE]
    world.check_ended()


# -- reset and forget


def test_reset_during_a_fetch() -> None:
    world = World(4)
    job = world.fetch("r", "ab")
    world.index.reset()
    assert world.index.stats()["requests"] == 0
    assert world.index.stats()["zombies"] == 2
    assert world.index._table.n_available == 2
    world.report(job, OK)
    assert world.n_ready == 0
    world.check_ended()


def test_reset_while_l2_is_asked() -> None:
    world = World()
    world.save("a")
    assert world.lookup("r", "ab") == STILL_PENDING
    world.index.reset()
    assert world.index.take_probes() == []
    world.check_ended()
    assert world.n_ready == 0


def test_reset_during_a_save() -> None:
    world = World(2, ranks=2, offload=OffloadAll())
    job = world.begin_save("ab")
    world.index.take_jobs()
    world.report(job, OK, rank=0)
    world.index.reset()
    save_again = world.index.save(chain("a"), [0], parents=[None])
    assert save_again is None  # both slots may still be written
    world.report(job, OK, rank=1)
    assert world.n_ready == 0
    assert world.index.take_jobs() == []  # nothing of the old weights is offloaded
    world.save("a")
    for put in world.index.take_jobs():
        world.report(put, OK)


def test_reset_during_a_load() -> None:
    world = World(2)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    job = world.load("r", 2)
    world.index.reset()
    assert world.index.stats()["zombies"] == 2
    assert world.index._table.n_available == 0
    world.report(job, OK)
    world.check_ended()


def test_reset_between_offer_and_allocation() -> None:
    world = World(2)
    world.save("ab")
    assert world.offered("r", "ab") == 2
    world.index.reset()
    assert world.index._table.n_free == 2
    assert world.index.allocated("r", [0, 1]) is None
    world.check_ended("r")


def test_reset_during_a_put() -> None:
    world = World(2, offload=OffloadAll())
    world.report(world.begin_save("ab"), OK)
    put = world.index.take_jobs()[-1]
    world.index.reset()
    assert world.index._table.n_available == 0
    world.report(put, OK)
    world.check_ended()


def test_reset_while_slots_are_reserved() -> None:
    world = World(2)
    slots = world.index.reserve(chain("ab"), parents=[None, None])
    world.index.reset()
    world.index.give_up(slots)
    world.check_ended()
    slots = world.index.reserve(chain("ab"), parents=[None, None])
    world.index.reset()
    world.report(world.index.seal(slots), OK)
    assert world.n_ready == 0
    world.check_ended()


def test_reset_while_blocks_are_served_in_place() -> None:
    world = World(1)
    world.save("a")
    assert world.offered("r", "a") == 1
    slots = world.index.take("r", 1)
    world.index.reset()
    assert world.index.reserve(chain("x"), parents=[None]) == []
    world.index.let_go(slots)
    world.check_ended()


def test_a_reset_forgets_what_was_evicted() -> None:
    world = World(1, l2=False)
    world.save("a")
    world.save("b")
    world.index.reset()
    assert world.offered("r", "a") == 0
    world.check_ended("r")
    assert world.misses() == {Reason.NOT_THERE: 1}


def test_forget_drops_what_is_there() -> None:
    world = World(l2=False)
    world.save("abc")
    assert world.index.forget(chain("bxb")) == 1
    assert world.offered("r", "abc") == 1
    world.check_ended("r")


def test_forget_of_a_block_that_is_offered_keeps_its_bytes_until_it_is_let_go() -> None:
    world = World(1, l2=False)
    world.save("a")
    assert world.offered("r", "a") == 1
    assert world.index.forget(chain("a")) == 1
    assert world.index.reserve(chain("x"), parents=[None]) == []
    job = world.load("r", 1)
    world.report(job, OK)
    world.save("x")
    world.check_ended("r")


def test_forget_of_a_block_that_is_being_fetched() -> None:
    world = World()
    job = world.fetch("r", "ab")
    assert world.index.forget(chain("a")) == 1
    world.report(job, OK)
    assert world.offered("r", "ab") == 0
    world.index.finished("r")
    assert world.misses() == {Reason.NOT_THERE: 1, Reason.BEHIND_HOLE: 1}
    world.check_ended()


def test_forget_of_a_block_that_is_being_saved() -> None:
    world = World(offload=OffloadAll())
    job = world.begin_save("ab")
    assert world.index.forget(chain("a")) == 1
    world.report(job, OK)
    assert world.state("a") is None
    assert world.state("b") is SlotState.READY
    put = world.index.take_jobs()[-1]
    assert unpack_keys(put.keys) == chain("b")
    world.report(put, OK)
    world.check_ended()


def test_forget_during_a_put_and_a_load() -> None:
    world = World(1, offload=OffloadAll())
    world.report(world.begin_save("a"), OK)
    put = world.index.take_jobs()[-1]
    assert world.offered("r", "a") == 1
    load = world.load("r", 1)
    world.index.forget(chain("a"))
    world.report(put, OK)
    assert world.index.stats()["zombies"] == 1
    world.report(load, OK)
    world.check_ended("r")


# -- every miss has its reason


def _not_there(world: World) -> None:
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("")
    assert world.offered("r", "a") == 0


def _evicted(world: World) -> None:
    world.save("a")
    world.save("wxyz")
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("")
    assert world.offered("r", "a") == 0


def _other_keyspace(world: World) -> None:
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("", differs=("weights",))
    assert world.offered("r", "a") == 0


def _gate(world: World) -> None:
    world.index._lookups._gate = CutGate(0)
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("a")
    assert world.offered("r", "a") == 0


def _tier_down(world: World) -> None:
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("", down=True)
    assert world.offered("r", "a") == 0


def _checksum(world: World) -> None:
    world.report_all(world.fetch("r", "a"), CHECKSUM)
    assert world.offered("r", "a") == 0


def _rank_shorter(world: World) -> None:
    job = world.fetch("r", "a")
    world.report(job, OK, rank=0)
    world.report(job, MISSING, rank=1)
    assert world.offered("r", "a") == 0


def _behind_hole(world: World) -> None:
    world.save("b")
    assert world.lookup("r", "ab") == STILL_PENDING
    world.probe("")
    assert world.offered("r", "ab") == 0


def _not_yet(world: World) -> None:
    world.fetch("r", "a")
    world.now += 100
    assert world.offered("r", "a") == 0


def _no_room(world: World) -> None:
    world.begin_save("wxyz")
    assert world.lookup("r", "a") == STILL_PENDING
    world.probe("a")
    assert world.offered("r", "a") == 0


def _unused(world: World) -> None:
    world.save("a")
    assert world.offered("r", "a") == 1


def _load_failed(world: World) -> None:
    world.save("a")
    assert world.offered("r", "a") == 1
    world.report_all(world.load("r", 1), FAILED)


SCENES: dict[Reason, Callable[[World], None]] = {
    Reason.NOT_THERE: _not_there,
    Reason.EVICTED: _evicted,
    Reason.OTHER_KEYSPACE: _other_keyspace,
    Reason.GATE: _gate,
    Reason.TIER_DOWN: _tier_down,
    Reason.CHECKSUM: _checksum,
    Reason.RANK_SHORTER: _rank_shorter,
    Reason.BEHIND_HOLE: _behind_hole,
    Reason.NOT_YET: _not_yet,
    Reason.NO_ROOM: _no_room,
    Reason.UNUSED: _unused,
    Reason.LOAD_FAILED: _load_failed,
}


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_counted_once_for_each_block_that_was_not_served(reason: Reason) -> None:
    world = World(4, ranks=2, waiting_share=1.0)
    SCENES[reason](world)
    world.index.finished("r")
    assert world.misses()[reason] == 1
    assert world.count("looked_up_blocks") == world.count("served_blocks") + sum(world.misses().values())


def test_the_list_of_evicted_blocks_is_bounded() -> None:
    world = World(1, l2=False)
    names = "abcdefghijkl"
    for name in names:
        world.save(name)
    reasons = []
    for name in names[:-1]:
        world.index.metrics.misses.clear()
        assert world.offered("r", name) == 0
        world.index.finished("r")
        (reason,) = world.misses()
        reasons.append(reason)
    assert set(reasons) == {Reason.NOT_THERE, Reason.EVICTED}
    assert reasons == sorted(reasons, key=lambda reason: reason is Reason.EVICTED)  # the oldest are forgotten first


class _Always(OffloadPolicy):
    name = "always"

    def select(self, keys: Sequence[bytes], event: Event) -> list[bytes]:
        return list(keys)


EVERY_TIME = _Always()
