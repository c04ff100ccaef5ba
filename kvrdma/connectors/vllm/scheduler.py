"""The scheduler half: the index, asked on the engine's one scheduler thread. No I/O here, and no wait."""

from __future__ import annotations

import dataclasses
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvrdma.backends import open_backend
from kvrdma.backends.breaker import BreakerBackend
from kvrdma.cache import Answer, CacheIndex, IndexOptions, Prober
from kvrdma.connectors.vllm.identity import (
    adapter_identity,
    block_nbytes,
    make_extras,
    make_keyspace,
    make_shards,
    new_epoch,
)
from kvrdma.connectors.vllm.metadata import RankReports, StepJobs
from kvrdma.connectors.vllm.stats import KVRDMAStats, StatsFeed
from kvrdma.connectors.vllm.worker import slots_per_rank
from kvrdma.errors import KVRDMAError
from kvrdma.keys import KeyChain, KeySpace
from kvrdma.policies import offload_policies, open_policy
from kvrdma.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

HASH_BUDGET_S: Final = 0.0009  # of hashing a scheduler step; the rest is hashed in the next steps
REPORT_PARAM: Final = "kvrdma.report"
_NEWS_AGE_S: Final = 1.0  # what is known of growing pools may be as old as this
_NEWS_WAIT_S: Final = 1.0
ADAPTER_TIMEOUT_S: Final = 5.0  # for reading a LoRA's files; a request whose LoRA takes longer is not cached


@dataclass(slots=True, eq=False)
class _Request:
    """What the connector knows of a request: its keys, and how far its blocks are saved."""

    request: Request
    chain: KeyChain | None = None  # None: it cannot be told from others (yet), so nothing of it is cached
    adapter: Future[bytes] | None = None  # while its LoRA's files are read
    adapter_deadline: float = 0.0
    lora: bytes = b""
    first: int = 0
    saved: int = 0
    may_save: bool = True
    n_offered: int = 0
    n_loaded: int = 0
    asked: float | None = None  # when it first waited for news of the pools


