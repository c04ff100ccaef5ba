"""Both halves of the connector on vLLM's own classes, without an engine: what is cached, what is refused, resets."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import eventually
from holding import PATIENCE_S, HoldingBackend
from vllm import envs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import KVConnectorBlockState
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from kvrdma.backends import StorageBackend
from kvrdma.backends.breaker import BreakerBackend
from kvrdma.cache import BlockStatus, Job, JobKind, JobReport, PoolReport, TransferAgent
from kvrdma.connectors.vllm import KVRDMAConnector, scheduler, worker
from kvrdma.connectors.vllm.identity import adapter_identity, attention_spec, make_extras, make_shards
from kvrdma.connectors.vllm.metadata import RankReports, StepJobs
from kvrdma.connectors.vllm.scheduler import SchedulerHalf
from kvrdma.connectors.vllm.worker import WorkerHalf
from kvrdma.errors import ClosedError, ConfigError
from kvrdma.keys import KeyChain, KeySpace
from kvrdma.layout import BlockLayout, ByteRun, Shard
from kvrdma.memory import Copy, CpuCopier, Fence, PinnedPool
from kvrdma.settings import Settings

BLOCK = 16
SPACE = KeySpace("m", "w", "c", "bfloat16", "a/LBHNC", 64, 2, BLOCK)
N_SLOTS, N_BLOCKS = 32, 64


def request_of(name: str, n_tokens: int = 4 * BLOCK, **options: Any) -> Request:
    tokens = None if "prompt_embeds" in options else list(range(100, 100 + n_tokens))
    return Request(name, tokens, SamplingParams(max_tokens=4), None, **options)


def image(identifier: str, offset: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=offset, length=8))


def adapter(folder: Path, byte: int) -> LoRARequest:
    """A LoRA named "tuned" of one small tensor."""
    folder.mkdir()
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes([byte] * 4))
    return LoRARequest("tuned", 1, str(folder))


# -- what tells requests apart


def keys_of(request: Request) -> list[bytes]:
    lora = b"" if request.lora_request is None else adapter_identity(request.lora_request)
    chain = KeyChain(SPACE, extras=make_extras(request, BLOCK, lora))
    assert chain.advance(request.all_token_ids, budget_s=60.0)
    return list(chain.keys)


def test_requests_that_differ_in_anything_have_different_keys(tmp_path: Path) -> None:
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    embeds = torch.zeros(4 * BLOCK, 8)
    variants = {
        "plain": request_of("r"),
        "salt": request_of("r", cache_salt="s"),
        "another salt": request_of("r", cache_salt="t"),
        "image": request_of("r", mm_features=[image("x", 2)]),
        "another image": request_of("r", mm_features=[image("y", 2)]),
        "the image elsewhere": request_of("r", mm_features=[image("x", 3)]),
        "image and salt": request_of("r", mm_features=[image("x", 2)], cache_salt="s"),
        "lora": request_of("r", lora_request=one),
        "another lora of that name": request_of("r", lora_request=other),
        "the lora by another name": request_of("r", lora_request=LoRARequest("other", 2, one.lora_path)),
        "lora and salt": request_of("r", lora_request=one, cache_salt="s"),
        "embeddings": request_of("r", prompt_embeds=embeds),
        "other embeddings": request_of("r", prompt_embeds=embeds + 1),
    }
    keys = {name: keys_of(request) for name, request in variants.items()}
    assert all(len(each) == 4 for each in keys.values())
    for row in range(4):  # from the first block on: the chain carries it
        assert len({each[row] for each in keys.values()}) == len(variants)
    assert keys_of(request_of("another id")) == keys["plain"]
    assert keys_of(request_of("r", lora_request=LoRARequest("tuned", 7, one.lora_path))) == keys["lora"]


def test_what_comes_later_in_the_prompt_leaves_the_blocks_before_it_shared() -> None:
    late = keys_of(request_of("r", mm_features=[image("x", 2 * BLOCK)]))
    plain = keys_of(request_of("r"))
    assert late[:2] == plain[:2]
    assert not set(late[2:]) & set(plain)


def test_loras_that_differ_in_their_settings_alone_are_apart(tmp_path: Path) -> None:
    """`lora_alpha` scales what the same tensors add to the model: other KV, under one name."""
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 1)
    assert adapter_identity(one) == adapter_identity(other)
    for lora, alpha in ((one, 16), (other, 64)):
        (Path(lora.lora_path) / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
    assert adapter_identity(one) != adapter_identity(other)
    assert keys_of(request_of("r", lora_request=one)) != keys_of(request_of("r", lora_request=other))


def test_a_full_fingerprint_covers_loras(tmp_path: Path) -> None:
    ends = [adapter(tmp_path / name, 1) for name in ("one", "two")]
    for lora, first in zip(ends, (b"a", b"b"), strict=True):
        size = 100_000
        header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        raw = struct.pack("<Q", len(header)) + header + first + bytes(size - 1)
        next(Path(lora.lora_path).glob("*.safetensors")).write_bytes(raw)
    assert adapter_identity(ends[0]) == adapter_identity(ends[1])  # the page in the middle is the same
    assert adapter_identity(ends[0], full=True) != adapter_identity(ends[1], full=True)


def test_the_same_file_under_another_path_is_the_same_lora(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "one", 1), adapter(tmp_path / "two", 1)
    assert adapter_identity(first) == adapter_identity(second)
    with pytest.raises(ConfigError, match="no folder"):
        adapter_identity(LoRARequest("gone", 1, str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="identity is needed"):
        make_extras(request_of("r", lora_request=first), BLOCK)


# -- what is served


def full(heads: int = 2) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=BLOCK, num_kv_heads=heads, head_size=64, dtype=torch.bfloat16)


def kv_config(*specs: Any) -> Any:
    groups = [KVCacheGroupSpec([f"layer{i}.{j}" for j in range(2)], spec) for i, spec in enumerate(specs)]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=N_BLOCKS)


def vllm_config(*, total_heads: int = 8, **parallel: Any) -> Any:
    values = {
        "world_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "distributed_executor_backend": "mp",
        **parallel,
    }
    model = SimpleNamespace(get_total_num_kv_heads=lambda: total_heads)
    return SimpleNamespace(parallel_config=SimpleNamespace(**values), model_config=model)


def test_each_rank_has_its_heads() -> None:
    shards = make_shards(vllm_config(world_size=4, tensor_parallel_size=4), kv_config(full(2)))
    assert shards == [Shard(0, 0, 2, 2 * rank, 2 * rank + 2) for rank in range(4)]
    assert make_shards(vllm_config(), kv_config(full(8))) == [Shard(0, 0, 2, 0, 8)]


@pytest.mark.parametrize(
    ("heads", "config", "says"),
    [
        (8, {"world_size": 2, "pipeline_parallel_size": 2}, "pipeline"),
        (8, {"world_size": 2, "decode_context_parallel_size": 2}, "context parallelism"),
        (1, {"world_size": 4, "tensor_parallel_size": 4, "total_heads": 2}, "2 KV heads on 4 ranks are replicated"),
        (2, {"world_size": 4, "tensor_parallel_size": 4, "total_heads": 6}, "6 KV heads on 4 ranks"),
        (4, {"world_size": 2, "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}, "mult"),
    ],
)
def test_what_ranks_cannot_share_is_refused(heads: int, config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_shards(vllm_config(**config), kv_config(full(heads)))


def test_exactly_full_attention_is_served() -> None:
    options: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    latent = MLAAttentionSpec(**options)
    assert attention_spec(kv_config(full())) == full()
    assert attention_spec(kv_config(latent)) is latent
    for groups in (
        [SlidingWindowSpec(**options, sliding_window=128)],
        [ChunkedLocalAttentionSpec(**options, attention_chunk_size=64)],
        [full(), SlidingWindowSpec(**options, sliding_window=128)],
        [full(), full()],
        [],
    ):
        with pytest.raises(ConfigError, match="one group of full attention"):
            attention_spec(kv_config(*groups))


# -- the end of a worker


class StuckCopier(CpuCopier):
    """Its gathers wait for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def gather(self, group: int, blocks: Any, slots: Any, *, after: Fence) -> Copy:
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        return super().gather(group, blocks, slots, after=after)


