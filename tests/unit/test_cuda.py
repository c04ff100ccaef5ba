"""The CUDA copier: what can be held without a device, and the same as on the CPU with one."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvrdma.backends.memory import MemoryBackend
from kvrdma.cache import BlockStatus, Job, JobKind, TransferAgent
from kvrdma.errors import ConfigError, KVRDMAError, RegionError
from kvrdma.keys import KeySpace, block_keys, pack_keys
from kvrdma.layout import BlockLayout, ByteRun, Shard
from kvrdma.memory import PinnedPool
from kvrdma.memory.copier import ReachedFence
from kvrdma.memory.cuda import CudaCopier, CudaFence, _Way, copy_columns, find_copies, load_driver
from kvrdma.memory.staging import Stage
from kvrdma.settings import Settings, Url


def test_columns_name_every_run_of_every_block() -> None:
    layout = BlockLayout(10, (ByteRun("a", 1000, 50, 50), ByteRun("b", 9000, 80, 30)))
    with PinnedPool(layout.nbytes, 8, slab_nbytes=4 * 128) as pool:  # four slots a slab
        device, host, sizes = copy_columns(layout, pool, np.array([2, 7]), np.array([1, 6]))
        assert device.tolist() == [1000 + 2 * 50, 9000 + 2 * 80, 1000 + 7 * 50, 9000 + 7 * 80]
        first, second = (pool.view(slot).ctypes.data for slot in (1, 6))
        assert host.tolist() == [first, first + 50, second, second + 50]
        assert sizes.tolist() == [50, 30, 50, 30]


class HostDriver:
    """The driver's calls on this process's memory: a copy is done when it is queued, until one fails."""

    def __init__(self, events: list[str], *, fails_at: int | None = None) -> None:
        self.events = events
        self.fails_at = fails_at
        self.n_copies = 0

    def copy(self, target: int, source: int, nbytes: int) -> int:
        if self.n_copies == self.fails_at:
            return 700
        self.n_copies += 1
        self.events.append("copy")
        ctypes.memmove(target, source, nbytes)
        return 0


class OldDriver(HostDriver):
    def cuMemcpyAsync(self, target: Any, source: Any, nbytes: Any, stream: Any) -> int:
        assert stream.value == 5
        return self.copy(target.value, source.value, nbytes.value)


class NewDriver(HostDriver):
    def cuMemcpyBatchAsync(self, *columns: Any) -> int:
        count = columns[3].value
        assert count > 0
        assert columns[-1].value == 5
        rows = zip(
            *(np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(c.value)) for c in columns[:3]), strict=True
        )
        return next((code for code in (self.copy(*map(int, row)) for row in rows) if code), 0)


class NewestDriver(NewDriver):
    def cuMemcpyBatchAsync_v2(self, *columns: Any) -> int:
        assert len(columns) == 8
        return self.cuMemcpyBatchAsync(*columns)


class HostStage:
    """What a stage does, on this process's memory."""

    def __init__(self, layers: list[np.ndarray], n_rows: int) -> None:
        self.n_rows = n_rows
        self._layers = layers
        self._rows = np.zeros((n_rows, sum(layer.shape[1] for layer in layers)), dtype=np.uint8)

    def addresses(self, n: int) -> np.ndarray:
        return self._rows.ctypes.data + self._rows.shape[1] * np.arange(n)

    def pack(self, index: Any) -> None:
        self._rows[: len(index)] = np.hstack([layer[index.numpy()] for layer in self._layers])

    def unpack(self, index: Any) -> None:
        columns = np.hsplit(self._rows[: len(index)], len(self._layers))
        for layer, part in zip(self._layers, columns, strict=True):
            layer[index.numpy()] = part


class HostCuda:
    """A copier on a device that is this process's memory, with what it did in order."""

    def __init__(self, driver: type[HostDriver], *, fails_at: int | None = None) -> None:
        self.events: list[str] = []
        self.layers = [np.random.default_rng(i).integers(0, 256, (10, 64), dtype=np.uint8) for i in range(2)]
        runs = tuple(ByteRun(str(i), layer.ctypes.data, 64, 64) for i, layer in enumerate(self.layers))
        self.pool = PinnedPool(128, 8, slab_nbytes=4 * 128)
        self.copier: Any = object.__new__(CudaCopier)
        self.copier._device = "cuda:0"
        self.copier._groups = [(BlockLayout(10, runs, "cuda:0"), self.pool)]
        stream = SimpleNamespace(
            cuda_stream=5,
            synchronize=lambda: self.events.append("synchronize"),
            wait_event=lambda event: self.events.append("wait for the engine"),
        )

        class Streams(dict[Any, Any]):
            def __missing__(self, way: Any) -> Any:
                return stream

        self.copier._streams = Streams()
        self.copier._stages = {}
        event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        self.copier._torch = SimpleNamespace(
            cuda=SimpleNamespace(stream=contextlib.nullcontext, Event=lambda enable_timing: event),
            from_numpy=lambda blocks: SimpleNamespace(
                pin_memory=lambda: SimpleNamespace(to=lambda device, non_blocking: torch.from_numpy(blocks))
            ),
        )
        self.copier._queue_copies = find_copies(driver(self.events, fails_at=fails_at))

    def use_stages(self, n_rows: int) -> None:
        self.copier._stages = {(0, way): HostStage(self.layers, n_rows) for way in _Way}

    def block(self, number: int) -> bytes:
        return b"".join(layer[number].tobytes() for layer in self.layers)


