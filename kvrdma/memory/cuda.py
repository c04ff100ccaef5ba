"""CUDA: blocks in device memory and pinned slots, one stream a direction, copies as batched DMA.

Needs torch with CUDA. The slabs are page-locked for the device once, by cudaHostRegister; a copy is submitted
on the agent's thread as one cuMemcpyBatchAsync where the driver has it (12.8), else as a cuMemcpyAsync a range.
Ranges that are short are put together on the device first (staging.py).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import numpy as np

from kvrdma.errors import ConfigError, KVRDMAError
from kvrdma.layout import BlockLayout, Int64s
from kvrdma.memory.copier import Copy, Fence, check_pairs
from kvrdma.memory.pool import PinnedPool
from kvrdma.memory.slab import Memory
from kvrdma.memory.staging import Stage

logger = logging.getLogger(__name__)

_DIRECT_NBYTES: Final = 256 << 10  # ranges from here on are copied without a stage
_PORTABLE: Final = 1  # cudaHostRegisterPortable
_IN_STREAM_ORDER: Final = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("src_location", _Location),
        ("dst_location", _Location),
        ("flags", ctypes.c_uint),
    )


def slot_addresses(pool: PinnedPool, slots: Int64s) -> Int64s:
    """Where slots begin."""
    bases = np.array([memory.address for memory in pool.memories], dtype=np.int64)
    slab, within = np.divmod(slots, pool.slots_per_slab)
    addresses: Int64s = bases[slab] + within * pool.slot_stride
    return addresses


def copy_columns(layout: BlockLayout, pool: PinnedPool, blocks: Int64s, slots: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Device address, slot address and size of every run of every block: int64[len(blocks) * runs]."""
    starts = np.array([run.address for run in layout.runs], dtype=np.int64)
    strides = np.array([run.block_stride for run in layout.runs], dtype=np.int64)
    sizes = np.array([run.nbytes for run in layout.runs], dtype=np.int64)
    offsets = np.cumsum(sizes) - sizes
    device = starts[None, :] + blocks[:, None] * strides[None, :]
    host = slot_addresses(pool, slots)[:, None] + offsets[None, :]
    return device.ravel(), host.ravel(), np.tile(sizes, len(blocks))


class _Way(Enum):
    """The direction of a copy."""

    TO_HOST = "to host"
    TO_DEVICE = "to device"


class CudaFence:
    """An event on the engine's compute stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """Block until the engine's work up to here is done."""
        self.event.synchronize()


class CudaCopy:
    """A copy queued on a stream."""

    def __init__(self, started: Any, ended: Any, nbytes: int, keepalive: Any) -> None:
        self._started = started
        self._ended = ended
        self._keepalive = keepalive
        self.nbytes = nbytes

    @property
    def seconds(self) -> float:
        """What it took on the device, once done."""
        return float(self._started.elapsed_time(self._ended)) / 1e3

    def done(self) -> bool:
        """Whether all bytes are there, without waiting."""
        return bool(self._ended.query())

    def wait(self) -> None:
        """Block until all bytes are there."""
        self._ended.synchronize()


