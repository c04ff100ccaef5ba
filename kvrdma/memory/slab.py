"""Slabs: the large pieces of memory that are mapped, touched, page-locked and registered once."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import CapacityError, ClosedError, RegionError

logger = logging.getLogger(__name__)

PAGE_NBYTES: Final = mmap.PAGESIZE
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14
_CHUNK_NBYTES: Final = 8 << 20  # touched in one call: a few milliseconds in which nobody else can map memory
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A range of memory that transfers may use: a slab of ours, or an engine's own pool.

    `keepalive` owns the memory; `fd` names it to other processes where it can be shared. Two of them are
    equal only if they are the same object, so one can be a key of a table of registrations.
    """

    address: int
    nbytes: int
    keepalive: Any = field(default=None, repr=False)
    fd: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.nbytes < 1 or self.address < 1:
            raise RegionError(f"memory: address and size must be above 0, got {self.address}, {self.nbytes}")

    @classmethod
    def of(cls, buffer: Any) -> Memory:
        """Describe a writable, contiguous buffer (a bytearray, an array), which it keeps alive."""
        array = np.frombuffer(buffer, dtype=np.uint8)
        if not array.flags.writeable:
            raise RegionError("memory: the buffer is read-only; a writable one is needed")
        return cls(array.ctypes.data, array.nbytes, keepalive=array)

    def view(self) -> memoryview:
        """The bytes as a writable memoryview, without a copy. It keeps the memory alive."""
        return memoryview(self._raw()).cast("B")

    def array(self) -> NDArray[np.uint8]:
        """The bytes as uint8[nbytes], without a copy. It keeps the memory alive."""
        return np.ctypeslib.as_array(self._raw())

    def _raw(self) -> ctypes.Array[ctypes.c_uint8]:
        raw = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        raw.owner = self  # type: ignore[attr-defined]  # the base of every view, so it keeps what owns the memory
        return raw


def bytes_at(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Raw memory as uint8[nbytes], without a copy. Valid as long as its owner is."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


class SlabSource(Protocol):
    """Where slabs come from: memfds here; named files, huge pages or a device elsewhere."""

    def allocate(self, nbytes: int) -> Memory:
        """Map `nbytes` that are touched, and page-locked where that is allowed; raises `CapacityError`."""

    def available_nbytes(self) -> int:
        """How much `allocate` could give in all, as far as can be told."""

    def release(self, memory: Memory) -> None:
        """Give back what `allocate` gave. Views that still exist keep the pages, not the descriptor."""

    def cancel(self) -> None:
        """An `allocate` under way ends soon with `ClosedError`, and every later one at once."""


class MemfdSlabs:
    """Anonymous memory with a descriptor that a process on the same host can be given.

    Sealed against shrinking, so that nobody who maps it can be hit by SIGBUS. Pages are locked where the
    limit allows; `unlocked_nbytes` counts those that are not, and the first refusal warns.
    """

    def __init__(self, *, lock: bool = True) -> None:
        self._lock = lock
        self._guard = threading.Lock()
        self._cancelled = False
        self.locked_nbytes = 0
        self.unlocked_nbytes = 0

    def allocate(self, nbytes: int) -> Memory:
        """Map one slab; raises `CapacityError` where the host has not that much memory."""
        nbytes = -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES
        available = self.available_nbytes()
        if nbytes > available:
            raise CapacityError(f"slab of {nbytes} bytes: the host has {available} bytes available")
        fd = os.memfd_create("kvrdma-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
            array = np.frombuffer(mapping, dtype=np.uint8)
            self._populate(array)
        except BaseException:
            os.close(fd)
            raise
        return Memory(array.ctypes.data, nbytes, keepalive=array, fd=fd)

    def available_nbytes(self) -> int:
        """What the host has available."""
        return available_memory_nbytes()

    def release(self, memory: Memory) -> None:
        """Close the descriptor and let go of the pages."""
        _libc.munlock(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.nbytes))
        if memory.fd is not None:
            os.close(memory.fd)

    def cancel(self) -> None:
        """Have an allocation under way end after its next few MiB."""
        self._cancelled = True

    def _populate(self, array: NDArray[np.uint8]) -> None:
        """Touch and lock the pages, in chunks. A slab is locked as a whole or not at all."""
        refusal = None if self._lock else 0
        for first in range(0, array.nbytes, _CHUNK_NBYTES):
            if self._cancelled:
                raise ClosedError("slab: its pool is being closed")
            chunk = array[first : first + _CHUNK_NBYTES]
            _touch(chunk)
            if refusal is None and _libc.mlock(ctypes.c_void_p(chunk.ctypes.data), ctypes.c_size_t(chunk.nbytes)):
                refusal = ctypes.get_errno()
                _libc.munlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        if self._lock:
            self._count(array.nbytes, refusal)

    def _count(self, nbytes: int, refusal: int | None) -> None:
        with self._guard:
            if refusal is None:
                self.locked_nbytes += nbytes
                return
            first = self.unlocked_nbytes == 0
            self.unlocked_nbytes += nbytes
        if first:
            logger.warning(
                "pool memory is not page-locked (%s): copies and RDMA may be slower. "
                "Raise the limit with `ulimit -l unlimited`, or LimitMEMLOCK=infinity in the unit file",
                os.strerror(refusal),
            )


class SlabReserve:
    """Slabs of one size, all made at the start and handed out whole: what size classes share."""

    def __init__(self, capacity_nbytes: int, slab_nbytes: int, *, source: SlabSource | None = None) -> None:
        self._source: SlabSource = MemfdSlabs() if source is None else source
        self.slab_nbytes = slab_nbytes
        n_slabs, available = capacity_nbytes // slab_nbytes, self._source.available_nbytes()
        if n_slabs < 1:
            raise CapacityError(f"capacity of {capacity_nbytes} bytes: less than one slab of {slab_nbytes} bytes")
        if capacity_nbytes > available:
            raise CapacityError(f"capacity of {capacity_nbytes} bytes: the host has {available} bytes available")
        self.slabs: list[Memory] = []
        try:
            for _ in range(n_slabs):
                self.slabs.append(self._source.allocate(slab_nbytes))
        except BaseException:
            self.close()
            raise
        self._free = list(reversed(self.slabs))

    def available_nbytes(self) -> int:
        """What was not handed out."""
        return len(self._free) * self.slab_nbytes

    def allocate(self, nbytes: int) -> Memory:
        """Hand out one slab; raises `CapacityError` where none is left or it is too small."""
        if nbytes > self.slab_nbytes or not self._free:
            raise CapacityError(f"{nbytes} bytes asked for: {len(self._free)} slabs of {self.slab_nbytes} are left")
        return self._free.pop()

    def release(self, memory: Memory) -> None:
        """Take a slab back."""
        self._free.append(memory)

    def cancel(self) -> None:
        """Nothing to do: to hand out a slab takes no time."""

    def close(self) -> None:
        """Give every slab back to where they came from."""
        slabs, self.slabs, self._free = self.slabs, [], []
        for memory in slabs:
            self._source.release(memory)


def _touch(array: NDArray[np.uint8]) -> None:
    """Make every page present, so that no first use waits for the kernel."""
    refused = _libc.madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), _MADV_POPULATE_WRITE)
    if not refused:
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        raise CapacityError(f"slab of {array.nbytes} bytes: cannot be made present ({os.strerror(code)})")
    array[::PAGE_NBYTES] = 0  # kernels before 5.14


def available_memory_nbytes() -> int:
    """Bytes that the kernel says can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CapacityError("/proc/meminfo names no MemAvailable: Linux 3.14 or newer is needed")
