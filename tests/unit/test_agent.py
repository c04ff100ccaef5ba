"""One rank's agent on real memory: a pinned pool, blocks of "device" memory in numpy arrays, and `memory://`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kvrdma.backends import open_backend
from kvrdma.backends.memory import MemoryBackend
from kvrdma.cache import BlockStatus, Job, JobKind, JobReport, TransferAgent
from kvrdma.keys import KeySpace, block_keys, pack_keys
from kvrdma.layout import BlockLayout, ByteRun, Shard
from kvrdma.memory import CpuCopier, PinnedPool
from kvrdma.settings import Settings

LAYERS, LAYER_NBYTES, N_BLOCKS, N_SLOTS = 3, 320, 16, 8
SHARD = Shard(0, 0, LAYERS, 0, 1)
SPACE = KeySpace(
    model="m",
    weights="w",
    config="c",
    kv_dtype="bfloat16",
    attention="a",
    head_size=64,
    layers=LAYERS,
    block_tokens=4,
)
KEYS = block_keys(SPACE, range(4 * N_SLOTS))
OK, MISSING, CHECKSUM, FAILED = BlockStatus.OK, BlockStatus.MISSING, BlockStatus.CHECKSUM, BlockStatus.FAILED


class Rank:
    """An agent with what belongs to one rank."""

    def __init__(self, backend: MemoryBackend | None, *, seed: int = 0, copier: bool = True) -> None:
        self.device = [
            np.random.default_rng((seed, layer)).integers(0, 256, (N_BLOCKS, LAYER_NBYTES), dtype=np.uint8)
            for layer in range(LAYERS)
        ]
        self.pool = PinnedPool(LAYERS * LAYER_NBYTES, N_SLOTS)
        runs = tuple(
            ByteRun(f"layer {i}", layer.ctypes.data, LAYER_NBYTES, LAYER_NBYTES) for i, layer in enumerate(self.device)
        )
        self.copier = CpuCopier()
        self.copier.register(BlockLayout(N_BLOCKS, runs, keepalive=self.device), self.pool)
        self.reported = threading.Event()
        self.agent = TransferAgent(
            self.pool,
            SHARD,
            rank=3,
            backend=backend,
            copier=self.copier if copier else None,
            on_report=self.reported.set,
        )
        self.agent.use_keyspace(SPACE)
        self._number = 0

    def block(self, number: int) -> bytes:
        return b"".join(layer[number].tobytes() for layer in self.device)

    def job(self, kind: JobKind, slots: Sequence[int], blocks: Sequence[int] = (), *, first: int = 0) -> Job:
        self._number += 1
        return Job(
            kind,
            self._number,
            pack_keys(KEYS[first : first + len(slots)]),
            np.array(slots, dtype=np.int64),
            10.0,
            np.array(blocks, dtype=np.int64),
        )

    def wait(self, n: int) -> list[JobReport]:
        """The next n reports."""
        reports: list[JobReport] = []
        while len(reports) < n:
            assert self.reported.wait(30)
            self.reported.clear()
            reports += self.agent.poll()
        return reports

    def do(self, kind: JobKind, slots: Sequence[int], blocks: Sequence[int] = (), *, first: int = 0) -> list[int]:
        """The statuses of one job that was done."""
        job = self.job(kind, slots, blocks, first=first)
        self.agent.submit([job])
        (report,) = self.wait(1)
        assert (report.number, report.rank, report.terminal) == (job.number, 3, True)
        statuses: list[int] = report.status.tolist()
        return statuses

    def close(self) -> None:
        assert self.agent.close()
        assert self.pool.n_leases == 0
        self.pool.close()


@pytest.fixture
def backend() -> Iterator[MemoryBackend]:
    with open_backend("memory://?capacity=16MiB", Settings()) as backend:
        assert isinstance(backend, MemoryBackend)
        yield backend


@pytest.fixture
def rank(backend: MemoryBackend) -> Iterator[Rank]:
    rank = Rank(backend)
    yield rank
    rank.close()


@pytest.mark.parametrize(
    ("blocks", "slots"), [([0, 1, 2, 3], [0, 1, 2, 3]), ([9, 2, 15, 0], [7, 1, 4, 0]), ([5, 6, 1, 2], [2, 3, 6, 7])]
)
def test_from_one_device_over_l2_into_another(
    backend: MemoryBackend, rank: Rank, blocks: list[int], slots: list[int]
) -> None:
    assert rank.do(JobKind.SAVE, slots, blocks) == [OK] * 4
    assert [bytes(rank.pool.view(slot)) for slot in slots] == [rank.block(block) for block in blocks]
    assert rank.do(JobKind.PUT, slots) == [OK] * 4
    assert rank.do(JobKind.PUT, slots) == [OK] * 4  # there already is as good as stored
    other = Rank(backend, seed=1)
    before = [other.block(number) for number in range(N_BLOCKS)]
    assert other.do(JobKind.FETCH, [3, 2, 5, 6]) == [OK] * 4
    assert other.do(JobKind.LOAD, [3, 2, 5, 6], [8, 9, 1, 4]) == [OK] * 4
    expected = list(before)
    for target, source in zip([8, 9, 1, 4], blocks, strict=True):
        expected[target] = rank.block(source)
    assert [other.block(number) for number in range(N_BLOCKS)] == expected
    # What was fetched carries its checksum, and can be put from there.
    backend.delete(pack_keys(KEYS), timeout=10)
    assert other.do(JobKind.PUT, [3, 2, 5, 6]) == [OK] * 4
    assert rank.do(JobKind.FETCH, [4, 5, 6, 7]) == [OK] * 4
    other.close()


def test_slots_that_the_caller_filled_are_only_sealed(backend: MemoryBackend) -> None:
    rank = Rank(backend, copier=False)
    rank.pool.view(2)[:] = 7
    assert rank.do(JobKind.SAVE, [2]) == [OK]
    assert rank.do(JobKind.PUT, [2]) == [OK]
    assert rank.do(JobKind.FETCH, [5]) == [OK]
    assert (rank.pool.view(5) == 7).all()
    rank.close()


def test_a_hole_in_a_fetch_is_missing_in_its_place(rank: Rank) -> None:
    assert rank.do(JobKind.SAVE, [0, 1, 2, 3], [0, 1, 2, 3]) == [OK] * 4
    assert rank.do(JobKind.PUT, [0], first=0) == [OK]
    assert rank.do(JobKind.PUT, [2, 3], first=2) == [OK] * 2
    assert rank.do(JobKind.FETCH, [4, 5, 6, 7]) == [OK, MISSING, OK, OK]
    assert bytes(rank.pool.view(6)) == rank.block(2)
    assert bytes(rank.pool.view(7)) == rank.block(3)


def test_a_block_that_rotted_in_l2_is_found_and_dropped(backend: MemoryBackend, rank: Rank) -> None:
    assert rank.do(JobKind.SAVE, [0, 1, 2], [0, 1, 2]) == [OK] * 3
    assert rank.do(JobKind.PUT, [0, 1, 2]) == [OK] * 3
    entry = backend._store._entries[KEYS[1] + SHARD.encode()]
    entry.view()[17] ^= 1
    assert rank.do(JobKind.FETCH, [4, 5, 6]) == [OK, CHECKSUM, OK]
    assert rank.do(JobKind.FETCH, [4, 5, 6]) == [OK, MISSING, OK]
    assert rank.do(JobKind.PUT, [0, 1, 2]) == [OK] * 3  # and may be stored again
    assert rank.do(JobKind.FETCH, [4, 5, 6]) == [OK] * 3


def test_a_block_that_rotted_in_its_slot_before_it_was_put_is_never_taken_for_good(rank: Rank) -> None:
    assert rank.do(JobKind.SAVE, [0], [0]) == [OK]
    rank.pool.view(0)[5] ^= 1
    rank.do(JobKind.PUT, [0])
    assert rank.do(JobKind.FETCH, [1])[0] in {CHECKSUM, MISSING}


def test_the_bytes_of_one_key_are_not_those_of_another(backend: MemoryBackend, rank: Rank) -> None:
    assert rank.do(JobKind.SAVE, [0, 1], [0, 1]) == [OK] * 2
    assert rank.do(JobKind.PUT, [0, 1]) == [OK] * 2
    first, second = (backend._store._entries[key + SHARD.encode()] for key in KEYS[:2])
    second.view()[:] = first.view()
    second.checksum = first.checksum  # whole, with its own checksum, but in the wrong place
    assert rank.do(JobKind.FETCH, [4, 5]) == [OK, CHECKSUM]


@pytest.mark.parametrize("kind", [JobKind.SAVE, JobKind.LOAD])
def test_the_copies_of_one_direction_are_done_in_order(rank: Rank, kind: JobKind) -> None:
    first, second = rank.job(kind, [0, 1], [4, 5]), rank.job(kind, [2, 3], [6, 7])
    rank.agent.submit([first, second])
    assert [report.number for report in rank.wait(2)] == [first.number, second.number]


def test_a_fetch_does_not_begin_into_slots_that_are_in_use(rank: Rank) -> None:
    with rank.pool.lease([5]):
        assert rank.do(JobKind.FETCH, [4, 5]) == [FAILED] * 2
        assert rank.do(JobKind.SAVE, [4, 5], [0, 1]) == [FAILED] * 2
    assert rank.do(JobKind.SAVE, [4, 5], [0, 1]) == [OK] * 2


@pytest.mark.parametrize("kind", list(JobKind))
def test_a_job_on_slots_that_do_not_exist_fails(rank: Rank, kind: JobKind) -> None:
    blocks = [0, 1] if kind in {JobKind.SAVE, JobKind.LOAD} else []
    assert rank.do(kind, [0, N_SLOTS], blocks) == [FAILED] * 2


@pytest.mark.parametrize("kind", [JobKind.SAVE, JobKind.LOAD])
def test_a_copy_that_fails_is_a_failed_job_and_holds_nothing(rank: Rank, kind: JobKind) -> None:
    assert rank.do(kind, [0, 1], [3, N_BLOCKS + 5]) == [FAILED] * 2
    assert rank.pool.n_leases == 0
    assert rank.do(kind, [0, 1], [3, 4]) == [OK] * 2


def test_device_blocks_without_a_copier_fail(backend: MemoryBackend) -> None:
    rank = Rank(backend, copier=False)
    assert rank.do(JobKind.SAVE, [0], [0]) == [FAILED]
    rank.close()


@pytest.mark.parametrize("kind", [JobKind.FETCH, JobKind.PUT])
def test_l2_jobs_without_a_backend_or_with_a_closed_one_fail(kind: JobKind, backend: MemoryBackend) -> None:
    without, closed = Rank(None), Rank(backend)
    backend.close()
    for rank in (without, closed):
        assert rank.do(kind, [0, 1]) == [FAILED] * 2
        rank.close()


def test_close_waits_for_the_jobs_under_way_and_is_idempotent(rank: Rank) -> None:
    jobs = [rank.job(JobKind.SAVE, [0, 1], [0, 1]), rank.job(JobKind.LOAD, [0, 1], [2, 3])]
    rank.agent.submit(jobs)
    assert rank.agent.close()
    assert len(rank.agent.poll()) == 2
    assert rank.agent.close()


@pytest.mark.parametrize("kind", [JobKind.SAVE, JobKind.LOAD])
def test_a_job_after_the_close_fails_and_holds_nothing(rank: Rank, kind: JobKind) -> None:
    assert rank.agent.close()
    assert rank.do(kind, [0], [0]) == [FAILED]
    assert rank.pool.n_leases == 0


def test_copies_wait_for_the_fence_and_a_close_that_cannot_wait_for_them_takes_nothing_away(rank: Rank) -> None:
    assert rank.do(JobKind.SAVE, [1], [3]) == [OK]
    fence = threading.Event()
    saved, loaded = rank.block(5), rank.block(3)
    rank.agent.submit([rank.job(JobKind.SAVE, [0], [5]), rank.job(JobKind.LOAD, [1], [6])], fence=fence)
    assert rank.agent.close(timeout=0.01) is False
    assert rank.agent.poll() == []
    assert rank.pool.n_leases == 2  # the copies are still to come
    fence.set()
    assert [report.status.tolist() for report in rank.wait(2)] == [[OK], [OK]]
    assert (bytes(rank.pool.view(0)), rank.block(6)) == (saved, loaded)
    assert rank.pool.n_leases == 0