def working(copier: CpuCopier, backend: StorageBackend) -> WorkerHalf:
    """A worker half with an agent on a pool and a device of four blocks."""
    device, pool = np.zeros((4, 64), dtype=np.uint8), PinnedPool(64, 4)
    run = ByteRun("layer", device.ctypes.data, 64, 64)
    copier.register(BlockLayout(4, (run,), keepalive=device), pool)
    half = WorkerHalf(None, None, Settings())  # type: ignore[arg-type]
    half._pool, half._copier, half._backend = pool, copier, BreakerBackend(backend)
    half._agent = TransferAgent(pool, Shard(0, 0, 2, 0, 2), backend=half._backend, copier=copier)
    return half


def job_of(kind: JobKind) -> Job:
    return Job(kind, 1, np.zeros((1, 16), dtype=np.uint8), np.zeros(1, dtype=np.int64), 30.0, blocks=np.zeros(1, int))


def test_a_worker_waits_for_less_than_vllm_gives_it() -> None:
    """Behind the jobs there must be room for the end of L2's connection, and of the process."""
    assert worker.JOBS_END_S + Settings().connect_timeout < envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS


@pytest.mark.parametrize("kind", [JobKind.FETCH, JobKind.PUT])
def test_a_transfer_that_never_ends_is_ended_with_the_worker(kind: JobKind, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    close = TransferAgent.close

    def closing(agent: TransferAgent, *, timeout: float) -> bool:
        given.append(timeout)
        return close(agent, timeout=0.0)

    monkeypatch.setattr(TransferAgent, "close", closing)
    half = working(CpuCopier(), HoldingBackend())
    pool = half._pool
    half.begin(StepJobs(jobs=[job_of(kind)]))
    half.shutdown()
    assert sum(given) <= worker.JOBS_END_S
    assert pool is not None
    assert pool.n_leases == 0
    with pytest.raises(ClosedError):  # its memory was given back
        pool.allocate(1)


def test_a_copy_that_never_ends_keeps_its_memory_and_not_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "JOBS_END_S", 0.01)
    copier = StuckCopier()
    half = working(copier, HoldingBackend())
    pool, agent = half._pool, half._agent
    assert pool is not None
    assert agent is not None
    half.begin_saves(StepJobs(jobs=[job_of(JobKind.SAVE)]))
    assert copier.begun.wait(PATIENCE_S)
    half.shutdown()
    assert pool.n_leases == 1
    copier.go.set()
    assert agent.close(timeout=PATIENCE_S)
    assert [report.status.tolist() for report in agent.poll()] == [[BlockStatus.OK]]
    pool.close()