class CudaCopier:
    """Copies between a CUDA device's blocks and slots.

    Raises:
        ConfigError: torch has no CUDA.
        KVRDMAError: the driver refused to page-lock a slab, or a copy.
    """

    def __init__(self, device: str) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"KV caches on {device}, but this torch has no CUDA")
        self._torch = torch
        self._device = torch.device(device)
        self._runtime = torch.cuda.cudart()
        self._streams = {way: torch.cuda.Stream(self._device) for way in _Way}
        self._groups: list[tuple[BlockLayout, PinnedPool]] = []
        self._stages: dict[tuple[int, _Way], Stage] = {}
        self._guard = threading.Lock()
        self._locked: list[int] = []
        self._queue_copies = find_copies(load_driver())

    def register(self, layout: BlockLayout, pool: PinnedPool) -> None:
        """Page-lock the pool's slabs for the device, once."""
        if layout.nbytes != pool.slot_nbytes:
            raise ConfigError(f"a block has {layout.nbytes} bytes, a slot {pool.slot_nbytes}")
        for memory in pool.memories:
            self.prepare(memory)
        self._groups.append((layout, pool))
        if layout.nbytes < _DIRECT_NBYTES * len(layout.runs):
            self._make_stages(layout)

    def prepare(self, memory: Memory) -> None:
        """Page-lock a slab for the device; once, however often it is called."""
        with self._guard, self._torch.cuda.device(self._device):  # threads begin on device 0
            if memory.address not in self._locked:
                self._check(self._runtime.cudaHostRegister(memory.address, memory.nbytes, _PORTABLE))
                self._locked.append(memory.address)

    def fence(self) -> Fence:
        """Mark the compute stream; on the engine's thread."""
        event = self._torch.cuda.Event()
        event.record(self._torch.cuda.current_stream(self._device))
        return CudaFence(event)

    def gather(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Queue copies of device blocks into slots."""
        return self._copy(group, blocks, slots, _Way.TO_HOST, after)

    def scatter(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Queue copies of slots into device blocks."""
        return self._copy(group, blocks, slots, _Way.TO_DEVICE, after)

    def close(self) -> None:
        """Wait for queued copies, then give the page locks back."""
        for stream in self._streams.values():
            stream.synchronize()
        for address in self._locked:
            self._runtime.cudaHostUnregister(address)
        self._locked.clear()
        self._groups.clear()
        self._stages.clear()

    def _copy(self, group: int, blocks: Int64s, slots: Int64s, way: _Way, after: Fence) -> Copy:
        layout, pool = self._groups[group]
        check_pairs(blocks, layout.n_blocks, slots, pool.n_slots)
        stream = self._streams[way]
        with self._torch.cuda.stream(stream):
            if isinstance(after, CudaFence):
                stream.wait_event(after.event)
            else:
                after.wait()
            started, ended = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record(stream)  # which makes the device's context this thread's, as the driver needs it
            try:
                if (stage := self._stages.get((group, way))) is None:
                    keepalive = self._queue(way, *copy_columns(layout, pool, blocks, slots))
                else:
                    keepalive = self._queue_staged(way, stage, blocks, slot_addresses(pool, slots), layout.nbytes)
                ended.record(stream)
            except BaseException:
                stream.synchronize()  # what was queued before uses the memory, which the caller is about to let go
                raise
        return CudaCopy(started, ended, len(blocks) * layout.nbytes, keepalive)

    def _queue(self, way: _Way, device: Int64s, host: Int64s, sizes: Int64s) -> Any:
        target, source = (host, device) if way is _Way.TO_HOST else (device, host)
        self._queue_copies(target, source, sizes, self._streams[way].cuda_stream)
        return target, source, sizes

    def _queue_staged(self, way: _Way, stage: Stage, blocks: Int64s, host: Int64s, nbytes: int) -> Any:
        """As many blocks at a time as the stage has rows; its stream has them in order."""
        index = self._torch.from_numpy(blocks).pin_memory().to(self._device, non_blocking=True)
        queued = []
        for first in range(0, len(blocks), stage.n_rows):
            part = slice(first, min(first + stage.n_rows, len(blocks)))
            n = part.stop - first
            if way is _Way.TO_HOST:
                stage.pack(index[part])
            queued.append(self._queue(way, stage.addresses(n), host[part].copy(), np.full(n, nbytes, dtype=np.int64)))
            if way is _Way.TO_DEVICE:
                stage.unpack(index[part])
        return index, queued

    def _make_stages(self, layout: BlockLayout) -> None:
        """Where they cannot be had every range is copied by itself: slower, and as right."""
        group = len(self._groups) - 1
        try:
            self._stages |= {(group, way): Stage(layout, self._device) for way in _Way}
        except Exception as error:  # of Triton, its compiler or torch's memory: whatever it is, the engine starts
            logger.warning("%s: short ranges of blocks are copied one by one (%s)", self._device, error)

    @staticmethod
    def _check(code: Any) -> None:
        if int(code) != 0:
            raise KVRDMAError(f"CUDA refused a call with error {int(code)}")


def load_driver() -> Any:
    """CUDA's driver library, which comes with the device; raises `ConfigError` where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"the CUDA driver's library cannot be loaded ({error})") from None


def find_copies(driver: Any) -> Callable[[Int64s, Int64s, Int64s, int], None]:
    """A call that queues copies on a stream: columns of target, source and size, one row a copy.

    cuMemcpyBatchAsync, or cuMemcpyAsync for each where the driver is older than 12.8. Raises `KVRDMAError`; copies
    may then be queued already.
    """
    newer = hasattr(driver, "cuMemcpyBatchAsync_v2")  # without the index of the failed copy
    if not newer and not hasattr(driver, "cuMemcpyBatchAsync"):
        return functools.partial(_copy_each, driver)
    call = driver.cuMemcpyBatchAsync_v2 if newer else driver.cuMemcpyBatchAsync

    def batch(target: Int64s, source: Int64s, sizes: Int64s, stream: int) -> None:
        if not len(sizes):
            return  # no copies are an error to the driver
        attributes = _Attributes(_IN_STREAM_ORDER)
        first = ctypes.c_size_t(0)
        failed = ctypes.c_size_t(0)
        arguments: list[Any] = [
            ctypes.c_void_p(target.ctypes.data),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_void_p(sizes.ctypes.data),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(attributes),
            ctypes.byref(first),
            ctypes.c_size_t(1),
        ]
        if not newer:
            arguments.append(ctypes.byref(failed))
        code = call(*arguments, ctypes.c_void_p(stream))
        if code != 0:
            raise KVRDMAError(f"cuMemcpyBatchAsync failed with error {code}")

    return batch


def _copy_each(driver: Any, target: Int64s, source: Int64s, sizes: Int64s, stream: int) -> None:
    for to, at, nbytes in zip(target.tolist(), source.tolist(), sizes.tolist(), strict=True):
        code = driver.cuMemcpyAsync(
            ctypes.c_uint64(to), ctypes.c_uint64(at), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)
        )
        if code != 0:
            raise KVRDMAError(f"cuMemcpyAsync failed with error {code}")
