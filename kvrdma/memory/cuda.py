"""CUDA: blocks in device memory and pinned slots, one stream a direction, copies as batched DMA.

Needs torch with CUDA. The slabs are page-locked for the device once, by cudaHostRegister; a copy is submitted
on the agent's thread as one cuMemcpyBatchAsync where the driver has it (12.8), else as strided copies.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any, Final

import numpy as np

from kvrdma.errors import ConfigError, KVRDMAError
from kvrdma.layout import BlockLayout, Int64s
from kvrdma.memory.copier import Copy, Fence, check_numbers
from kvrdma.memory.pool import PinnedPool
from kvrdma.memory.slab import Memory

_PORTABLE: Final = 1  # cudaHostRegisterPortable
_TO_HOST: Final = 2  # cudaMemcpyDeviceToHost
_TO_DEVICE: Final = 1  # cudaMemcpyHostToDevice
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


def copy_columns(layout: BlockLayout, pool: PinnedPool, blocks: Int64s, slots: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Device address, slot address and size of every run of every block: int64[len(blocks) * runs]."""
    bases = np.array([memory.address for memory in pool.memories], dtype=np.int64)
    slab, within = np.divmod(slots, pool.slots_per_slab)
    slot_addresses = bases[slab] + within * pool.slot_stride
    starts = np.array([run.address for run in layout.runs], dtype=np.int64)
    strides = np.array([run.block_stride for run in layout.runs], dtype=np.int64)
    sizes = np.array([run.nbytes for run in layout.runs], dtype=np.int64)
    offsets = np.cumsum(sizes) - sizes
    device = starts[None, :] + blocks[:, None] * strides[None, :]
    host = slot_addresses[:, None] + offsets[None, :]
    return device.ravel(), host.ravel(), np.tile(sizes, len(blocks))


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
        self._streams = {way: torch.cuda.Stream(self._device) for way in (_TO_HOST, _TO_DEVICE)}
        self._groups: list[tuple[BlockLayout, PinnedPool]] = []
        self._guard = threading.Lock()
        self._locked: list[int] = []
        self._batch_call = _find_batch_call()

    def register(self, layout: BlockLayout, pool: PinnedPool) -> None:
        """Page-lock the pool's slabs for the device, once."""
        if layout.nbytes != pool.slot_nbytes:
            raise ConfigError(f"a block has {layout.nbytes} bytes, a slot {pool.slot_nbytes}")
        for memory in pool.memories:
            self.prepare(memory)
        self._groups.append((layout, pool))

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
        return self._copy(group, blocks, slots, _TO_HOST, after)

    def scatter(self, group: int, blocks: Int64s, slots: Int64s, *, after: Fence) -> Copy:
        """Queue copies of slots into device blocks."""
        return self._copy(group, blocks, slots, _TO_DEVICE, after)

    def close(self) -> None:
        """Wait for queued copies, then give the page locks back."""
        for stream in self._streams.values():
            stream.synchronize()
        for address in self._locked:
            self._runtime.cudaHostUnregister(address)
        self._locked.clear()
        self._groups.clear()

    def _copy(self, group: int, blocks: Int64s, slots: Int64s, way: int, after: Fence) -> Copy:
        layout, pool = self._groups[group]
        check_numbers(blocks, layout.n_blocks, "block")
        check_numbers(slots, pool.n_slots, "slot")
        device, host, sizes = copy_columns(layout, pool, blocks, slots)
        stream = self._streams[way]
        with self._torch.cuda.device(self._device):
            if isinstance(after, CudaFence):
                stream.wait_event(after.event)
            started, ended = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            started.record(stream)
            target, source = (host, device) if way == _TO_HOST else (device, host)
            if self._batch_call is not None:
                self._batch_call(target, source, sizes, stream.cuda_stream)
            else:
                self._copy_strided(layout, pool, blocks, slots, way, stream.cuda_stream)
            ended.record(stream)
        return CudaCopy(started, ended, int(sizes.sum()), (target, source, sizes))

    def _copy_strided(
        self, layout: BlockLayout, pool: PinnedPool, blocks: Int64s, slots: Int64s, way: int, stream: int
    ) -> None:
        """One cudaMemcpy2DAsync for each run of each section that is consecutive on both sides."""
        runtime = ctypes.CDLL("libcudart.so")
        slab = slots // pool.slots_per_slab
        breaks = (np.diff(blocks) != 1) | (np.diff(slots) != 1) | (np.diff(slab) != 0)
        cuts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(blocks)]
        for first, last in itertools.pairwise(cuts):
            device, host, _ = copy_columns(layout, pool, blocks[first : first + 1], slots[first : first + 1])
            for run, at, slot in zip(layout.runs, device.tolist(), host.tolist(), strict=True):
                here, there = (slot, pool.slot_stride), (at, run.block_stride)
                target, source = (here, there) if way == _TO_HOST else (there, here)
                self._check(
                    runtime.cudaMemcpy2DAsync(
                        ctypes.c_void_p(target[0]),
                        ctypes.c_size_t(target[1]),
                        ctypes.c_void_p(source[0]),
                        ctypes.c_size_t(source[1]),
                        ctypes.c_size_t(run.nbytes),
                        ctypes.c_size_t(last - first),
                        ctypes.c_int(way),
                        ctypes.c_void_p(stream),
                    )
                )

    @staticmethod
    def _check(code: Any) -> None:
        if int(code) != 0:
            raise KVRDMAError(f"CUDA refused a call with error {int(code)}")


def _find_batch_call() -> Any:
    """cuMemcpyBatchAsync as a call on columns, or None where the driver has none (before 12.8)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    newer = hasattr(driver, "cuMemcpyBatchAsync_v2")  # without the index of the failed copy
    if not newer and not hasattr(driver, "cuMemcpyBatchAsync"):
        return None
    call = driver.cuMemcpyBatchAsync_v2 if newer else driver.cuMemcpyBatchAsync

    def batch(target: Int64s, source: Int64s, sizes: Int64s, stream: int) -> None:
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
