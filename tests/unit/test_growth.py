"""Pools that grow in the background: what is used meanwhile, what happens when it fails, and who may use which slot."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paced import PATIENCE_S, PLENTY, PacedSlabs

from kvrdma.backends import open_backend
from kvrdma.backends.breaker import BreakerBackend
from kvrdma.cache import BlockStatus, CacheIndex, IndexOptions, Job, JobKind, PoolReport, Slot, TransferAgent
from kvrdma.errors import CapacityError, ClosedError, RegionError
from kvrdma.keys import pack_keys
from kvrdma.layout import Shard
from kvrdma.memory import Lease, MemfdSlabs, Memory, PinnedPool, PoolGrowth, SlabReserve
from kvrdma.memory.growth import HEADROOM_NBYTES
from kvrdma.memory.slab import PAGE_NBYTES
from kvrdma.policies.lru import LruPolicy
from kvrdma.policies.offload import OffloadAll
from kvrdma.settings import Settings

PER_SLAB = 4


class Growing:
    """A pool under growth, and what it tells."""

    def __init__(
        self, n_slots: int = 3 * PER_SLAB - 1, *, prepare: Callable[[Memory], None] | None = None, start: bool = True
    ) -> None:
        self.source = PacedSlabs()
        self.pool = PinnedPool(
            PAGE_NBYTES, n_slots, source=self.source, slab_nbytes=PER_SLAB * PAGE_NBYTES, in_background=True
        )
        self.prepared: list[Memory] = []
        self.changes = threading.Semaphore(0)
        self.growth = PoolGrowth(
            self.pool, prepare=self.prepared.append if prepare is None else prepare, on_change=self.changes.release
        )
        if start:
            self.growth.start()

    def next(self) -> None:
        """Let one slab come, or fail; back when it was told of."""
        self.source.permits.release()
        assert self.changes.acquire(timeout=PATIENCE_S)

    def close(self) -> None:
        assert self.growth.close(timeout=PATIENCE_S)
        self.pool.close()


# -- the thread


def test_the_first_slab_is_there_at_once_and_the_others_one_by_one() -> None:
    growing = Growing()
    assert (growing.growth.n_ready, growing.growth.growing, growing.pool.n_planned) == (PER_SLAB, True, 11)
    with growing.pool.lease([0, 3], exclusive=True), pytest.raises(RegionError):
        growing.pool.lease([PER_SLAB])
    growing.next()
    assert (growing.growth.n_ready, growing.pool.n_slots) == (2 * PER_SLAB, 2 * PER_SLAB)
    growing.pool.lease([PER_SLAB]).release()
    growing.next()
    assert growing.changes.acquire(timeout=PATIENCE_S)  # the last slab, and the end
    assert (growing.growth.n_ready, growing.growth.growing, growing.growth.failure) == (11, False, "")
    assert tuple(growing.prepared) == growing.pool.memories
    growing.close()


def test_a_slab_counts_once_it_is_prepared() -> None:
    began, go_on = threading.Event(), threading.Event()

    def prepare(memory: Memory) -> None:
        if memory is not growing_pool[0]:
            began.set()
            assert go_on.wait(PATIENCE_S)

    source = PacedSlabs()
    source.permits.release(5)
    pool = PinnedPool(PAGE_NBYTES, 8, source=source, slab_nbytes=PER_SLAB * PAGE_NBYTES, in_background=True)
    growing_pool = pool.memories
    growth = PoolGrowth(pool, prepare=prepare, on_change=lambda: None)
    growth.start()
    assert began.wait(PATIENCE_S)
    assert growth.n_ready == PER_SLAB
    go_on.set()
    growth._thread.join(PATIENCE_S)
    assert growth.n_ready == 8
    pool.close()


@pytest.mark.parametrize(
    "failure", [CapacityError("no memory"), OSError(24, "Too many open files"), MemoryError(), ValueError("a bug")]
)
def test_a_growth_that_fails_leaves_a_smaller_pool(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    growing = Growing()
    growing.next()
    growing.source.failure = failure
    with caplog.at_level(logging.WARNING):
        growing.next()
    growing.growth._thread.join(PATIENCE_S)
    assert (growing.growth.n_ready, growing.growth.growing) == (2 * PER_SLAB, False)
    assert type(failure).__name__ in growing.growth.failure
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "8 of 11 slots" in caplog.text
    growing.pool.lease(range(8), exclusive=True).release()
    growing.close()


def test_a_slab_that_cannot_be_registered_is_not_used() -> None:
    calls: list[Memory] = []

    def prepare(memory: Memory) -> None:
        calls.append(memory)
        if len(calls) == 2:
            raise RegionError("the NIC has no more regions")

    growing = Growing(prepare=prepare)
    growing.next()
    assert growing.growth.n_ready == PER_SLAB
    assert "no more regions" in growing.growth.failure
    growing.close()


def test_the_first_slabs_registration_is_the_callers_to_fail() -> None:
    def prepare(memory: Memory) -> None:
        raise RegionError("refused")

    with PinnedPool(64, 4) as pool, pytest.raises(RegionError):
        PoolGrowth(pool, prepare=prepare, on_change=lambda: None)


def test_a_growth_leaves_memory_for_the_engine() -> None:
    growing = Growing(start=False)
    growing.source.available = HEADROOM_NBYTES + PER_SLAB * PAGE_NBYTES - 1
    growing.growth.start()
    assert growing.changes.acquire(timeout=PATIENCE_S)
    growing.growth._thread.join(PATIENCE_S)
    assert growing.growth.n_ready == PER_SLAB
    assert "left to the engine" in growing.growth.failure
    growing.close()


def test_more_than_the_host_has_is_refused_at_the_start() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match="available"):
        PinnedPool(1 << 20, PLENTY >> 20, in_background=True)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_close_while_a_slab_is_awaited_ends_it_and_gives_all_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    growing = Growing(prepare=lambda memory: None)
    for _ in range(2):
        assert growing.source.asked.acquire(timeout=PATIENCE_S)  # the second is under way
    growing.close()
    assert not growing.growth.growing
    assert growing.growth.failure == ""
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_close_before_the_start_and_after_the_end() -> None:
    with PinnedPool(64, 4) as pool:
        growth = PoolGrowth(pool, prepare=lambda memory: None, on_change=lambda: None)
        assert growth.close(timeout=0.0)
        growth = PoolGrowth(pool, prepare=lambda memory: None, on_change=lambda: None)
        growth.start()
        assert not growth.growing
        assert growth.close(timeout=0.0)


def test_a_slab_that_is_being_touched_is_given_up_when_it_is_cancelled() -> None:
    before = set(os.listdir("/proc/self/fd"))
    source = MemfdSlabs()
    source.cancel()
    with pytest.raises(ClosedError):
        source.allocate(1 << 20)
    assert set(os.listdir("/proc/self/fd")) == before


def test_slabs_get_larger_where_there_would_be_too_many() -> None:
    """A pool of any size stays far below the usual 1,024 descriptors."""
    source = PacedSlabs()
    source.failure = CapacityError("not needed here")
    source.available_nbytes = lambda: PLENTY  # type: ignore[method-assign]
    for total in (1 << 30, 16 << 30, 1 << 40):
        pool = object.__new__(PinnedPool)
        with pytest.raises(CapacityError, match="not needed"):
            pool.__init__(1 << 20, total >> 20, source=source, in_background=True)  # type: ignore[misc]
        source.permits.release()
        assert total / (pool.slots_per_slab * pool.slot_stride) <= 256


# -- the agent


def job(kind: JobKind, slots: list[int]) -> Job:
    keys = pack_keys(bytes([slot]) * 16 for slot in slots)
    return Job(kind, 1, keys, np.array(slots, dtype=np.int64), 5.0)


def test_an_agent_reports_its_slots_as_they_come_and_registers_them() -> None:
    source = PacedSlabs()
    pool = PinnedPool(PAGE_NBYTES, 11, source=source, slab_nbytes=PER_SLAB * PAGE_NBYTES, in_background=True)
    registered: list[Memory] = []
    news = threading.Semaphore(0)

    class Backend(BreakerBackend):
        def register(self, memory: Memory) -> None:
            registered.append(memory)
            super().register(memory)

    backend = Backend(open_backend("memory://?capacity=16MiB", Settings()))
    agent = TransferAgent(pool, Shard(0, 0, 1, 0, 1), rank=3, backend=backend, on_report=news.release)
    assert agent.poll_pool() == PoolReport(3, PER_SLAB, growing=True)
    assert agent.poll_pool() == PoolReport(3, PER_SLAB, growing=True)  # each time, until it has ended
    agent.grow()
    agent.submit([job(JobKind.SAVE, [PER_SLAB])])
    assert agent.poll()[0].status.tolist() == [BlockStatus.FAILED]  # it is not there yet
    assert news.acquire(timeout=PATIENCE_S)
    source.permits.release()
    assert news.acquire(timeout=PATIENCE_S)
    assert agent.poll_pool() == PoolReport(3, 2 * PER_SLAB, growing=True)
    assert tuple(registered) == pool.memories
    agent.submit([job(JobKind.SAVE, [PER_SLAB])])
    assert news.acquire(timeout=PATIENCE_S)
    assert agent.poll()[0].status.tolist() == [BlockStatus.OK]
    source.failure = CapacityError("no memory")
    source.permits.release()
    assert news.acquire(timeout=PATIENCE_S)
    report = agent.poll_pool()
    assert report is not None
    assert (report.n_slots, report.growing) == (2 * PER_SLAB, False)
    assert "no memory" in report.failure
    assert agent.poll_pool() is None
    assert agent.close()
    pool.close()
    backend.close()


def test_an_agent_of_a_whole_pool_says_so_once() -> None:
    with PinnedPool(64, 4) as pool:
        agent = TransferAgent(pool, Shard(0, 0, 1, 0, 1))
        agent.grow()
        assert agent.poll_pool() == PoolReport(0, 4, growing=False)
        assert agent.poll_pool() is None
        assert agent.close()


# -- a reserve


def test_a_reserve_grows_and_hands_out_only_what_is_prepared() -> None:
    source = PacedSlabs()
    reserve = SlabReserve(3 * PAGE_NBYTES, PAGE_NBYTES, source=source, in_background=True, first_nbytes=0)
    first = reserve.allocate(PAGE_NBYTES)
    asked, prepared = threading.Semaphore(0), threading.Semaphore(0)
    slabs: list[Memory] = []

    def prepare(memory: Memory) -> None:
        slabs.append(memory)
        asked.release()
        assert prepared.acquire(timeout=PATIENCE_S)

    reserve.grow(prepare)
    source.permits.release()
    assert asked.acquire(timeout=PATIENCE_S)
    assert (reserve.n_slabs, reserve.n_ready, reserve.available_nbytes()) == (3, 1, 0)
    with pytest.raises(CapacityError):
        reserve.allocate(PAGE_NBYTES)
    source.failure = CapacityError("no memory")
    prepared.release()
    source.permits.release()
    assert reserve._growth is not None
    reserve._growth._thread.join(PATIENCE_S)
    assert (reserve.n_slabs, reserve.n_ready) == (2, 2)  # it knows that the third does not come
    assert [reserve.allocate(PAGE_NBYTES)] == slabs
    assert set(reserve.slabs) == {first, *slabs}
    reserve.close()


# -- the index: ranks whose pools grow at their own pace, in any order


def index_of(capacity: int, ranks: int) -> CacheIndex:
    return CacheIndex(capacity, LruPolicy(capacity), OffloadAll(), IndexOptions(ranks=ranks, growing=True))


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def test_there_is_no_slot_before_every_rank_has_reported() -> None:
    index = index_of(8, ranks=2)
    index.on_pool(PoolReport(0, 8, growing=False))
    assert index.stats()["l1_ready_blocks"] == 0
    assert index.growing
    assert index.save([key(1)], [0], parents=[None]) is None
    index.on_pool(PoolReport(1, 4, growing=True))
    saved = index.save([key(number) for number in range(6)], range(6), parents=[None] * 6)
    assert saved is not None
    assert saved.slots.tolist() == [0, 1, 2, 3]
    index.on_pool(PoolReport(1, 6, growing=False, failure="no memory"))
    assert not index.growing
    stats = index.stats()
    assert (stats["l1_ready_blocks"], stats["l1_capacity_blocks"], stats["l1_growth_failures"]) == (6, 8, 1)
    index.on_pool(PoolReport(1, 6, growing=False, failure="no memory"))
    assert index.stats()["l1_growth_failures"] == 1


def test_without_growth_every_slot_is_there() -> None:
    index = CacheIndex(8, LruPolicy(8), OffloadAll(), IndexOptions(ranks=2))
    index.on_pool(PoolReport(0, 1, growing=False))
    assert index.stats()["l1_ready_blocks"] == 8
    assert not index.growing


class RanksMachine(RuleBasedStateMachine):
    """Whatever the ranks report, in whatever order: a slot in use is there on every rank, and has one user."""

    @initialize(ranks=st.integers(1, 4), capacity=st.integers(1, 24))
    def start(self, ranks: int, capacity: int) -> None:
        self.capacity = capacity
        self.index = index_of(capacity, ranks)
        self.told = [0] * ranks
        self.ended = [False] * ranks
        self.held: list[list[Slot]] = []
        self.n_keys = 0

    @rule(rank=st.integers(0, 3), more=st.integers(0, 6), ends=st.sampled_from([False] * 5 + [True]))
    def report(self, rank: int, more: int, ends: bool) -> None:
        rank %= len(self.told)
        if not self.ended[rank]:
            self.told[rank] = min(self.capacity, self.told[rank] + more)
            self.ended[rank] = ends or self.told[rank] == self.capacity
            failure = "" if self.told[rank] == self.capacity else "no memory"
            self.index.on_pool(
                PoolReport(rank, self.told[rank], not self.ended[rank], failure if self.ended[rank] else "")
            )

    @rule(rank=st.integers(0, 3), less=st.integers(0, 6))
    def report_late(self, rank: int, less: int) -> None:
        """An old report that comes after a newer one changes nothing."""
        rank %= len(self.told)
        before = self.index.stats()
        self.index.on_pool(PoolReport(rank, max(0, self.told[rank] - less), growing=True))
        assert self.index.stats() == before

    @rule(n=st.integers(1, 8))
    def reserve(self, n: int) -> None:
        keys = [key(self.n_keys + i) for i in range(n)]
        room = self.index._table.n_available
        slots = self.index.reserve(keys, parents=[None] * n)
        assert len(slots) == (n if n <= room else 0)
        self.n_keys += n
        if slots:
            self.held.append(slots)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 100))
    def give_up(self, pick: int) -> None:
        self.index.give_up(self.held.pop(pick % len(self.held)))

    @invariant()
    def slots_are_there_on_every_rank(self) -> None:
        least = min(self.told)
        numbers = [slot.number for slots in self.held for slot in slots]
        assert len(set(numbers)) == len(numbers)
        assert all(number < least for number in numbers)
        stats = self.index.stats()
        assert (stats["l1_ready_blocks"], stats["l1_capacity_blocks"]) == (least, self.capacity)
        assert stats["l1_free_blocks"] + len(numbers) == least
        assert self.index.growing == (not all(self.ended))


RanksMachine.TestCase.settings = settings(
    max_examples=settings.default.max_examples, stateful_step_count=40, deadline=None
)
TestRanks = RanksMachine.TestCase


# -- the pool: leases and growth


class PoolMachine(RuleBasedStateMachine):
    """A pool that hands out its own slots: none to two holders, none lost, and what is written stays."""

    def __init__(self) -> None:
        super().__init__()
        self.source = PacedSlabs()
        self.source.permits.release(1000)
        self.pool = PinnedPool(64, 10, source=self.source, slab_nbytes=4 * 64, in_background=True)
        self.held: list[tuple[Lease, int]] = []  # with its number of references
        self.frees: dict[int, int] = {}
        self.stamp = 0

    @rule(n=st.integers(0, 5))
    def allocate(self, n: int) -> None:
        if n > self.pool.n_free:
            with pytest.raises(CapacityError):
                self.pool.allocate(n)
            return
        lease = self.pool.allocate(n)
        assert lease.generations is not None
        assert lease.generations.tolist() == [self.frees.get(slot, 0) for slot in lease.slots.tolist()]
        for slot in lease.slots.tolist():
            self.pool.view(slot)[:] = slot
        self.held.append((lease, 1))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 100))
    def retain(self, pick: int) -> None:
        at = pick % len(self.held)
        lease, refs = self.held[at]
        self.held[at] = (lease.retain(), refs + 1)

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 100))
    def release(self, pick: int) -> None:
        at = pick % len(self.held)
        lease, refs = self.held[at]
        lease.release()
        if refs > 1:
            self.held[at] = (lease, refs - 1)
            return
        del self.held[at]
        assert not lease.alive
        for slot in lease.slots.tolist():
            self.frees[slot] = self.frees.get(slot, 0) + 1

    @precondition(lambda self: self.pool.n_slots < self.pool.n_planned)
    @rule(fails=st.booleans())
    def grow(self, fails: bool) -> None:
        n = min(self.pool.slots_per_slab, self.pool.n_planned - self.pool.n_slots)
        before = self.pool.n_slots
        if fails:
            self.source.failure = CapacityError("no memory")
            with pytest.raises(CapacityError):
                self.pool.grow(n)
            self.source.failure = None
            assert self.pool.n_slots == before
        else:
            (memory,) = self.pool.grow(n)
            assert memory is self.pool.memories[-1]
            assert self.pool.n_slots == before + n

    @precondition(lambda self: self.held)
    @rule()
    def close_is_refused(self) -> None:
        with pytest.raises(CapacityError, match="leases are still held"):
            self.pool.close()

    @invariant()
    def adds_up(self) -> None:
        out = [slot for lease, _ in self.held for slot in lease.slots.tolist()]
        assert len(set(out)) == len(out)
        assert all(0 <= slot < self.pool.n_slots for slot in out)
        assert len(out) + self.pool.n_free == self.pool.n_slots <= self.pool.n_planned
        assert self.pool.n_leases == len(self.held)
        for slot in out:
            assert (self.pool.view(slot) == slot).all()

    def teardown(self) -> None:
        for lease, refs in self.held:
            for _ in range(refs):
                lease.release()
        assert (self.pool.n_free, self.pool.n_leases) == (self.pool.n_slots, 0)
        self.pool.close()


PoolMachine.TestCase.settings = settings(
    max_examples=3 * settings.default.max_examples // 5, stateful_step_count=40, deadline=None
)
TestPool = PoolMachine.TestCase


class LeaseMachine(RuleBasedStateMachine):
    """A pool whose slots somebody else numbers: an exclusive lease only where nobody holds, whatever grows."""

    def __init__(self) -> None:
        super().__init__()
        self.source = PacedSlabs()
        self.source.permits.release(1000)
        self.pool = PinnedPool(64, 10, source=self.source, slab_nbytes=4 * 64, in_background=True)
        self.held: list[Lease] = []

    @rule(slots=st.lists(st.integers(0, 10), max_size=4), exclusive=st.booleans())
    def lease(self, slots: list[int], exclusive: bool) -> None:
        in_use = {slot for lease in self.held for slot in lease.slots.tolist()}
        if any(slot >= self.pool.n_slots for slot in slots) or (exclusive and in_use & set(slots)):
            with pytest.raises(RegionError):
                self.pool.lease(slots, exclusive=exclusive)
        else:
            self.held.append(self.pool.lease(slots, exclusive=exclusive))

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 100))
    def release(self, pick: int) -> None:
        self.held.pop(pick % len(self.held)).release()

    @precondition(lambda self: self.pool.n_slots < self.pool.n_planned)
    @rule()
    def grow(self) -> None:
        self.pool.grow(min(self.pool.slots_per_slab, self.pool.n_planned - self.pool.n_slots))

    @invariant()
    def adds_up(self) -> None:
        assert self.pool.n_leases == len(self.held)
        if self.held:
            with pytest.raises(CapacityError):
                self.pool.close()

    def teardown(self) -> None:
        for lease in self.held:
            lease.release()
        self.pool.lease(range(self.pool.n_slots), exclusive=True).release()  # nothing is held any more
        self.pool.close()


LeaseMachine.TestCase.settings = settings(
    max_examples=3 * settings.default.max_examples // 5, stateful_step_count=40, deadline=None
)
TestLeases = LeaseMachine.TestCase
