"""Coordinators pass the suite, and the manager takes any of one rank."""

import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from kvrdma.coordinator import MAX_BATCHES_BEHIND, Coordinator, SoloCoordinator, ThreadGroup
from kvrdma.errors import ConfigError, CoordinationLost
from kvrdma.keys import KeySpace
from kvrdma.manager import KVCacheManager
from kvrdma.settings import Settings
from kvrdma.testing.coordinators import PATIENCE_S, CoordinatorSuite, in_a_thread, result_of, shared_jobs


class TestSolo(CoordinatorSuite):
    worlds: ClassVar[Sequence[int]] = (1,)

    def make_ranks(self, world: int) -> Sequence[Coordinator]:
        return [SoloCoordinator()]


class TestThreadGroup(CoordinatorSuite):
    def make_ranks(self, world: int) -> Sequence[Coordinator]:
        return ThreadGroup(world).coordinators

    def test_nothing_is_kept_of_jobs_that_are_over(self) -> None:
        """Agreed, given up by everybody, or half of both: their state goes with the last who waits."""
        group = ThreadGroup(2)
        left, right = group.coordinators
        part = np.ones(3, dtype=np.bool_)
        for job in range(10):
            with pytest.raises(CoordinationLost):
                left.agree(job, part, timeout=0.001)
        for job in range(10, 20):
            waiting = in_a_thread(lambda job=job: left.agree(job, part, timeout=PATIENCE_S))
            assert right.agree(job, part, timeout=PATIENCE_S).all()
            assert result_of(waiting).all()
        assert not group.ballots

    def test_what_a_rank_brought_counts_when_it_has_left(self) -> None:
        group = ThreadGroup(3)
        first, second, third = group.coordinators
        parts = np.array([[True, True, False], [True, False, True], [True, True, True]])
        waiting = in_a_thread(lambda: first.agree(0, parts[0], timeout=PATIENCE_S))
        while 0 not in group.ballots:
            time.sleep(0.001)
        with pytest.raises(CoordinationLost):
            second.agree(0, parts[1], timeout=0.01)
        second.close()
        assert third.agree(0, parts[2], timeout=PATIENCE_S).tolist() == [True, False, False]
        assert result_of(waiting).tolist() == [True, False, False]

    def test_a_rank_that_takes_nothing_is_waited_for(self) -> None:
        """Its jobs are kept, but not without bound: rank 0 hears of it, and what it could not share is nowhere."""
        group = ThreadGroup(3)
        first, second, third = group.coordinators
        for _ in range(MAX_BATCHES_BEHIND):
            first.share(shared_jobs(1), timeout=PATIENCE_S)
            second.share(None, timeout=PATIENCE_S)
        with pytest.raises(CoordinationLost, match="nothing within"):
            first.share(shared_jobs(1), timeout=0.01)
        with pytest.raises(CoordinationLost):
            second.share(None, timeout=0.01)
        third.share(None, timeout=PATIENCE_S)
        first.share(shared_jobs(2), timeout=PATIENCE_S)
        assert len(second.share(None, timeout=PATIENCE_S)) == 2

    def test_what_was_shared_before_a_rank_left_is_taken(self) -> None:
        group = ThreadGroup(2)
        first, second = group.coordinators
        first.share(shared_jobs(2), timeout=PATIENCE_S)
        first.close()
        assert len(second.share(None, timeout=PATIENCE_S)) == 2
        with pytest.raises(CoordinationLost, match="rank 0 has left"):
            second.share(None, timeout=PATIENCE_S)

    def test_a_group_of_none_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="at least 1 rank"):
            ThreadGroup(0)


SPACE = KeySpace(
    model="m", weights="w", config="c", kv_dtype="bfloat16", attention="a", head_size=64, layers=2, block_tokens=4
)


def test_the_manager_takes_a_coordinator_of_one_rank() -> None:
    settings = Settings(l1_bytes=8 << 10)
    (only,) = ThreadGroup(1).coordinators
    with KVCacheManager(SPACE, 1024, settings, coordinator=only) as manager:
        with manager.reserve(range(8)) as reservation:
            assert reservation.commit()
        with manager.acquire(range(8)) as hit:
            assert hit.n_blocks == 2


def test_the_manager_refuses_a_coordinator_of_several() -> None:
    """Tensor parallelism is not built yet: nobody would follow rank 0's jobs."""
    with pytest.raises(ConfigError, match="one rank"):
        KVCacheManager(SPACE, 1024, Settings(l1_bytes=8 << 10), coordinator=ThreadGroup(2).coordinators[0])
