"""Index and agent where transfers are late, never end or fail: no slot is used while anything may write it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from holding import PATIENCE_S, HoldingBackend

from kvrdma.backends import GetStatus, GetTransfer, StorageBackend
from kvrdma.cache import (
    Answer,
    BlockStatus,
    CacheIndex,
    IndexOptions,
    Job,
    JobKind,
    JobReport,
    ProbeAnswer,
    TransferAgent,
)
from kvrdma.errors import BackendError, RegionError
from kvrdma.keys import KeyBatch, KeySpace, block_keys, pack_keys, unpack_keys
from kvrdma.layout import BlockLayout, ByteRun, Shard, checksum
from kvrdma.memory import Copy, CpuCopier, Fence, Lease, Memory, PinnedPool, Spans
from kvrdma.metrics import Reason
from kvrdma.policies.lru import LruPolicy
from kvrdma.policies.offload import OffloadAll
from kvrdma.transports import Endpoint, Opcode, RemoteRegion, Rights, Transfer, TransferBatch, Transport
from kvrdma.transports.faulty import Fault, FaultKind, FaultPlan, FaultyTransport
from kvrdma.transports.inproc import InprocTransport

NBYTES, N_SLOTS, N_BLOCKS = 512, 4, 8
SPACE = KeySpace("m", "w", "c", "bfloat16", "a", 64, 2, 4)
SHARD = Shard(0, 0, 2, 0, 1)
KEYS = block_keys(SPACE, range(4 * N_SLOTS))
OTHERS = block_keys(SPACE, range(100, 100 + 4 * N_SLOTS))
FETCH_TIMEOUT_S = 0.1


def content(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, NBYTES, dtype=np.uint8).tobytes()


BLOCKS = {key: content(i) for i, key in enumerate(KEYS)}


class Node:
    """One engine of one rank: index, agent, pool and device, and a clock of the index's own."""

    def __init__(self, backend: StorageBackend, *, copier: CpuCopier | None = None) -> None:
        self.now = 0.0
        self.index = CacheIndex(
            N_SLOTS,
            LruPolicy(N_SLOTS),
            OffloadAll(),
            IndexOptions(has_l2=True, fetch_timeout_s=FETCH_TIMEOUT_S, waiting_share=1.0),
            clock=lambda: self.now,
        )
        self.backend = backend
        self.pool = PinnedPool(NBYTES, N_SLOTS)
        self.device = np.zeros((N_BLOCKS, NBYTES), dtype=np.uint8)
        self.copier = CpuCopier() if copier is None else copier
        run = ByteRun("layer", self.device.ctypes.data, NBYTES, NBYTES)
        self.copier.register(BlockLayout(N_BLOCKS, (run,), keepalive=self.device), self.pool)
        self.changed = threading.Event()
        self.agent = TransferAgent(self.pool, SHARD, backend=backend, copier=self.copier, on_report=self.changed.set)

    def step(self, *, fence: Fence | None = None) -> list[Job]:
        """Carry reports in and jobs out."""
        for report in self.agent.poll():
            self.index.on_report(report)
        jobs = self.index.take_jobs()
        self.agent.submit(jobs, fence=fence)
        return jobs

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            self.step()
            if not condition():
                assert self.changed.wait(PATIENCE_S)

    def fetch(self, request: str) -> Job:
        """Ask for all blocks of L2; they are on their way."""
        assert self.index.lookup(request, KEYS, 0).answer is Answer.PENDING
        (probe,) = self.index.take_probes()
        found = self.backend.lookup(probe.keys, [SHARD], timeout=1.0)
        self.index.on_probe(ProbeAnswer(probe.number, found.present, False, ()))
        (job,) = self.step()
        assert job.kind is JobKind.FETCH
        return job

    def gives_up(self, request: str) -> None:
        """The index's deadline of the fetch passes: the request is told that nothing is there."""
        self.now += 2 * FETCH_TIMEOUT_S
        offer = self.index.lookup(request, KEYS, 0)
        assert (offer.answer, offer.n_blocks) == (Answer.OFFERED, 0)
        self.index.finished(request)

    @property
    def zombies(self) -> int:
        return int(self.index.stats()["zombies"])

    def save(self, keys: list[bytes]) -> Job | None:
        return self.index.save(keys, range(len(keys)), parents=[None] * len(keys))

    def close(self) -> None:
        assert self.agent.close(timeout=PATIENCE_S)
        assert self.pool.n_leases == 0
        self.pool.close()


