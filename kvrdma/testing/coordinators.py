"""What every coordinator does: `CoordinatorSuite`.

What a rank does in a test is a function of this module, given its coordinator, and what it gives back is plain
data: an implementation whose ranks are processes overrides `run_ranks` to run the very same functions there.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, ClassVar, Final

import numpy as np
import pytest

from kvrdma.cache import Job, JobKind
from kvrdma.coordinator import Coordinator
from kvrdma.errors import ClosedError, ConfigError, CoordinationLost
from kvrdma.keys import KEY_NBYTES
from kvrdma.layout import Bitmap

PATIENCE_S: Final = 30.0
LOST: Final = "CoordinationLost"
_BARRIER: Final = 1 << 30  # the numbers of jobs by which the ranks of a test wait for each other
_LAST_JOB: Final = -1

Program = Callable[..., Any]


class CoordinatorSuite:
    """Tests that a coordinator inherits. `make_ranks` is needed, or `run_ranks` where ranks are processes."""

    worlds: ClassVar[Sequence[int]] = (1, 2, 4)
    """How many ranks there may be; with 1 only, what takes others is skipped."""

    def make_ranks(self, world: int) -> Sequence[Coordinator]:
        """Make the coordinators of all ranks of a group, for threads of this process; the suite closes them."""
        raise NotImplementedError

    def run_ranks(self, world: int, program: Program, *arguments: Any) -> list[Any]:
        """Run `program(coordinator, *arguments)` on every rank at once; what each gave back, by rank.

        An exception of a program's is raised here, and so is a program that does not come to its end.
        """
        ranks = self.make_ranks(world)
        assert [(each.rank, each.world) for each in ranks] == [(rank, world) for rank in range(world)]
        ends = [in_a_thread(program, each, *arguments) for each in ranks]
        try:
            return [result_of(end) for end in ends]
        finally:
            for each in ranks:
                each.close()

    @pytest.fixture
    def world(self) -> int:
        """The largest group, for tests that take more than one rank."""
        if max(self.worlds) < 2:
            pytest.skip(f"{type(self).__name__} has groups of one rank only: this takes two")
        return max(self.worlds)

    # -- agree

    @pytest.mark.parametrize("n", [0, 1, 13, 4096])
    def test_what_all_ranks_have(self, n: int) -> None:
        """The AND of what each brings, the same on every rank, job by job."""
        for world in self.worlds:
            results = self.run_ranks(world, agree_on_many, n, range(20))
            wanted = [in_common(world, job, n) for job in range(20)]
            assert results == [wanted] * world

    def test_jobs_in_another_order_on_each_rank(self, world: int) -> None:
        """Each rank begins its jobs in an order of its own, all at once: each job finds its own parts."""
        results = self.run_ranks(world, agree_in_an_order_of_its_own, 12)
        wanted = {job: in_common(world, job, 64) for job in range(12)}
        assert results == [wanted] * world

    def test_a_slow_job_holds_up_no_other(self, world: int) -> None:
        """The last rank comes to job 0 after all the others are agreed on; the other ranks began with it."""
        results = self.run_ranks(world, agree_with_one_job_slow)
        wanted = [in_common(world, job, 16) for job in range(10)]
        assert results == [wanted] * world

    def test_a_rank_that_never_comes(self, world: int) -> None:
        """The others hear `CoordinationLost` when their time is over, and can agree on what it does come to."""
        results = self.run_ranks(world, agree_but_for_one)
        assert results == [[LOST, [True] * 4]] * (world - 1) + [[None, [True] * 4]]

    def test_a_rank_that_is_gone(self, world: int) -> None:
        """It left, and whoever waits for it or begins to hears of it, however long it would wait."""
        results = self.run_ranks(world, agree_without_the_last)
        assert results == [[LOST, LOST]] * (world - 1) + [None]

    def test_whoever_gets_a_value_gets_the_same(self, world: int) -> None:
        """Ranks that come just as others give up: no two get different values, and nobody gets a part of it."""
        results = self.run_ranks(world, agree_at_the_last_moment, 40)
        for job in range(40):
            wanted = in_common(world, job, 16)
            assert all(result[job] in (LOST, wanted) for result in results)

    def test_a_value_is_the_callers_own(self, world: int) -> None:
        """Neither what a rank does with its value, nor with the array it brought, reaches another rank."""
        results = self.run_ranks(world, agree_and_scribble, 20)
        wanted = [in_common(world, job, 64) for job in range(20)]
        assert results == [wanted] * world

    def test_what_a_rank_brought_is_what_counts(self, world: int) -> None:
        """One that gave up uses its array for something else: nobody may see that as its part of the job."""
        results = self.run_ranks(world, agree_after_one_gave_up)
        assert results[0] == LOST
        assert all(result in (LOST, [True, False] * 4) for result in results[1:])

    def test_ranks_that_mean_different_jobs(self, world: int) -> None:
        """Parts of different sizes under one number: no rank gets a value."""
        results = self.run_ranks(world, agree_on_different_sizes)
        assert results == [LOST] * world

    def test_one_part_a_rank_and_job(self, world: int) -> None:
        """Of two threads of a rank that bring a part of the same job, one is refused, and the other one counts."""
        results = self.run_ranks(world, agree_twice_at_once)
        assert results[0] == ["ConfigError", [True] * 4]
        assert results[1:] == [[True] * 4] * (world - 1)

    def test_a_wait_of_no_time_ends(self, world: int) -> None:
        """With a time-out of 0 there is no waiting."""
        assert self.run_ranks(world, agree_at_once_alone) == [LOST] + [None] * (world - 1)

    # -- share

    def test_jobs_in_one_order(self) -> None:
        """Each rank gets all of rank 0's jobs, whole, in the order in which they were shared."""
        for world in self.worlds:
            results = self.run_ranks(world, share_many, 50)
            assert results == [[describe(job) for job in shared_jobs(50)]] * world

    def test_a_rank_that_is_behind(self, world: int) -> None:
        """One that takes jobs later than the others gets the same; rank 0 may have to wait for it."""
        results = self.run_ranks(world, share_with_one_behind, 50)
        assert results == [[describe(job) for job in shared_jobs(50)]] * world

    def test_whoever_waited_in_vain_misses_nothing(self, world: int) -> None:
        """`CoordinationLost` when the time is over; what is shared afterwards comes from its beginning."""
        results = self.run_ranks(world, share_after_a_wait_in_vain)
        wanted = [describe(job) for job in shared_jobs(1)]
        assert results == [["nothing asked", wanted]] + [[LOST, wanted]] * (world - 1)

    def test_only_rank_0_brings_jobs(self, world: int) -> None:
        """`ConfigError`: there is one index."""
        assert self.run_ranks(world, share_from_everywhere) == ["rank 0"] + ["ConfigError"] * (world - 1)

    def test_sharing_with_a_rank_that_is_gone(self, world: int) -> None:
        """Nobody goes on as if all had the jobs: rank 0 and the others hear of it, and no wait is for ever."""
        results = self.run_ranks(world, share_without_the_last)
        assert results == [LOST] * (world - 1) + [None]

    def test_a_rank_that_takes_no_jobs(self, world: int) -> None:
        """Rank 0 goes on or hears `CoordinationLost`; each of its calls ends."""
        results = self.run_ranks(world, share_with_nobody_taking)
        assert results[0] > 0

    @pytest.mark.parametrize("behind", [1, -1])
    def test_one_order_where_rank_0_gave_up(self, world: int, behind: int) -> None:
        """Rank 0 may hear `CoordinationLost` for one that is behind: the others then all have that batch, or none."""
        shared, *taken = self.run_ranks(world, share_until_one_is_too_far_behind, behind % world)
        assert all(jobs == taken[0] for jobs in taken)
        rest = iter(taken[0])
        assert all(job in rest for job in shared), "what rank 0 shared is not there, or not in its order"

    # -- ends

    def test_after_close(self) -> None:
        """`ClosedError`, and a second `close` does nothing; whoever waits on another thread is woken."""
        for world in self.worlds:
            assert self.run_ranks(world, call_after_close) == [["ClosedError"] * 2] * world

    def test_close_wakes_this_ranks_own_threads(self, world: int) -> None:
        """They would wait for others longer than this suite does."""
        results = self.run_ranks(world, close_under_a_wait)
        assert all(set(result) <= {"ClosedError", LOST} for result in results)
        assert len(results[0]) == 2


