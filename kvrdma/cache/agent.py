"""`TransferAgent`: does the jobs on one rank's memory, and reports. The index decides, the agent moves bytes.

The caller's thread only enqueues and polls. Copies from the device run on one thread and those to it on another,
each in the order of its jobs; fetches and puts run in the backend, and their ends come back on its threads. Jobs
on the same slots are in no order: the index emits one that reads a slot only once the job that wrote it is
terminal on every rank, and one that writes it only once nothing holds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.backends import GetStatus, GetTransfer, PutStatus, PutTransfer, StorageBackend
from kvrdma.cache.jobs import BlockStatus, Job, JobKind, JobReport, PoolReport
from kvrdma.errors import BackendError, ClosedError, KVRDMAError
from kvrdma.keys import KeySpace, unpack_keys
from kvrdma.layout import Checksums, Shard, checksum
from kvrdma.memory import BlockCopier, Fence, Lease, Memory, PinnedPool, PoolGrowth
from kvrdma.metrics import Metrics
from kvrdma.transports import Transfer
from kvrdma.transports.base import call_guarded

logger = logging.getLogger(__name__)

_STATUS_OF_GET: Final = np.array(
    [BlockStatus.OK, BlockStatus.MISSING, BlockStatus.CHECKSUM, BlockStatus.FAILED], dtype=np.uint8
)
_STATUS_OF_PUT: Final = np.array(
    [BlockStatus.OK, BlockStatus.OK, BlockStatus.DECLINED, BlockStatus.FAILED], dtype=np.uint8
)
assert [int(GetStatus.OK), int(GetStatus.FAILED)] == [int(PutStatus.STORED), int(PutStatus.FAILED)] == [0, 3]


class TransferAgent:
    """One rank's half of the cache. `on_report` is called, on any thread, when there is something new to poll.

    The pool may have fewer slots than are planned: `grow` has them made in the background, and `poll_pool` says
    how far it is.
    """

    def __init__(
        self,
        pool: PinnedPool,
        shard: Shard,
        *,
        rank: int = 0,
        backend: StorageBackend | None = None,
        copier: BlockCopier | None = None,
        on_report: Callable[[], None] | None = None,
    ) -> None:
        self._pool = pool
        self._shard = shard
        self._shard_name = shard.encode()
        self._rank = rank
        self._backend = backend
        self._copier = copier
        self._on_report = on_report
        self._checksums: Checksums = np.zeros(pool.n_planned, dtype=np.uint64)
        self._reports: deque[JobReport] = deque()
        # Loads have a thread of their own: a request waits for them, and for a save nobody does.
        self._gathers = ThreadPoolExecutor(1, thread_name_prefix="kvrdma-gather")
        self._scatters = ThreadPoolExecutor(1, thread_name_prefix="kvrdma-scatter")
        self._idle = threading.Condition()
        self._n_open = 0
        self._begun: dict[int, float] = {}
        self._metrics = Metrics()
        self._closed = False
        self._growth = PoolGrowth(pool, prepare=self._prepare, on_change=self._changed)
        self._told_pool = False

    def grow(self) -> None:
        """Begin to bring the pool to its planned size; called once, and returns at once."""
        self._growth.start()

    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Say which key space the jobs that follow belong to."""
        if self._backend is not None:
            self._backend.use_keyspace(keyspace)

    def submit(self, jobs: Sequence[Job], *, fence: Fence | None = None) -> None:
        """Begin jobs; returns at once. `fence` is what device copies must wait for."""
        for job in jobs:
            with self._idle:
                self._n_open += 1
                self._begun[job.number] = time.monotonic()
            try:
                if self._closed:
                    raise ClosedError("agent: closed")
                self._begin(job, fence)
            except Exception as error:  # whatever it is: the job must end, and the engine must not
                if not isinstance(error, KVRDMAError):
                    logger.exception("job %d (%s) could not begin", job.number, job.kind.value)
                self._report(job, np.full(len(job), BlockStatus.FAILED, dtype=np.uint8), error)

    def poll(self) -> list[JobReport]:
        """What was done since the last call."""
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        return reports

    def poll_pool(self) -> PoolReport | None:
        """How far the pool is: each time while it grows, and once when it has ended."""
        growing = self._growth.growing  # before the number: that of a pool that has ended is its last
        if self._told_pool:
            return None
        self._told_pool = not growing
        return PoolReport(self._rank, self._growth.n_ready, growing, self._growth.failure)

    def stats(self) -> dict[str, Any]:
        """Blocks, bytes and durations by kind of job: `load_blocks`, `load_bytes`, `seconds["load"]`, and so on."""
        with self._idle:
            return self._metrics.snapshot()

    def close(self, *, timeout: float = 10.0) -> bool:
        """End the growth of the pool, and wait for the jobs under way; True where all have ended. May be repeated."""
        deadline = time.monotonic() + timeout
        self._closed = True
        ended = self._growth.close(timeout=timeout)
        with self._idle:
            left = max(0.0, deadline - time.monotonic())
            ended = self._idle.wait_for(lambda: self._n_open == 0, left) and ended
        for copies in (self._gathers, self._scatters):
            copies.shutdown(wait=ended)
        return ended

    def _prepare(self, memory: Memory) -> None:
        if self._copier is not None:
            self._copier.prepare(memory)
        if self._backend is not None:
            self._backend.register(memory)

    def _changed(self) -> None:
        if self._on_report is not None:
            call_guarded(self._on_report)  # its fault is not the job's, which has ended

    def _begin(self, job: Job, fence: Fence | None) -> None:
        match job.kind:
            case JobKind.SAVE | JobKind.LOAD:
                saves = job.kind is JobKind.SAVE
                lease = self._pool.lease(job.slots, exclusive=saves)
                try:
                    (self._gathers if saves else self._scatters).submit(self._copy, job, lease, fence)
                except RuntimeError:
                    lease.release()
                    raise ClosedError("agent: closed") from None
            case JobKind.FETCH:
                self._fetch(job)
            case JobKind.PUT:
                self._put(job)

    def _copy(self, job: Job, lease: Lease, fence: Fence | None) -> None:
        """SAVE and LOAD, on the thread of either."""
        status = np.full(len(job), BlockStatus.FAILED, dtype=np.uint8)
        failure: Exception | None = None
        try:
            with lease:
                if len(job.blocks):
                    if self._copier is None:
                        raise KVRDMAError("a job with device blocks on an agent without a copier")
                    move = self._copier.gather if job.kind is JobKind.SAVE else self._copier.scatter
                    after = self._copier.fence() if fence is None else fence
                    move(job.group, job.blocks, job.slots, after=after).wait()
                if job.kind is JobKind.SAVE:
                    self._seal(job)
            status[:] = BlockStatus.OK
        except Exception as error:  # a copy that failed is a failed job, never the engine's end
            logger.exception("job %d (%s) failed", job.number, job.kind.value)
            failure = error
        self._report(job, status, failure)

    def _seal(self, job: Job) -> None:
        """Make the checksums of blocks that have just been saved."""
        for key, slot in zip(unpack_keys(job.keys), job.slots.tolist(), strict=True):
            self._checksums[slot] = checksum(key, self._shard_name, [self._pool.view(slot)])

    def _fetch(self, job: Job) -> None:
        assert self._backend is not None
        with self._pool.lease(job.slots, exclusive=True) as lease:
            transfer = self._backend.get_into(
                job.keys, self._shard, self._pool.spans(job.slots), hold=lease, timeout=job.timeout
            )

        def statuses(done: Transfer) -> NDArray[np.uint8]:
            assert isinstance(done, GetTransfer)
            self._checksums[job.slots[done.ok]] = done.checksums[done.ok]
            return _STATUS_OF_GET[done.status]

        self._report_end(job, transfer, statuses)

    def _put(self, job: Job) -> None:
        assert self._backend is not None
        with self._pool.lease(job.slots) as lease:
            transfer = self._backend.put(
                job.keys,
                self._shard,
                self._pool.spans(job.slots),
                self._checksums[job.slots],
                hold=lease,
                timeout=job.timeout,
            )

        def statuses(done: Transfer) -> NDArray[np.uint8]:
            assert isinstance(done, PutTransfer)
            return _STATUS_OF_PUT[done.status]

        self._report_end(job, transfer, statuses)

    def _report_end(self, job: Job, transfer: Transfer, statuses: Callable[[Transfer], NDArray[np.uint8]]) -> None:
        """Report a job once its transfer is terminal, also where a backend's answer makes no sense."""

        def ended(done: Transfer) -> None:
            error: Exception | None = done.error
            try:
                status = statuses(done)
                if status.shape != (len(job),):
                    raise BackendError(f"{len(job)} blocks, {len(status)} answers")
            except Exception as failure:  # a job without a report would hold its slots for ever
                logger.exception("job %d (%s): an answer that makes no sense", job.number, job.kind.value)
                status, error = np.full(len(job), BlockStatus.FAILED, dtype=np.uint8), failure
            self._report(job, status, error)

        transfer.add_done_callback(ended)

    def _report(self, job: Job, status: NDArray[np.uint8], error: Exception | None) -> None:
        if error is not None:
            logger.info("job %d (%s): %s", job.number, job.kind.value, error)
        self._reports.append(JobReport(job.number, self._rank, status, terminal=True))
        kind, n_ok = job.kind.value, int((status == BlockStatus.OK).sum())
        with self._idle:
            self._metrics.add(f"{kind}_blocks", n_ok)
            self._metrics.add(f"{kind}_bytes", n_ok * self._pool.slot_nbytes)
            self._metrics.add(f"{kind}_failed_blocks", len(job) - n_ok)
            self._metrics.observe(kind, time.monotonic() - self._begun.pop(job.number))
            self._n_open -= 1
            self._idle.notify_all()
        self._changed()