class PeerBackend(HoldingBackend):
    """Gets from a peer's memory over a transport: a READ is a get."""

    def __init__(self, transport: Transport, peer: Transport) -> None:
        super().__init__(dict(BLOCKS))
        self.transport, self.peer = transport, peer
        self._stored = np.frombuffer(b"".join(BLOCKS.values()), dtype=np.uint8).copy()
        self._remote: RemoteRegion = peer.export(peer.register(Memory.of(self._stored)), Rights.READ)
        self.listener = peer.listen("agent-failures")
        self._local = {}
        self.endpoint = self.connect()

    def connect(self) -> Endpoint:
        endpoint = self.transport.connect(self.listener.contact_address, timeout=PATIENCE_S)
        self.listener.accept(timeout=PATIENCE_S)
        return endpoint

    def register(self, memory: Memory) -> None:
        self._local[memory.address] = self.transport.register(memory)

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        transfer = GetTransfer(len(keys))
        rows = np.array([KEYS.index(key) for key in unpack_keys(keys)], dtype=np.int64)
        batch = TransferBatch(
            Opcode.READ,
            [self._local[memory.address] for memory in target.memories],
            [self._remote],
            target.memory_row,
            target.offset,
            np.zeros_like(rows),
            rows * NBYTES,
            target.nbytes,
        )

        def ended(read: Transfer) -> None:
            for i in np.flatnonzero(read.ok).tolist():
                transfer.checksums[i] = checksum(KEYS[rows[i]], shard.encode(), target.parts(i))
                transfer.status[i] = GetStatus.OK
            transfer.conclude(read.error)

        self.endpoint.post(batch, hold=hold, timeout=timeout).add_done_callback(ended)
        return transfer


@pytest.fixture
def held() -> HoldingBackend:
    return HoldingBackend(dict(BLOCKS))


@pytest.fixture
def node(held: HoldingBackend) -> Iterator[Node]:
    node = Node(held)
    yield node
    node.close()


def test_a_slot_is_not_used_again_while_data_that_comes_too_late_may_still_land(
    node: Node, held: HoldingBackend
) -> None:
    job = node.fetch("r")
    node.gives_up("r")
    assert node.index.metrics.misses[Reason.NOT_YET] == N_SLOTS
    assert node.zombies == N_SLOTS
    assert node.save(OTHERS) is None  # there is no slot to be had
    assert node.index.metrics.counts["save_skipped_no_room"] == N_SLOTS
    with pytest.raises(RegionError, match="not terminal"):
        node.pool.lease(job.slots, exclusive=True)
    held.land(whole=False)  # here it lands, long after everybody has given up
    node.step()
    assert node.zombies == N_SLOTS
    assert node.save(OTHERS) is None
    held.land()
    node.until(lambda: node.zombies == 0)
    assert node.index.stats()["l1_free_blocks"] == N_SLOTS
    assert node.index.lookup("s", KEYS, 0, ready_only=True).n_blocks == 0  # too late is too late
    node.device[:N_SLOTS] = 9
    assert len(node.save(OTHERS) or ()) == N_SLOTS
    node.until(lambda: not node.index.busy(JobKind.SAVE))
    assert all((node.pool.view(slot) == 9).all() for slot in range(N_SLOTS))
    held.land()  # the put of what was saved


@pytest.mark.parametrize("kind", [FaultKind.DROP, FaultKind.LATE])
def test_an_endpoint_that_never_ends_a_fetch_is_aborted_and_the_slots_come_back(kind: FaultKind) -> None:
    plan = FaultPlan.script(Fault(kind))
    with (
        FaultyTransport(InprocTransport(), plan) as transport,
        FaultyTransport(InprocTransport(), FaultPlan.none()) as peer,
    ):
        backend = PeerBackend(transport, peer)
        node = Node(backend)
        node.fetch("r")
        node.gives_up("r")
        assert node.zombies == N_SLOTS
        assert node.save(OTHERS) is None
        node.until(lambda: node.zombies == 0)  # by the transport's own two time-outs
        assert plan.counts[kind] == 1
        assert backend.endpoint.closed() == (kind is FaultKind.DROP)
        assert node.index.stats()["l1_free_blocks"] == N_SLOTS
        backend.endpoint = backend.connect()
        node.fetch("s")
        node.until(lambda: not node.index.busy())
        assert node.index.lookup("s", KEYS, 0).n_blocks == N_SLOTS
        assert [bytes(node.pool.view(slot.number)) for slot in node.index.take("s", N_SLOTS)] == list(BLOCKS.values())
        node.close()
        backend.listener.close()