# -- what ranks do


def agree_on_many(coordinator: Coordinator, n: int, jobs: Sequence[int]) -> list[Any]:
    """One job after the other."""
    return [attempt(coordinator, job, bits(coordinator.rank, job, n)) for job in jobs]


def agree_in_an_order_of_its_own(coordinator: Coordinator, n_jobs: int) -> dict[int, Any]:
    """All jobs at once, each in a thread, begun in an order that differs between ranks."""
    jobs = list(range(n_jobs))
    random.Random(coordinator.rank).shuffle(jobs)  # noqa: S311 - not for secrets
    ends = {job: in_a_thread(attempt, coordinator, job, bits(coordinator.rank, job, 64)) for job in jobs}
    return {job: result_of(ends[job]) for job in range(n_jobs)}


def agree_with_one_job_slow(coordinator: Coordinator) -> list[Any]:
    """Job 0 first on all ranks but the last, where it comes last."""
    rank = coordinator.rank
    if rank == coordinator.world - 1:
        others = [attempt(coordinator, job, bits(rank, job, 16)) for job in range(1, 10)]
        return [attempt(coordinator, 0, bits(rank, 0, 16)), *others]
    slow = in_a_thread(attempt, coordinator, 0, bits(rank, 0, 16))
    others = [attempt(coordinator, job, bits(rank, job, 16)) for job in range(1, 10)]
    return [result_of(slow), *others]