class SchedulerHalf:
    """Lookup, load, save and their bookkeeping, as vLLM's scheduler asks for them."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings) -> None:
        shards = make_shards(vllm_config, kv_cache_config)
        self._settings = settings
        self._keyspace = make_keyspace(vllm_config, kv_cache_config, settings)
        self._block_tokens = self._keyspace.block_tokens
        self._nbytes = block_nbytes(kv_cache_config) * len(shards)  # of a block on all ranks
        n_slots = slots_per_rank(settings, kv_cache_config, len(shards))
        self._index = CacheIndex(
            n_slots,
            open_policy(settings.policy)(n_slots),
            offload_policies.get(settings.offload)(),
            IndexOptions(
                ranks=len(shards),
                has_l2=bool(settings.l2),
                lookup_timeout_s=settings.lookup_timeout,
                fetch_timeout_s=settings.fetch_timeout,
                put_timeout_s=settings.put_timeout,
                waiting_share=settings.waiting_share,
                growing=True,
            ),
        )
        self._pools_heard = -_NEWS_AGE_S
        self._awaits_news = True
        self._prober: Prober | None = None
        if settings.l2:
            backend = BreakerBackend(open_backend(settings.l2, settings))
            backend.use_keyspace(self._keyspace)
            self._prober = Prober(backend, shards, timeout=settings.lookup_timeout)
            self._backend = backend
        self._requests: dict[str, _Request] = {}
        self._adapters = ThreadPoolExecutor(1, thread_name_prefix="kvrdma-adapters")  # a step has no time for files
        self._block_pool: BlockPool | None = None
        self._save_limit = int(settings.save_share * kv_cache_config.num_blocks)
        self._held: dict[int, list[int]] = {}  # SAVE job -> device blocks that we reference
        self._n_held = 0
        self._loads: dict[int, str] = {}
        self._step = StepJobs(keyspace=self._keyspace)
        self._hash_budget_s = HASH_BUDGET_S
        self._full_fingerprint = settings.fingerprint == "full"
        self._serving = True
        self._was_reset = False
        self._stats = StatsFeed()
        logger.info(
            "kvrdma: %d slots on each of %d ranks, key space %s of %s, L2 %s",
            n_slots,
            len(shards),
            self._keyspace.digest.hex()[:16],
            self._keyspace.model,
            settings.l2 or "none",
        )

    @property
    def keyspace(self) -> KeySpace:
        """The key space of what is saved now."""
        return self._keyspace

    def bind_block_pool(self, pool: BlockPool) -> None:
        """Take the engine's block pool, whose references keep the source blocks of saves."""
        self._block_pool = pool

    # -- lookup and load

    def matched(self, request: Request, n_computed: int) -> int | None:
        """How many tokens beyond `n_computed` can be loaded; None: not yet known, ask again."""
        state = self._state(request)
        first = n_computed // self._block_tokens
        last = (request.num_tokens - 1) // self._block_tokens
        state.first, state.saved, state.n_offered, state.n_loaded = first, 0, 0, 0
        if not self._serving:
            return 0
        if state.adapter is not None and not self._adapter_is_read(state):
            return None
        if state.chain is None:
            return 0
        if not self._hash(state):
            return None
        self._check_may_save(state)
        if self._index.growing and self._pools_are_old(state):
            return None
        if last <= first or request.skip_reading_prefix_cache:
            return 0
        self._carry()
        offer = self._index.lookup(request.request_id, state.chain.keys[:last], first)
        if self._prober is not None:
            self._prober.submit(self._index.take_probes())
        if offer.answer is Answer.PENDING:
            return None
        state.n_offered = offer.n_blocks
        return offer.n_blocks * self._block_tokens

    def allocated(self, request: Request, blocks: KVCacheBlocks, n_external: int) -> None:
        """The engine has made room for `n_external` tokens of what was offered, or for none of it."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        n = n_external // self._block_tokens
        ids = blocks.get_block_ids()[0][state.first : state.first + n] if n else []
        job = self._index.allocated(request.request_id, ids)
        if n and job is None:
            raise KVRDMAError(f"{n} blocks were taken of an offer that is gone")
        if job is not None:
            state.n_loaded = n
            self._loads[job.number] = request.request_id
            self._step.loads[job.number] = request.request_id

    def load_not_planned(self, request_id: str) -> None:
        """A load was promised and cannot be planned: have the workers report it failed, so that nobody waits."""
        self._index.refuse(request_id)
        self._step.failed_loads.append(request_id)

    # -- the step

    def build_step(self, output: SchedulerOutput) -> StepJobs:
        """Plan the saves of this step's tokens; give every job that is due."""
        self._hash_budget_s = HASH_BUDGET_S
        self._carry()
        cached = output.scheduled_cached_reqs
        computed = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        computed += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, n_computed in computed:
            try:
                self._plan_save(output, request_id, n_computed)
            except Exception:  # one request's fault must not keep the others' jobs from their step
                logger.exception("kvrdma: a save of request %s could not be planned", request_id)
        step, self._step = self._step, StepJobs()
        step.jobs = self._index.take_jobs()
        return step

    def on_reports(self, reports: RankReports) -> None:
        """Take what the ranks have done."""
        for pool in reports.pools:
            self._index.on_pool(pool)
            self._pools_heard, self._awaits_news = time.monotonic(), True
        for report in reports.reports:
            if self._index.on_report(report):
                self._let_go(report.number)
                request_id = self._loads.pop(report.number, None)
                if request_id is not None and (report.status != 0).any():
                    self._index.refuse(request_id)

    def finished(self, request: Request) -> dict[str, Any] | None:
        """The request has ended; what to tell whoever asked for a report."""
        state = self._requests.pop(request.request_id, None)
        self._index.finished(request.request_id)
        params = request.kv_transfer_params
        if state is None or not isinstance(params, dict) or not params.get(REPORT_PARAM):
            return None
        return {
            "kvrdma.offered_tokens": state.n_offered * self._block_tokens,
            "kvrdma.loaded_tokens": state.n_loaded * self._block_tokens,
            "kvrdma.loaded_bytes": state.n_loaded * self._nbytes,
            "kvrdma.stats": self._index.stats(),
        }

    def news(self) -> KVRDMAStats | None:
        """What was decided since the last call."""
        failures = 0 if self._prober is None else self._backend.failures
        return self._stats.news({**self._index.stats(), "l2_failures": failures})

    def pending_work(self) -> bool:
        """Whether the engine must keep stepping: blocks are referenced, or work waits to be handed over."""
        return bool(self._held) or self._index.has_output

    def holds_blocks(self) -> bool:
        """Whether saves under way will free device blocks."""
        return bool(self._held)

    def reset(self) -> None:
        """The weights have changed: nothing that was cached holds any more."""
        self._was_reset = True
        self._keyspace = dataclasses.replace(self._keyspace, epoch=new_epoch())
        self._index.reset()
        self._step.stale_loads += self._loads  # sent or not: what they load is the old weights'
        self._step.keyspace = self._keyspace
        if self._prober is not None:
            self._prober.use_keyspace(self._keyspace)
        for state in self._requests.values():
            state.chain = self._chain(state)
            state.may_save = False
            state.saved = 0
        logger.info("kvrdma: reset; key space %s from now on", self._keyspace.digest.hex()[:16])

    def disable(self) -> None:
        """Offer and save nothing any more: what is cached may be wrong."""
        self._serving = False

    def close(self) -> None:
        """End the prober and its connection."""
        self._adapters.shutdown(wait=False, cancel_futures=True)
        if self._prober is not None:
            self._prober.close()
            self._backend.close()
            self._prober = None

    # -- inside

    def _pools_are_old(self, state: _Request) -> bool:
        """Whether to ask again after a step: it brings what the ranks' pools have gained while the engine was idle.

        For `_NEWS_WAIT_S` at most; where no rank says anything by then, nobody waits for it any more.
        """
        now = time.monotonic()
        if not self._awaits_news or now - self._pools_heard < _NEWS_AGE_S:
            state.asked = None
            return False
        if state.asked is None:
            state.asked = now
        self._awaits_news = now - state.asked < _NEWS_WAIT_S
        return self._awaits_news

    def _state(self, request: Request) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            state = self._requests[request.request_id] = _Request(request, may_save=not self._was_reset)
            if request.lora_request is None:
                state.chain = self._chain(state)
            else:
                state.adapter = self._adapters.submit(
                    adapter_identity, request.lora_request, full=self._full_fingerprint
                )
                state.adapter_deadline = time.monotonic() + ADAPTER_TIMEOUT_S
        return state

    def _adapter_is_read(self, state: _Request) -> bool:
        """Whether it is known what the request's LoRA is, or that it is not to be known in time."""
        assert state.adapter is not None
        if not state.adapter.done() and time.monotonic() < state.adapter_deadline:
            return False
        adapter, state.adapter = state.adapter, None
        try:
            state.lora = adapter.result(timeout=0)
        except Exception as error:  # whatever reading files may raise
            why = str(error) or f"its LoRA's files were not read within {ADAPTER_TIMEOUT_S} s"
            logger.warning("kvrdma: nothing of request %s is cached: %s", state.request.request_id, why)
        state.chain = self._chain(state)
        return True

    def _chain(self, state: _Request) -> KeyChain | None:
        if state.request.lora_request is not None and not state.lora:
            return None
        return KeyChain(self._keyspace, extras=make_extras(state.request, self._block_tokens, state.lora))

    def _hash(self, state: _Request) -> bool:
        """Hash within the step's budget; True once every full block of the prompt has its key."""
        assert state.chain is not None
        before = len(state.chain)
        tokens = state.request.all_token_ids
        wanted = len(tokens) // self._block_tokens
        if before >= wanted:
            return True
        if self._hash_budget_s <= 0:
            return False
        started = time.perf_counter()
        done = state.chain.advance(tokens, budget_s=self._hash_budget_s)
        self._hash_budget_s -= time.perf_counter() - started
        return done

    def _carry(self) -> None:
        if self._prober is not None:
            for answer in self._prober.poll():
                self._index.on_probe(answer)
            self._prober.submit(self._index.take_probes())

    def _check_may_save(self, state: _Request) -> None:
        """After a reset a request may save only what it computes from token 0 under the new epoch.

        vLLM resets its own blocks before it tells us, but may fail to: local blocks that were not saved
        under this epoch could hold the old weights' KV, and so would all that is computed on top of them.
        """
        if state.may_save or state.chain is None:
            return
        keys = state.chain.keys[: state.first]
        state.may_save = len(keys) == state.first and not self._index.missing(keys)

    def _plan_save(self, output: SchedulerOutput, request_id: str, n_computed: int) -> None:
        """Save the prompt's blocks that are full once this step's tokens are computed."""
        state = self._requests.get(request_id)
        block_state, pool = output.kv_connector_block_state, self._block_pool
        if not self._serving or state is None or state.chain is None or not state.may_save:
            return
        if block_state is None or pool is None:
            return
        self._hash(state)
        n_tokens = min(n_computed + output.num_scheduled_tokens[request_id], state.request.num_prompt_tokens)
        full = min(n_tokens // self._block_tokens, len(state.chain))
        if full <= state.saved:
            return
        keys = state.chain.keys
        rows = [state.saved + i for i in self._index.missing(keys[state.saved : full])]
        computed = range(max(state.saved, state.first + state.n_loaded), full)
        self._index.used([keys[row] for row in sorted(set(computed).difference(rows))])
        room = max(0, self._save_limit - self._n_held)
        if len(rows) > room:  # the rest is tried again in the next step, while the request lives
            self._index.metrics.add("save_deferred_blocks", len(rows) - room)
            full = rows[room]
            rows = rows[:room]
        state.saved = full
        table = block_state.get_block_ids(request_id)
        if not rows or table is None:
            return
        blocks = [table[0][row] for row in rows]
        if any(pool.blocks[block].is_null for block in blocks):
            raise KVRDMAError("a null block stands in the request's table: it holds nobody's KV")
        job = self._index.save(
            [keys[row] for row in rows], blocks, parents=[keys[row - 1] if row else None for row in rows]
        )
        if job is not None:
            held = job.blocks.tolist()
            pool.touch([pool.blocks[block] for block in held])
            self._held[job.number] = held
            self._n_held += len(held)

    def _let_go(self, job: int) -> None:
        """A gather is terminal on every rank: the engine may have its blocks back."""
        held = self._held.pop(job, None)
        if held is not None and self._block_pool is not None:
            self._n_held -= len(held)
            # The tail first, as vLLM does it, so that the shared prefix is evicted last.
            self._block_pool.free_blocks(self._block_pool.blocks[block] for block in reversed(held))