class FailingCopier(CpuCopier):
    """Copies a part, then fails."""

    failing = True

    def _copy(self, group: int, blocks: np.ndarray, slots: np.ndarray, *, to_slots: bool, after: Fence) -> Copy:
        if self.failing:
            super()._copy(group, blocks[:1], slots[:1], to_slots=to_slots, after=after)
            raise RuntimeError("the device fell off the bus")
        return super()._copy(group, blocks, slots, to_slots=to_slots, after=after)


def test_a_copier_that_fails_in_the_middle_loses_the_jobs_blocks_and_nothing_else(held: HoldingBackend) -> None:
    copier = FailingCopier()
    node = Node(held, copier=copier)
    node.device[:] = np.arange(N_BLOCKS)[:, None]
    saved = node.save(OTHERS)
    assert saved is not None
    node.until(lambda: not node.index.busy())
    assert node.index.metrics.counts["save_failed_blocks"] == N_SLOTS  # also the one that was copied
    assert node.index.stats()["l1_free_blocks"] == N_SLOTS
    assert node.index.lookup("r", OTHERS, 0, ready_only=True).n_blocks == 0
    copier.failing = False
    node.save(OTHERS)
    node.until(lambda: not node.index.busy(JobKind.SAVE))
    copier.failing = True
    node.index.finished("r")
    assert node.index.lookup("r", OTHERS, 0, ready_only=True).n_blocks == N_SLOTS
    assert node.index.allocated("r", range(4, 8)) is not None
    node.until(lambda: not node.index.busy(JobKind.LOAD))
    assert node.index.metrics.misses[Reason.LOAD_FAILED] == N_SLOTS
    held.land()
    node.until(lambda: not node.index.busy())
    node.close()


def test_a_close_with_jobs_open_ends_and_takes_no_memory_away(held: HoldingBackend) -> None:
    node = Node(held)
    node.fetch("r")
    assert node.agent.close(timeout=0.05) is False
    assert node.pool.n_leases == 1
    held.close()  # which ends what is under way
    assert node.agent.close(timeout=PATIENCE_S)
    (report,) = node.agent.poll()
    assert report.status.tolist() == [BlockStatus.FAILED] * N_SLOTS
    node.close()


@pytest.mark.parametrize("kind", list(JobKind))
def test_no_job_begins_after_the_close(held: HoldingBackend, kind: JobKind) -> None:
    node = Node(held)
    assert node.agent.close(timeout=PATIENCE_S)
    node.agent.submit([Job(kind, 1, pack_keys(KEYS[:2]), np.arange(2), 1.0, np.arange(2))])
    (report,) = node.agent.poll()
    assert report.status.tolist() == [BlockStatus.FAILED] * 2
    node.close()


class Nonsense(HoldingBackend):
    """Answers with a status that does not exist, or with too few."""

    def __init__(self, statuses: list[int]) -> None:
        super().__init__(dict(BLOCKS))
        self.statuses = np.array(statuses, dtype=np.uint8)

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        transfer = GetTransfer(len(keys), hold=hold)
        transfer.status = self.statuses
        transfer.finish()
        return transfer


@pytest.mark.parametrize("statuses", [[0, 0, 0, 77], [0, 0]])
def test_an_answer_that_makes_no_sense_is_a_failure(statuses: list[int]) -> None:
    node = Node(Nonsense(statuses))
    node.fetch("r")
    node.until(lambda: not node.index.busy())
    assert node.index.lookup("r", KEYS, 0).n_blocks == 0
    assert node.index.metrics.counts["l2_fetched_blocks"] == 0
    node.close()


def test_whoever_is_told_of_a_report_may_fail() -> None:
    held = HoldingBackend(dict(BLOCKS))
    with PinnedPool(NBYTES, N_SLOTS) as pool:

        def fail() -> None:
            raise RuntimeError("not now")

        agent = TransferAgent(pool, SHARD, backend=held, on_report=fail)
        agent.submit([Job(JobKind.PUT, n, pack_keys(KEYS[:1]), np.array([n]), 1.0) for n in range(3)])
        held.land()
        held.fail(BackendError("no"))
        held.close()
        agent.submit([Job(JobKind.PUT, 3, pack_keys(KEYS[:1]), np.array([N_SLOTS]), 1.0)])  # no such slot
        reports: list[JobReport] = agent.poll()
        assert [(report.number, report.status.tolist()) for report in reports] == [
            (0, [BlockStatus.OK]),
            (1, [BlockStatus.FAILED]),
            (2, [BlockStatus.FAILED]),
            (3, [BlockStatus.FAILED]),
        ]
        assert agent.close(timeout=PATIENCE_S)
