"""`kvrdma bench cache`: what the cache costs beside moving bytes, and its copies beside memcpy's."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.cache import Answer, BlockStatus, CacheIndex, IndexOptions, JobReport
from kvrdma.errors import CapacityError, ConfigError, KVRDMAError
from kvrdma.keys import KeyChain, KeySpace, block_keys
from kvrdma.layout import BlockLayout, ByteRun
from kvrdma.manager import KVCacheManager
from kvrdma.memory import CpuCopier, PinnedPool, available_memory_nbytes
from kvrdma.policies import offload_policies, policies
from kvrdma.settings import Settings

ROUNDS: Final = 5
LOOKUP_KEYS: Final = 1000
HASH_TOKENS: Final = 131_072
HASH_SLICE_S: Final = 0.9e-3  # what a scheduler's step can afford
BLOCK_TOKENS: Final = 16
_RUNS: Final = 8  # layers that a block's bytes lie in
_POOL_SHARE: Final = 0.75  # of the available memory: the host must go on working
_READY_TIMEOUT_S: Final = 120.0

SPACE: Final = KeySpace("bench", "bench", "bench", "bfloat16", "bench", 128, _RUNS, BLOCK_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheBench:
    """What to measure; raises `ConfigError` on what cannot be measured.

    `working_set` is how many bytes the copies go through on either side before they come back to the first:
    more than the CPU's caches hold, or they are what is measured. `pool` is the size of the pool whose start
    is timed; where the machine has less, it is made smaller.
    """

    nbytes_per_block: int = 256 << 10
    batch: int = 64
    working_set: int = 512 << 20
    pool: int = 16 << 30

    def __post_init__(self) -> None:
        for name in ("nbytes_per_block", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.nbytes_per_block % _RUNS:
            raise ConfigError(f"nbytes_per_block: must be a multiple of {_RUNS}, not {self.nbytes_per_block}")
        if self.working_set < self.batch_nbytes:
            raise ConfigError(
                f"working_set: must hold a batch, {self.batch_nbytes} bytes; {self.working_set} bytes do not"
            )
        if self.pool < self.nbytes_per_block:
            raise ConfigError(f"pool: must hold a block, {self.nbytes_per_block} bytes; {self.pool} bytes do not")

    @property
    def n_steps(self) -> int:
        """How often `on_step` is called."""
        return 4 + 2 * ROUNDS

    @property
    def batch_nbytes(self) -> int:
        """Bytes a batch."""
        return self.nbytes_per_block * self.batch


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What was measured: figures by name; seconds, bytes per second and ratios."""

    settings: CacheBench
    figures: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        settings = self.settings
        return {
            "nbytes_per_block": settings.nbytes_per_block,
            "batch": settings.batch,
            "working_set_nbytes": settings.working_set,
            **self.figures,
        }


def run_cache_bench(settings: CacheBench, *, on_step: Callable[[str], None]) -> CacheResult:
    """Measure; `on_step` is told what begins.

    Raises:
        CapacityError: the host has not the memory.
    """
    figures: dict[str, float] = {}
    on_step("lookup")
    figures |= _lookup()
    on_step("hashing")
    figures |= _hashing()
    figures |= _acquire(settings, "acquire", on_step, scattered=False)
    figures |= _acquire(settings, "acquire_scattered", on_step, scattered=True)
    on_step("device copies")
    figures |= _copies(settings)
    on_step("pool")
    figures |= _pool_ready(settings)
    return CacheResult(settings, figures)


