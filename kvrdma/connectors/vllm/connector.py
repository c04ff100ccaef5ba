"""`KVRDMAConnector`: vLLM's interface, hook by hook, on the two halves. Nothing raises out of a hook.

Written for vLLM 0.32 and 0.33. What runs where, and the traps: docs/vllm.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvrdma.backends import backends
from kvrdma.connectors.vllm.metadata import RankReports, StepJobs
from kvrdma.connectors.vllm.scheduler import SchedulerHalf
from kvrdma.connectors.vllm.stats import KVRDMAPromMetrics, KVRDMAStats
from kvrdma.connectors.vllm.worker import WorkerHalf
from kvrdma.errors import ConfigError
from kvrdma.settings import Settings, Url

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])


def guarded(default: Any = None) -> Callable[[F], F]:
    """Make a hook log what goes wrong and answer `default`: the engine never dies for a cache."""

    def wrap(hook: F) -> F:
        @functools.wraps(hook)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception:
                logger.exception("kvrdma: %s failed; the engine goes on without it", hook.__name__)
                return default() if callable(default) else default

        return call  # type: ignore[return-value]  # the same signature, by functools.wraps

    return wrap


class KVRDMAConnector(KVConnectorBase_V1):
    """Offloads KV blocks into a pinned CPU cache and an L2 store, and loads them instead of computing them.

    Raises (at start only):
        ConfigError: a setting of `kv_connector_extra_config` that cannot be meant, or a model or parallelism
            that is not supported.
        CapacityError: the host has not the memory that `l1_bytes` asks for.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is not None
        log_with_vllm()
        transfer = vllm_config.kv_transfer_config
        settings = Settings.read(dict(transfer.kv_connector_extra_config), where="kv_connector_extra_config")
        check_l2(settings)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            warn_of_failure_policy(transfer)
            self._scheduler = SchedulerHalf(vllm_config, kv_cache_config, settings)
        else:
            self._worker = WorkerHalf(vllm_config, kv_cache_config, settings)

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped save is a future miss, nothing more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Layers outermost, then blocks: a block of a layer is one range, its heads one behind the other."""
        return "LBHNC"

    # -- the worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Map the rank's blocks and make its pool; raises, since nothing is served yet."""
        assert self._worker is not None
        self._worker.register_kv_caches(kv_caches)

    @guarded()
    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Begin this step's loads, fetches and puts."""
        if self._worker is not None and isinstance(self._connector_metadata, StepJobs):
            self._worker.begin(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are asynchronous, and ended before their request is scheduled."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do a layer: whole blocks are saved after the step."""

    @guarded()
    def wait_for_save(self) -> None:
        """Begin this step's saves; block references keep their sources, so nothing is waited for."""
        if self._worker is not None and isinstance(self._connector_metadata, StepJobs):
            self._worker.begin_saves(self._connector_metadata)

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The loads that have ended, each once."""
        assert self._worker is not None
        finished, failed = self._worker.results()
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    @guarded()
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What this rank has done since the last step."""
        return None if self._worker is None else self._worker.reports()

    @guarded()
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What is new since the last call: transfers on a worker, lookups and decisions in the scheduler."""
        half = self._worker or self._scheduler
        return None if half is None else half.news()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Stats as they come from another process."""
        return KVRDMAStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """The Prometheus metrics of this connector, beside vLLM's own."""
        return KVRDMAPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @guarded()
    def shutdown(self) -> None:
        """Let transfers end, within bounds, and give everything back."""
        if self._worker is not None:
            self._worker.shutdown()
        if self._scheduler is not None:
            self._scheduler.close()

    # -- the scheduler half

    @guarded()
    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """Take the engine's block pool."""
        if self._scheduler is not None:
            self._scheduler.bind_block_pool(gpu_block_pool)

    @guarded((0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded, asynchronously; None: ask again."""
        assert self._scheduler is not None
        n_tokens = self._scheduler.matched(request, num_computed_tokens)
        return n_tokens, bool(n_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load into the blocks that the engine has allocated."""
        assert self._scheduler is not None
        try:
            self._scheduler.allocated(request, blocks, num_external_tokens)
        except Exception:
            logger.exception("kvrdma: a load could not be planned; the request is computed instead")
            if num_external_tokens:
                self._scheduler.load_not_planned(request.request_id)

    @guarded(StepJobs)
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Plan the step's saves; send every job that is due."""
        assert self._scheduler is not None
        return self._scheduler.build_step(scheduler_output)

    @guarded()
    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Take what the ranks have done."""
        meta = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(meta, RankReports):
            self._scheduler.on_reports(meta)

    @guarded((False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request has ended; our own references keep the blocks that are being saved."""
        assert self._scheduler is not None
        return False, self._scheduler.finished(request)

    @guarded(False)
    def has_pending_push_work(self) -> bool:
        """Whether the engine must keep stepping, so that reports arrive."""
        return self._scheduler is not None and self._scheduler.pending_work()

    @guarded(False)
    def has_pending_block_frees(self) -> bool:
        """Whether saves under way will free device blocks."""
        return self._scheduler is not None and self._scheduler.holds_blocks()

    def reset_cache(self) -> bool | None:
        """The weights have changed, or somebody wants an empty cache. If that fails, nothing is served any more."""
        if self._scheduler is not None:
            try:
                self._scheduler.reset()
            except Exception:
                logger.exception("kvrdma: the cache could not be reset; it offers and saves nothing from now on")
                self._disable()
        return True

    @guarded()
    def _disable(self) -> None:
        assert self._scheduler is not None
        self._scheduler.disable()


def log_with_vllm() -> None:
    """Let kvrdma's log lines go where vLLM's go; a handler that the user has set wins."""
    ours, theirs = logging.getLogger("kvrdma"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = not theirs.handlers


def check_l2(settings: Settings) -> None:
    """Raise `ConfigError` where L2 is of no use to an engine, whose halves are processes of their own."""
    if settings.l2:
        scheme = Url.parse(settings.l2).scheme
        backends.get(scheme)
        if scheme == "memory":
            raise ConfigError(
                "l2=memory://: it lives in one process, and the engine's halves are several; l1_bytes is the cache "
                "inside the engine, and kvrdma://host:port a pool that engines share"
            )


def warn_of_failure_policy(transfer: Any) -> None:
    """Say loudly what a failed load does to a request where vLLM is left at its default."""
    if getattr(transfer, "kv_load_failure_policy", "fail") != "recompute":
        logger.warning(
            'kvrdma: kv_load_failure_policy is not "recompute": a request whose load fails ENDS WITH AN ERROR '
            'instead of being computed. Add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
        )