# -- the scheduler half


class Engine:
    """The scheduler half, vLLM's block pool, and a rank that does whatever it is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        for name, value in {
            "make_keyspace": SPACE,
            "make_shards": [Shard(0, 0, 2, 0, 2)],
            "block_nbytes": 1024,
            "slots_per_rank": N_SLOTS,
        }.items():
            monkeypatch.setattr(scheduler, name, lambda *_, value=value: value)
        self.half = SchedulerHalf(vllm_config(), kv_config(full()), Settings(save_share=1.0, **settings))
        self.pool = BlockPool(N_BLOCKS, True, BLOCK)
        self.half.bind_block_pool(self.pool)
        self.half.on_reports(RankReports([], [PoolReport(0, N_SLOTS, growing=False)]))
        self.connector = object.__new__(KVRDMAConnector)
        self.connector._scheduler, self.connector._worker = self.half, None
        self.tables: dict[str, list[int]] = {}

    def matched(self, request: Request, n_computed: int = 0) -> int:
        """The answer, asked for until there is one."""
        found: list[int] = []

        def asked() -> bool:
            self.half._hash_budget_s = 1.0
            found[:] = [n for n in [self.half.matched(request, n_computed)] if n is not None]
            return bool(found)

        eventually("an answer", asked)
        return found[0]

    def step(self, *computed: tuple[Request, int], tables: dict[str, list[int]] | None = None) -> StepJobs:
        """One step, in which requests compute all behind their first so many tokens."""
        for request, _ in computed:
            if request.request_id not in self.tables:
                n = -(-request.num_tokens // BLOCK)
                self.tables[request.request_id] = [block.block_id for block in self.pool.get_new_blocks(n)]
        known = {**self.tables, **(tables or {})}
        state = KVConnectorBlockState({request.request_id for request, _ in computed}, lambda name: (known[name],), {})
        output: Any = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=r.request_id, num_computed_tokens=n) for r, n in computed],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={request.request_id: request.num_tokens - n for request, n in computed},
            kv_connector_block_state=state,
        )
        step = self.connector.build_connector_meta(output)
        assert isinstance(step, StepJobs)
        return step

    def done(self, jobs: Sequence[Job], status: BlockStatus = BlockStatus.OK) -> None:
        reports = [JobReport(job.number, 0, np.full(len(job), status, dtype=np.uint8), True) for job in jobs]
        self.half.on_reports(RankReports(reports, []))

    def save(self, request: Request) -> list[Job]:
        """A request is computed whole and saved; it has ended since."""
        self.matched(request)
        step = self.step((request, 0))
        self.done(step.jobs)
        self.half.finished(request)
        return step.jobs

    def refs(self, request: Request) -> list[int]:
        return [self.pool.blocks[block].ref_cnt for block in self.tables[request.request_id]]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_a_prompt_of_one_block_is_saved_and_its_block_held_until_it_is(engine: Engine) -> None:
    request = request_of("r", BLOCK)
    assert engine.matched(request) == 0
    (job,) = engine.step((request, 0)).jobs
    assert (job.kind, job.blocks.tolist()) == (JobKind.SAVE, engine.tables["r"])
    assert engine.refs(request) == [2]
    assert engine.half.pending_work()
    engine.done([job])
    assert engine.refs(request) == [1]
    assert not engine.half.pending_work()
    longer = request_of("s", BLOCK + 1)
    assert engine.matched(longer) == BLOCK


def test_a_failed_save_gives_the_blocks_back_too(engine: Engine) -> None:
    request = request_of("r")
    engine.matched(request)
    engine.done(engine.step((request, 0)).jobs, BlockStatus.FAILED)
    assert engine.refs(request) == [1] * 4
    assert engine.matched(request_of("s")) == 0


def test_failures_of_l2_that_lookups_meet_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler's half has a connection, and a breaker, of its own."""
    engine = Engine(monkeypatch, l2="kvrdma://127.0.0.1:1")  # nobody listens there
    assert engine.matched(request_of("r")) == 0
    counted: list[int] = []

    def told() -> bool:
        news = engine.half.news()
        counted.append(0 if news is None else news.data["counters"].get("l2_failures", 0))
        return sum(counted) > 0

    eventually("a failure is told of", told)
    engine.half.close()