def agree_but_for_one(coordinator: Coordinator) -> list[Any]:
    """The last rank does not come to job 0; all come to job 1."""
    absent = coordinator.rank == coordinator.world - 1
    first = None if absent else attempt(coordinator, 0, np.ones(4, dtype=np.bool_), timeout=0.1)
    return [first, attempt(coordinator, 1, np.ones(4, dtype=np.bool_))]


def agree_without_the_last(coordinator: Coordinator) -> list[Any] | None:
    """The last rank leaves while the others wait for it, longer than the suite waits."""
    meet(coordinator)
    if coordinator.rank == coordinator.world - 1:
        coordinator.close()
        return None
    return [attempt(coordinator, job, np.ones(4, dtype=np.bool_), timeout=10 * PATIENCE_S) for job in range(2)]


def agree_at_the_last_moment(coordinator: Coordinator, n_jobs: int) -> list[Any]:
    """Waits of about as long as the others are late, and all jobs at once."""
    luck = random.Random(coordinator.rank)  # noqa: S311 - not for secrets

    def one(job: int, late: float) -> Any:
        time.sleep(late)
        return attempt(coordinator, job, bits(coordinator.rank, job, 16), timeout=0.02)

    ends = [in_a_thread(one, job, luck.random() * 0.03) for job in range(n_jobs)]
    return [result_of(end) for end in ends]


def agree_and_scribble(coordinator: Coordinator, n_jobs: int) -> list[Any]:
    """Overwrite what was brought and what was got."""
    taken = []
    for job in range(n_jobs):
        mine = bits(coordinator.rank, job, 64)
        value = coordinator.agree(job, mine, timeout=PATIENCE_S)
        taken.append(value.tolist())
        mine[:] = True
        value[:] = True
    return taken


def agree_after_one_gave_up(coordinator: Coordinator) -> Any:
    """The last rank comes to job 0 when rank 0 has given it up; the others wait all the while."""
    if coordinator.rank == 0:
        part = np.array([True, False] * 4)
        result = attempt(coordinator, 0, part, timeout=0.1)
        part[:] = True
        meet(coordinator)
        return result
    others = np.ones(8, dtype=np.bool_)
    if coordinator.rank == coordinator.world - 1:
        meet(coordinator)
        return attempt(coordinator, 0, others, timeout=0.2)
    waiting = in_a_thread(attempt, coordinator, 0, others)
    meet(coordinator)
    return result_of(waiting)


def agree_on_different_sizes(coordinator: Coordinator) -> Any:
    """As many bits as the rank's number says."""
    return attempt(coordinator, 0, np.ones(4 + coordinator.rank, dtype=np.bool_), timeout=0.5)


def agree_twice_at_once(coordinator: Coordinator) -> Any:
    """Rank 0 brings its part of job 0 twice before another rank comes to it."""
    part = np.ones(4, dtype=np.bool_)
    if coordinator.rank != 0:
        meet(coordinator)
        return attempt(coordinator, 0, part)
    refused = threading.Event()

    def bring() -> Any:
        try:
            return coordinator.agree(0, part, timeout=PATIENCE_S).tolist()
        except ConfigError:
            refused.set()
            return "ConfigError"

    ends = [in_a_thread(bring) for _ in range(2)]
    assert refused.wait(PATIENCE_S)
    meet(coordinator)
    return sorted((result_of(end) for end in ends), key=lambda result: result != "ConfigError")