def _timed(work: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def _lookup() -> dict[str, float]:
    """A request from its first question to its end, on an index that has all its keys; median."""
    policy, offload = policies.get("lru"), offload_policies.get("all")
    index = CacheIndex(LOOKUP_KEYS, policy(LOOKUP_KEYS), offload(), IndexOptions())
    keys = block_keys(SPACE, np.arange(LOOKUP_KEYS * BLOCK_TOKENS, dtype=np.int32))
    job = index.seal(index.reserve(keys, parents=[None, *keys[:-1]]))
    index.take_jobs()
    index.on_report(JobReport(job.number, 0, np.full(LOOKUP_KEYS, BlockStatus.OK, dtype=np.uint8), terminal=True))

    def request() -> None:
        offer = index.lookup("request", keys, 0)
        assert (offer.answer, offer.n_blocks) == (Answer.OFFERED, LOOKUP_KEYS)
        index.finished("request")

    request()
    return {"lookup_1000_s": float(np.median([_timed(request) for _ in range(200)]))}


def _hashing() -> dict[str, float]:
    """A long prompt as a whole, and the longest of the slices that a scheduler would hash it in; medians."""
    tokens = np.random.default_rng(0).integers(0, 1 << 17, HASH_TOKENS, dtype=np.int32)
    wholes, longest = [], []
    for _ in range(2 * ROUNDS):
        wholes.append(_timed(lambda: block_keys(SPACE, tokens)))
        chain, slices, done = KeyChain(SPACE), [], False
        while not done:
            started = time.perf_counter()
            done = chain.advance(tokens, budget_s=HASH_SLICE_S)
            slices.append(time.perf_counter() - started)
        longest.append(max(slices))
    return {"hash_131072_s": float(np.median(wholes)), "hash_longest_slice_s": float(np.median(longest))}


def _acquire(settings: CacheBench, name: str, on_step: Callable[[str], None], *, scattered: bool) -> dict[str, float]:
    """Prompts acquired from L1 into the caller's memory; in turn with them one memcpy each out of the same memory."""
    n_prompts = settings.working_set // settings.batch_nbytes
    width, nbytes = settings.batch * BLOCK_TOKENS, settings.batch_nbytes
    prompts = [np.arange(i * width, (i + 1) * width, dtype=np.int32) for i in range(2 * n_prompts)]
    old, prompts = prompts[n_prompts:], prompts[:n_prompts]
    target = np.ones((n_prompts, settings.batch, settings.nbytes_per_block), dtype=np.uint8)
    with _manager(settings.nbytes_per_block, n_prompts * nbytes) as manager:
        if not manager.wait_until_grown():
            raise CapacityError(f"{n_prompts * nbytes} bytes of L1: it did not grow to that size")
        for prompt in old:  # L1 is full of them, so that the others get slots that were used before
            _write(manager, prompt)
        # Prompts that grow in turn have no two blocks side by side; those written at once lie as eviction left room.
        for end in range(BLOCK_TOKENS, width + 1, BLOCK_TOKENS) if scattered else [width]:
            for prompt in prompts:
                _write(manager, prompt[:end])
        slabs = manager.pool.memories
        sources = [slab.address + at for slab in slabs for at in range(0, slab.nbytes - nbytes + 1, nbytes)]
        if not sources:
            raise CapacityError(f"a batch of {nbytes} bytes: more than one slab holds, so one memcpy cannot move it")

        def acquire(number: int) -> None:
            with manager.acquire(prompts[number]) as hit:
                hit.copy_into(target[number])

        def memcpy(number: int) -> None:
            ctypes.memmove(target[number].ctypes.data, sources[number % len(sources)], nbytes)

        ours, plain = [], []
        for _ in range(ROUNDS):
            on_step(f"{name} and memcpy".replace("_", " "))
            for number in range(n_prompts):
                plain.append(nbytes / _timed(memcpy, number))
                far = (number + n_prompts // 2) % n_prompts  # none of it is in the CPU's caches
                ours.append(nbytes / _timed(acquire, far))
        for number in range(n_prompts):
            acquire(number)
        firsts = np.arange(n_prompts)[:, None] * width + np.arange(settings.batch) * BLOCK_TOKENS
        if not np.array_equal(target[:, :, -1], _mark(firsts)):
            raise KVRDMAError("L1 gave other bytes than were written")
    return {
        f"{name}_bytes_per_s": float(np.median(ours)),
        f"{name}_memcpy_bytes_per_s": float(np.median(plain)),
        f"{name}_ratio": float(np.median(ours) / np.median(plain)),
    }


def _copies(settings: CacheBench) -> dict[str, float]:
    """CPU tensors to slots, where blocks and slots are consecutive and where neither is; medians."""
    n = settings.working_set // settings.nbytes_per_block
    run_nbytes = settings.nbytes_per_block // _RUNS
    tensors = np.ones((_RUNS, n, run_nbytes), dtype=np.uint8)
    runs = tuple(ByteRun(f"layer {i}", tensor.ctypes.data, run_nbytes, run_nbytes) for i, tensor in enumerate(tensors))
    copier = CpuCopier()
    rates: dict[str, list[float]] = {"consecutive": [], "scattered": []}
    with PinnedPool(settings.nbytes_per_block, n) as pool:
        copier.register(BlockLayout(n, runs, keepalive=tensors), pool)
        apart = np.random.default_rng(0).permutation(n)
        ways = {"consecutive": (np.arange(n), np.arange(n)), "scattered": (apart, apart[::-1].copy())}
        for _ in range(ROUNDS):
            for way, (blocks, slots) in ways.items():
                copies = [
                    copier.gather(0, blocks[first:last], slots[first:last], after=copier.fence())
                    for first in range(0, n, settings.batch)
                    for last in [first + settings.batch]
                ]
                rates[way].append(sum(copy.nbytes for copy in copies) / sum(copy.seconds for copy in copies))
        copier.close()
    return {f"gather_{way}_bytes_per_s": float(np.median(of)) for way, of in rates.items()}


def _pool_ready(settings: CacheBench) -> dict[str, float]:
    """From the beginning of a manager's construction until a block could be written into its first slot."""
    l1_nbytes = min(settings.pool, int(_POOL_SHARE * available_memory_nbytes()))
    started = time.perf_counter()
    with _manager(settings.nbytes_per_block, l1_nbytes) as manager:
        while True:
            try:
                with manager.reserve(range(BLOCK_TOKENS)) as reservation:
                    reservation.views[0][:] = 1
                    break
            except CapacityError:
                if time.perf_counter() - started > _READY_TIMEOUT_S:
                    raise
                time.sleep(1e-3)
        ready_s = time.perf_counter() - started
    return {"pool_nbytes": l1_nbytes, "pool_ready_s": ready_s}


def _manager(nbytes_per_block: int, l1_nbytes: int) -> KVCacheManager:
    return KVCacheManager(SPACE, nbytes_per_block, Settings(l1_bytes=l1_nbytes))


def _write(manager: KVCacheManager, tokens: NDArray[np.int32]) -> None:
    """Write the blocks of a prompt that L1 has not."""
    with manager.reserve(tokens) as reservation:
        for row, view in zip(reservation.rows, reservation.views, strict=True):
            view[:] = _mark(tokens[row * BLOCK_TOKENS])
        if not reservation.commit():
            raise KVRDMAError("L1 did not take a block that it has room for")


def _mark(first_token: NDArray[np.int_] | np.int32) -> NDArray[np.uint8]:
    """What each byte of a block is."""
    return np.asarray(first_token // BLOCK_TOKENS % 251, dtype=np.uint8)