def test_a_null_block_in_a_table_is_not_saved_and_keeps_nobody_elses_jobs(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    wrong, right = request_of("r"), request_of("s", cache_salt="another")
    engine.matched(wrong)
    engine.matched(right)
    null = engine.pool.null_block.block_id
    step = engine.step((wrong, 0), (right, 0), tables={"r": [null, null, 5, 6]})
    assert [job.blocks.tolist() for job in step.jobs] == [engine.tables["s"]]
    assert "null block" in caplog.text


def test_after_a_reset_only_what_was_computed_under_the_new_epoch_is_saved(engine: Engine) -> None:
    engine.save(request_of("before"))
    assert engine.connector.reset_cache() is True
    assert engine.half.keyspace.epoch != SPACE.epoch
    stale = request_of("stale")
    assert engine.matched(stale, 2 * BLOCK) == 0  # vLLM kept blocks of its own, in spite of the reset
    step = engine.step((stale, 2 * BLOCK))
    assert step.keyspace == engine.half.keyspace
    assert step.jobs == []
    fresh = request_of("fresh")
    assert engine.matched(fresh) == 0
    assert [len(job) for job in engine.step((fresh, 0)).jobs] == [4]


def test_a_request_that_lives_through_a_reset_saves_nothing_until_it_begins_anew(engine: Engine) -> None:
    request = request_of("r")
    assert engine.matched(request) == 0
    assert [len(job) for job in engine.step((request, 0)).jobs] == [4]
    engine.connector.reset_cache()
    assert engine.step((request, 2 * BLOCK)).jobs == []
    assert engine.matched(request) == 0  # preempted, it is computed from its first token
    assert [len(job) for job in engine.step((request, 0)).jobs] == [4]


def test_after_a_reset_a_prefix_that_was_saved_since_may_be_built_on(engine: Engine) -> None:
    engine.connector.reset_cache()
    assert [len(job) for job in engine.save(request_of("prefix", 2 * BLOCK))] == [2]
    request = request_of("r")
    assert engine.matched(request, 2 * BLOCK) == 0
    assert [len(job) for job in engine.step((request, 2 * BLOCK)).jobs] == [2]


@pytest.mark.parametrize("sent", [False, True])
def test_a_load_that_a_reset_overtakes_is_reported_failed(engine: Engine, sent: bool) -> None:
    engine.save(request_of("before"))
    request = request_of("r", 4 * BLOCK + 1)
    assert engine.matched(request) == 4 * BLOCK
    engine.tables["r"] = [block.block_id for block in engine.pool.get_new_blocks(5)]
    blocks: Any = SimpleNamespace(get_block_ids=lambda: (engine.tables["r"],))
    engine.connector.update_state_after_alloc(request, blocks, 4 * BLOCK)
    steps = [engine.step()] if sent else []
    engine.connector.reset_cache()
    steps.append(engine.step())
    (job,) = [job for step in steps for job in step.jobs]
    assert job.kind is JobKind.LOAD
    assert steps[-1].stale_loads == [job.number]
    half: Any = WorkerHalf(None, None, Settings())  # type: ignore[arg-type]
    for step in steps:
        step.keyspace = None
        half._learn(step)
    report = JobReport(job.number, 0, np.zeros(4, dtype=np.uint8), terminal=True)
    reports = [report]
    half._agent = SimpleNamespace(poll=lambda: [reports.pop()] if reports else [], poll_pool=lambda: None)
    assert half.results() == ({"r"}, {"r"})  # though every byte was copied
    assert half.results() == (set(), set())
    engine.done([job])
    engine.half.finished(request)
    stats = engine.half._index.stats()
    assert (stats["jobs"], stats["zombies"], stats["l1_free_blocks"]) == (0, 0, N_SLOTS)


def test_a_reset_that_fails_ends_the_serving(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.save(request_of("before"))

    def fail() -> None:
        raise RuntimeError("on purpose")

    assert engine.matched(request_of("r")) == 3 * BLOCK
    monkeypatch.setattr(engine.half._index, "reset", fail)
    assert engine.connector.reset_cache() is True
    asking = request_of("s")
    assert engine.connector.get_num_new_matched_tokens(asking, 0) == (0, False)
    other = request_of("t", cache_salt="new")
    assert engine.matched(other) == 0
    assert engine.step((other, 0)).jobs == []


# -- LoRA


def test_an_adapters_files_are_read_beside_the_scheduler(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, go_on, threads = adapter(tmp_path / "one", 1), threading.Event(), []

    def slow(asked: LoRARequest, *, full: bool) -> bytes:
        threads.append(threading.get_ident())
        assert go_on.wait(30)
        return adapter_identity(asked, full=full)

    monkeypatch.setattr(scheduler, "adapter_identity", slow)
    request = request_of("r", lora_request=lora)
    assert engine.half.matched(request, 0) is None
    assert engine.half.matched(request, 0) is None
    assert engine.matched(request_of("plain")) == 0  # which nobody keeps waiting
    engine.connector.reset_cache()  # and a reset meanwhile changes nothing
    go_on.set()
    assert [len(job) for job in engine.save(request)] == [4]
    assert threads
    assert threading.get_ident() not in threads
    assert engine.matched(request_of("s", 4 * BLOCK + 1, lora_request=lora)) == 4 * BLOCK
    assert engine.matched(request_of("t", 4 * BLOCK + 1, lora_request=adapter(tmp_path / "two", 2))) == 0
    assert engine.matched(request_of("u", 4 * BLOCK + 1)) == 0


@pytest.mark.parametrize("why", ["gone", "unreadable", "late"])
def test_a_request_whose_adapter_is_not_known_is_not_cached(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    go_on = threading.Event()

    def identity(asked: LoRARequest) -> bytes:
        match why:
            case "gone":
                return adapter_identity(asked, full=full)
            case "unreadable":
                raise PermissionError("not yours")
            case _:
                go_on.wait(30)
                return b"too late"

    monkeypatch.setattr(scheduler, "adapter_identity", identity)
    if why == "late":
        monkeypatch.setattr(scheduler, "ADAPTER_TIMEOUT_S", 0.0)
    request = request_of("r", lora_request=LoRARequest("tuned", 1, str(tmp_path / "gone")))
    assert engine.matched(request) == 0
    go_on.set()
    assert engine.matched(request) == 0
    assert engine.step((request, 0)).jobs == []
    assert "nothing of request r is cached" in caplog.text