def agree_at_once_alone(coordinator: Coordinator) -> Any:
    """Rank 0 asks and does not wait; nobody else comes."""
    return attempt(coordinator, 0, np.ones(1, dtype=np.bool_), timeout=0.0) if coordinator.rank == 0 else None


def share_many(coordinator: Coordinator, n_jobs: int) -> list[Any]:
    """Jobs in batches of 0 to 4."""
    if coordinator.rank != 0:
        return take_all(coordinator)
    jobs, sent = shared_jobs(n_jobs), 0
    taken: list[Job] = []
    for size in [0, 1, 4, 2, 3] * n_jobs:
        if sent == n_jobs:
            break
        taken += coordinator.share(jobs[sent : sent + size], timeout=PATIENCE_S)
        sent = min(n_jobs, sent + size)
    coordinator.share([last_job()], timeout=PATIENCE_S)
    return [describe(job) for job in taken]


def share_with_one_behind(coordinator: Coordinator, n_jobs: int) -> list[Any]:
    """The last rank takes its first job after rank 0 has shared some, and then slowly."""
    if coordinator.rank == coordinator.world - 1:
        time.sleep(0.1)
        return take_all(coordinator, pause=0.002)
    return share_many(coordinator, n_jobs)


def share_after_a_wait_in_vain(coordinator: Coordinator) -> list[Any]:
    """The others wait for a little before rank 0 shares anything."""
    if coordinator.rank == 0:
        meet(coordinator)
        (job,) = coordinator.share(shared_jobs(1), timeout=PATIENCE_S)
        coordinator.share([last_job()], timeout=PATIENCE_S)
        return ["nothing asked", [describe(job)]]
    try:
        coordinator.share(None, timeout=0.05)
        first = "a value"
    except CoordinationLost:
        first = LOST
    meet(coordinator)
    return [first, take_all(coordinator)]


def share_from_everywhere(coordinator: Coordinator) -> str:
    """Each rank brings jobs."""
    if coordinator.rank == 0:
        return "rank 0"
    try:
        coordinator.share(shared_jobs(1), timeout=PATIENCE_S)
    except ConfigError:
        return "ConfigError"
    return "a value"


def share_without_the_last(coordinator: Coordinator) -> str | None:
    """The last rank leaves; the others go on until they hear of it."""
    meet(coordinator)
    if coordinator.rank == coordinator.world - 1:
        coordinator.close()
        return None
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            coordinator.share(shared_jobs(1) if coordinator.rank == 0 else None, timeout=10 * PATIENCE_S)
        except CoordinationLost:
            return LOST
    return "never heard of it"


def share_with_nobody_taking(coordinator: Coordinator) -> int:
    """Rank 0 shares with nobody there to take it; how many calls came to their end."""
    if coordinator.rank != 0:
        return 0
    calls = 0
    try:
        for _ in range(1000):
            calls += 1
            coordinator.share(shared_jobs(1), timeout=0.05)
    except CoordinationLost:
        pass
    return calls


def share_until_one_is_too_far_behind(coordinator: Coordinator, behind: int) -> list[Any]:
    """One rank takes nothing until rank 0 has heard of it, or has shared many; then it takes, and rank 0 goes on."""
    if coordinator.rank == behind:
        meet(coordinator)
        return take_all(coordinator)
    if coordinator.rank != 0:
        taking = in_a_thread(take_all, coordinator)
        meet(coordinator)
        taken: list[Any] = result_of(taking)
        return taken
    *jobs, first, second = shared_jobs(300)
    shared: list[Job] = []
    try:
        for job in jobs:
            shared += coordinator.share([job], timeout=0.05)
            time.sleep(0.001)  # so that the others keep up, and one alone is behind
    except CoordinationLost:
        pass
    meet(coordinator)
    for job in (first, second, last_job()):
        shared += share_again(coordinator, job)
    return [describe(job) for job in shared[:-1]]


