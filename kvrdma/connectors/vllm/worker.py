"""The worker half: an agent on one rank's memory. Hooks run on the worker's main thread and only enqueue."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvrdma.backends import open_backend
from kvrdma.backends.breaker import BreakerBackend
from kvrdma.cache import BlockStatus, Job, JobKind, JobReport, TransferAgent
from kvrdma.connectors.vllm.identity import block_nbytes, layer_attention, make_shards
from kvrdma.connectors.vllm.layout import make_layout
from kvrdma.connectors.vllm.metadata import RankReports, StepJobs
from kvrdma.connectors.vllm.stats import KVRDMAStats, StatsFeed
from kvrdma.errors import ConfigError
from kvrdma.memory import BlockCopier, CpuCopier, MemfdSlabs, PinnedPool, node_of_device
from kvrdma.settings import Settings

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

# What jobs under way may take at the end. vLLM gives a worker 5 s to shut down (VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS),
# 4 s more after a SIGTERM, then kills it. Within the 5 s there must be room, too, for the end of L2's connection
# (`connect_timeout` at most, where it is being made) and for that of the process, which takes torch a second or two.
JOBS_END_S: Final = 1.5


def slots_per_rank(settings: Settings, kv_cache_config: KVCacheConfig, world: int) -> int:
    """How many slots each rank has: `l1_bytes` is of the whole engine. Raises `ConfigError` where none fits."""
    n = settings.l1_bytes // (world * block_nbytes(kv_cache_config))
    if n < 1:
        raise ConfigError(
            f"l1_bytes={settings.l1_bytes}: less than one block of {block_nbytes(kv_cache_config)} bytes on each of "
            f"{world} ranks"
        )
    return n


class WorkerHalf:
    """Registers the rank's KV cache, does the jobs that each step brings, and reports them."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> None:
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._settings = settings
        self._rank = 0
        self._attention: set[str] = set()
        self._agent: TransferAgent | None = None
        self._pool: PinnedPool | None = None
        self._copier: BlockCopier | None = None
        self._backend: BreakerBackend | None = None
        self._refused = ""  # why no job is done: set where the cache could be wrong
        self._loads: dict[int, str] = {}
        self._stale: set[int] = set()
        self._begun: StepJobs | None = None
        self._reports: list[JobReport] = []
        self._failed_loads: list[str] = []
        self._stats = StatsFeed()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Map the rank's blocks and make the pool's first slab; the others come while the engine serves.

        Errors here end the start, before anything is served.
        """
        shards = make_shards(self._vllm_config, self._kv_cache_config)
        if len(shards) > 1:
            from vllm.distributed.parallel_state import get_tp_group

            self._rank = int(get_tp_group().rank_in_group)
        layout = make_layout(self._kv_cache_config, kv_caches)
        n_slots = slots_per_rank(self._settings, self._kv_cache_config, len(shards))
        self._attention = layer_attention(self._vllm_config, [run.name for run in layout.runs])
        self._pool = PinnedPool(
            layout.nbytes, n_slots, source=MemfdSlabs(node=node_of_device(layout.device)), in_background=True
        )
        self._copier = make_copier(layout.device)
        self._copier.register(layout, self._pool)
        if self._settings.l2:
            self._backend = BreakerBackend(open_backend(self._settings.l2, self._settings))
        self._agent = TransferAgent(
            self._pool, shards[self._rank], rank=self._rank, backend=self._backend, copier=self._copier
        )
        self._agent.grow()
        logger.info(
            "kvrdma rank %d: %d slots of %d bytes, %d of them ready, L2 %s",
            self._rank,
            n_slots,
            layout.nbytes,
            self._pool.n_slots,
            self._settings.l2 or "none",
        )

    def begin(self, step: StepJobs) -> None:
        """Begin what the step brings, but for saves. Once a step, however often it is called."""
        if self._begun is step:
            return
        self._begun = step
        self._learn(step)
        self._submit([job for job in step.jobs if job.kind is not JobKind.SAVE])

    def begin_saves(self, step: StepJobs) -> None:
        """Begin the step's saves: the forward that fills their blocks has been launched."""
        self.begin(step)
        self._submit([job for job in step.jobs if job.kind is JobKind.SAVE])

    def results(self) -> tuple[set[str], set[str]]:
        """Requests whose loads have ended, and those of them that failed; each once."""
        finished, failed = set(self._failed_loads), set(self._failed_loads)
        self._failed_loads = []
        for report in self._agent.poll() if self._agent is not None else ():
            self._reports.append(report)
            request_id = self._loads.pop(report.number, None) if report.terminal else None
            if request_id is not None:
                finished.add(request_id)
                if (report.status != BlockStatus.OK).any() or report.number in self._stale:
                    failed.add(request_id)
                self._stale.discard(report.number)
        return finished, failed

    def reports(self) -> RankReports | None:
        """What was done since the last step, and how far the pool is: in each step while it grows."""
        pool = None if self._agent is None else self._agent.poll_pool()
        if not self._reports and pool is None:
            return None
        reports, self._reports = self._reports, []
        return RankReports(reports, [] if pool is None else [pool])

    def news(self) -> KVRDMAStats | None:
        """What this rank has moved since the last call."""
        if self._agent is None:
            return None
        failures = 0 if self._backend is None else self._backend.failures
        leases = {str(self._rank): 0 if self._pool is None else self._pool.n_leases}
        return self._stats.news({**self._agent.stats(), "l2_failures": failures, "leases": leases})

    def shutdown(self) -> None:
        """Let transfers end, within bounds, and give everything back."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        ended = agent.close(timeout=JOBS_END_S)
        if self._backend is not None:
            self._backend.close()  # ends the fetches and puts that are still under way
        if ended or agent.close(timeout=0.0):  # else a copy may be at the memory yet
            if self._copier is not None:
                self._copier.close()
            if self._pool is not None:
                self._pool.close()

    def _learn(self, step: StepJobs) -> None:
        self._loads.update(step.loads)
        self._failed_loads += step.failed_loads
        self._stale.update(number for number in step.stale_loads if number in self._loads)
        if step.keyspace is not None and self._agent is not None:
            backend = step.keyspace.attention.split("/")[0]
            if self._attention != {backend}:
                self._refused = f"the layers use {sorted(self._attention)}, the scheduler expected {backend}"
                logger.error("kvrdma saves and loads nothing: %s", self._refused)
            self._agent.use_keyspace(step.keyspace)

    def _submit(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        if self._agent is None or self._copier is None or self._refused:
            for job in jobs:
                self._fail(job)
            return
        needs_fence = any(job.kind in {JobKind.SAVE, JobKind.LOAD} for job in jobs)
        self._agent.submit(jobs, fence=self._copier.fence() if needs_fence else None)

    def _fail(self, job: Job) -> None:
        status = np.full(len(job), BlockStatus.FAILED, dtype=np.uint8)
        self._reports.append(JobReport(job.number, self._rank, status, terminal=True))
        request_id = self._loads.pop(job.number, None)
        if request_id is not None:
            self._failed_loads.append(request_id)


def make_copier(device: str) -> Any:
    """The copier for a device, by torch's name for it; raises `ConfigError` where there is none."""
    if device == "cpu":
        return CpuCopier()
    if device.startswith("cuda"):
        from kvrdma.memory.cuda import CudaCopier

        return CudaCopier(device)
    raise ConfigError(f"kvrdma: KV caches on {device} are not supported; cpu and cuda are")