@pytest.fixture(params=[OldDriver, NewDriver, NewestDriver])
def driver(request: pytest.FixtureRequest) -> type[HostDriver]:
    found: type[HostDriver] = request.param
    return found


def column(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_with_any_driver_blocks_and_slots_are_copied_behind_the_fence(driver: type[HostDriver]) -> None:
    cuda = HostCuda(driver)
    fence = CudaFence(SimpleNamespace())
    expected = [cuda.block(number) for number in (7, 0, 9)]
    assert cuda.copier.gather(0, column(7, 0, 9), column(1, 6, 3), after=fence).nbytes == 3 * 128
    assert [bytes(cuda.pool.view(slot)) for slot in (1, 6, 3)] == expected
    cuda.copier.scatter(0, column(2, 3), column(6, 1), after=fence)
    assert [cuda.block(2), cuda.block(3)] == [expected[1], expected[0]]
    assert cuda.events == ["wait for the engine", *["copy"] * 6, "wait for the engine", *["copy"] * 4]
    cuda.copier.gather(0, column(), column(), after=ReachedFence())


@pytest.mark.parametrize("n_rows", [1, 2, 3, 10])
def test_short_ranges_are_put_together_on_the_device(n_rows: int) -> None:
    """The same bytes end in the same places, and a copy is a whole block, by a stage of fewer rows as well."""
    cuda = HostCuda(NewestDriver)
    cuda.use_stages(n_rows)
    fence = CudaFence(SimpleNamespace())
    expected = [cuda.block(number) for number in (7, 0, 9)]
    untouched = [cuda.block(number) for number in (1, 2, 4)]
    assert cuda.copier.gather(0, column(7, 0, 9), column(1, 6, 3), after=fence).nbytes == 3 * 128
    assert [bytes(cuda.pool.view(slot)) for slot in (1, 6, 3)] == expected
    cuda.copier.scatter(0, column(3, 8, 5), column(6, 1, 3), after=fence)
    assert [cuda.block(number) for number in (8, 3, 5)] == expected
    assert [cuda.block(number) for number in (1, 2, 4)] == untouched
    assert cuda.events == ["wait for the engine", *["copy"] * 3, "wait for the engine", *["copy"] * 3]
    cuda.copier.gather(0, column(), column(), after=ReachedFence())


def test_a_copy_that_is_refused_raises_once_the_device_is_done_with_the_memory(driver: type[HostDriver]) -> None:
    cuda = HostCuda(driver, fails_at=3)
    with pytest.raises(KVRDMAError, match="failed with error 700"):
        cuda.copier.gather(0, column(7, 0, 9), column(1, 6, 3), after=ReachedFence())
    assert cuda.events == ["copy", "copy", "copy", "synchronize"]


@pytest.mark.parametrize(
    ("blocks", "slots", "says"),
    [
        ([1, 2], [1], "2 blocks and 1 slots"),
        ([1], [1, 2], "1 blocks and 2 slots"),
        ([10], [0], "blocks must lie in 0..9"),
        ([-1], [0], "blocks must lie in 0..9"),
        ([0], [8], "slots must lie in 0..7"),
        ([0], [-1], "slots must lie in 0..7"),
    ],
)
def test_what_is_no_pair_of_a_block_and_a_slot_is_refused_before_anything_is_queued(
    blocks: Sequence[int], slots: Sequence[int], says: str
) -> None:
    cuda = HostCuda(OldDriver)
    for copy in (cuda.copier.gather, cuda.copier.scatter):
        with pytest.raises(RegionError, match=says):
            copy(0, column(*blocks), column(*slots), after=CudaFence(SimpleNamespace()))
    assert cuda.events == []


on_a_device = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: run it on a machine that has one"
)