def share_again(coordinator: Coordinator, job: Job) -> Sequence[Job]:
    """Share a job, again and again where the others are still behind."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return coordinator.share([job], timeout=PATIENCE_S)
        except CoordinationLost:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def call_after_close(coordinator: Coordinator) -> list[str]:
    """Leave, then call."""
    coordinator.close()
    coordinator.close()
    said = []
    calls: Sequence[Callable[[], Any]] = (
        lambda: coordinator.agree(0, np.ones(1, dtype=np.bool_), timeout=PATIENCE_S),
        lambda: coordinator.share(None, timeout=PATIENCE_S),
    )
    for call in calls:
        try:
            call()
        except ClosedError:
            said.append("ClosedError")
    return said


def close_under_a_wait(coordinator: Coordinator) -> list[str]:
    """Rank 0's threads wait for others that never come, and then it leaves."""
    if coordinator.rank != 0:
        return []

    def wait(job: int) -> str:
        try:
            coordinator.agree(job, np.ones(1, dtype=np.bool_), timeout=10 * PATIENCE_S)
        except (ClosedError, CoordinationLost) as error:
            return type(error).__name__
        return "a value"

    ends = [in_a_thread(wait, job) for job in range(2)]
    time.sleep(0.02)  # it may leave before they wait, too
    coordinator.close()
    return [result_of(end) for end in ends]


# -- helpers


def bits(rank: int, job: int, n: int) -> Bitmap:
    """What a rank has of a job: most of it, so that the AND over ranks is not empty."""
    return np.random.default_rng([rank, job, n]).random(n) < 0.8


def in_common(world: int, job: int, n: int) -> list[bool]:
    """What all ranks have of a job."""
    common: list[bool] = np.logical_and.reduce([bits(rank, job, n) for rank in range(world)]).tolist()
    return common


def attempt(coordinator: Coordinator, job: int, ok: Bitmap, *, timeout: float = PATIENCE_S) -> Any:
    """Agree: the value as a list, or LOST."""
    try:
        return coordinator.agree(job, ok, timeout=timeout).tolist()
    except CoordinationLost:
        return LOST


def meet(coordinator: Coordinator) -> None:
    """Wait until every rank is here, once a test, by the coordinator itself."""
    coordinator.agree(_BARRIER, np.ones(1, dtype=np.bool_), timeout=PATIENCE_S)


def take_all(coordinator: Coordinator, *, pause: float = 0.0) -> list[Any]:
    """Take jobs until the last one."""
    taken: list[Any] = []
    while True:
        for job in coordinator.share(None, timeout=PATIENCE_S):
            if job.number == _LAST_JOB:
                return taken
            taken.append(describe(job))
        time.sleep(pause)


def shared_jobs(n: int) -> list[Job]:
    """Jobs that differ in all that a job has."""
    kinds = list(JobKind)
    jobs = []
    for number in range(n):
        size = number % 5
        rng = np.random.default_rng(number)
        keys = rng.integers(0, 256, (size, KEY_NBYTES), dtype=np.uint8)
        slots, blocks = rng.integers(0, 1 << 40, (2, size))
        jobs.append(Job(kinds[number % len(kinds)], number, keys, slots, 1.0 + number, blocks, number % 3))
    return jobs


def last_job() -> Job:
    """What tells the ranks of a test that no more jobs come."""
    nothing = np.zeros(0, dtype=np.int64)
    return Job(JobKind.SAVE, _LAST_JOB, np.zeros((0, KEY_NBYTES), dtype=np.uint8), nothing, 1.0)


def describe(job: Job) -> tuple[Any, ...]:
    """A job as plain data, which can be compared."""
    return (
        job.kind.value,
        job.number,
        job.keys.tobytes(),
        job.slots.tolist(),
        job.timeout,
        job.blocks.tolist(),
        job.group,
    )


def in_a_thread(call: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run a call in a thread of its own; a daemon, so that one that hangs does not hang the tests."""
    end: Future[Any] = Future()

    def run() -> None:
        try:
            end.set_result(call(*arguments))
        except BaseException as error:
            end.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return end


def result_of(end: Future[Any]) -> Any:
    """What a thread's call gave back, or its exception; fails where it does not end."""
    try:
        return end.result(2 * PATIENCE_S)
    except FutureTimeoutError:
        if end.done():
            raise
        pytest.fail(f"a call did not end within {2 * PATIENCE_S} s")