def device_layers(n_blocks: int = 40, nbytes: int = 4096) -> tuple[list[Any], BlockLayout]:
    """Three layers of random blocks on the first device."""
    layers = [torch.randint(0, 255, (n_blocks, nbytes), dtype=torch.uint8, device="cuda") for _ in range(3)]
    runs = tuple(ByteRun(str(i), layer.data_ptr(), nbytes, nbytes) for i, layer in enumerate(layers))
    return layers, BlockLayout(n_blocks, runs, "cuda:0", layers)


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("how", ["staged", "by range", "one by one"])
def test_gather_and_scatter_on_a_device(how: str) -> None:
    layers, layout = device_layers()
    with PinnedPool(layout.nbytes, 40, slab_nbytes=16 * layout.nbytes) as pool:
        copier = CudaCopier("cuda:0")
        if how == "one by one":  # as with a driver that has no batches
            copier._queue_copies = find_copies(SimpleNamespace(cuMemcpyAsync=load_driver().cuMemcpyAsync))
        copier.register(layout, pool)
        assert copier._stages
        if how != "staged":
            copier._stages.clear()
        blocks, slots = np.arange(40)[::-1].copy(), np.random.default_rng(0).permutation(40)
        before = [layer.clone() for layer in layers]
        copy = copier.gather(0, blocks, slots, after=copier.fence())
        copy.wait()
        assert copy.done()
        assert copy.seconds > 0
        for layer in layers:
            layer.zero_()
        copier.scatter(0, blocks, slots, after=copier.fence()).wait()
        copier.close()
    assert all(torch.equal(a, b) for a, b in zip(before, layers, strict=True))


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize(("stride", "nbytes"), [(64, 64), (80, 48), (40_000, 32_008)])
def test_a_stage_moves_ranges_and_nothing_between_them(stride: int, nbytes: int) -> None:
    memory = [torch.randint(0, 255, (10 * stride,), dtype=torch.uint8, device="cuda") for _ in range(3)]
    runs = tuple(ByteRun(str(i), one.data_ptr(), stride, nbytes) for i, one in enumerate(memory))
    before = [one.clone().view(10, stride) for one in memory]
    stage = Stage(BlockLayout(10, runs, "cuda:0", memory), "cuda:0", nbytes=4 * 3 * nbytes)
    assert stage.n_rows == 4
    index = torch.tensor([9, 0, 4], device="cuda")
    stage.pack(index)
    stage.unpack(index.flip(0))  # the first and the last of them change places
    for one, old in zip(memory, before, strict=True):
        new = old.clone()
        new[9, :nbytes], new[4, :nbytes] = old[4, :nbytes], old[9, :nbytes]
        assert torch.equal(one.view(10, stride), new)


def test_ranges_that_are_not_of_whole_words_have_no_stage() -> None:
    layout = BlockLayout(10, (ByteRun("a", 4096, 64, 60),))
    with pytest.raises(ConfigError, match="multiples of 8 bytes"):
        Stage(layout, "cpu")


@pytest.mark.gpu
@on_a_device
def test_a_save_waits_for_the_kernels_before_its_fence() -> None:
    layers, layout = device_layers()
    with PinnedPool(layout.nbytes, 40) as pool:
        copier = CudaCopier("cuda:0")
        copier.register(layout, pool)
        torch.cuda._sleep(500_000_000)  # cycles: some tenths of a second
        for number, layer in enumerate(layers):
            layer.fill_(10 + number)
        copy = copier.gather(0, np.arange(40), np.arange(40), after=copier.fence())
        assert not copy.done()  # it was queued, and the kernel runs yet
        copy.wait()
        rows = pool.rows()[0][:, : layout.nbytes].reshape(40, 3, 4096)
        assert [np.unique(rows[:, number]).tolist() for number in range(3)] == [[10], [11], [12]]
        copier.close()


@pytest.mark.gpu
@on_a_device
def test_an_agent_saves_offloads_fetches_and_loads_on_a_device() -> None:
    """Through a pool that grows meanwhile, each of its slabs page-locked on the growing thread."""
    space = KeySpace("m", "w", "c", "bfloat16", "a", head_size=64, layers=3, block_tokens=4)
    keys = pack_keys(block_keys(space, range(4 * 40)))
    layers, layout = device_layers()
    before = [layer.clone() for layer in layers]
    copier = CudaCopier("cuda:0")
    reported = threading.Semaphore(0)
    with (
        MemoryBackend(Url.parse("memory://"), Settings()) as backend,
        PinnedPool(layout.nbytes, 40, slab_nbytes=8 * layout.nbytes, in_background=True) as pool,
    ):
        copier.register(layout, pool)
        agent = TransferAgent(pool, Shard(0, 0, 3, 0, 1), backend=backend, copier=copier, on_report=reported.release)
        agent.use_keyspace(space)
        agent.grow()
        while (growth := agent.poll_pool()) is None or growth.growing:
            assert reported.acquire(timeout=30)
        assert (growth.n_slots, growth.failure) == (40, "")

        def do(number: int, kind: JobKind, slots: np.ndarray, blocks: np.ndarray) -> None:
            fence = copier.fence()
            agent.submit([Job(kind, number, keys, slots, 10.0, blocks)], fence=fence)
            while not (reports := agent.poll()):
                assert reported.acquire(timeout=30)
            assert [report.number for report in reports] == [number]
            assert (reports[0].status == BlockStatus.OK).all()

        none = np.array([], dtype=np.int64)
        there, back = np.random.default_rng(1).permutation(40), np.random.default_rng(2).permutation(40)
        do(1, JobKind.SAVE, there, np.arange(40))
        do(2, JobKind.PUT, there, none)
        for layer in layers:
            layer.zero_()
        for slot in range(40):
            pool.view(slot)[:] = 0
        do(3, JobKind.FETCH, back, none)
        do(4, JobKind.LOAD, back, np.arange(40))
        assert agent.close()
        copier.close()
    assert all(torch.equal(a, b) for a, b in zip(before, layers, strict=True))
