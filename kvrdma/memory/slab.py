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
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import CapacityError, ClosedError, RegionError
from kvrdma.memory.limits import available_memory_nbytes, huge_pages, shared_huge_pages
from kvrdma.memory.numa import nodes_with_memory, prefer_node

logger = logging.getLogger(__name__)

PAGE_NBYTES: Final = mmap.PAGESIZE
_MADV_HUGEPAGE: Final = 14
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
    limit allows; `unlocked_nbytes` counts those that are not, and the first refusal warns. Huge pages that the
    host keeps are used while there are enough (`huge_nbytes` counts them), else transparent ones where the
    kernel gives them for shared memory. `node` is the NUMA node that pages come from while it has any.
    """

    def __init__(self, *, lock: bool = True, huge: bool = True, node: int | None = None) -> None:
        self._lock = lock
        self._huge = huge
        self._node = node if node is not None and len(nodes_with_memory()) > 1 else None
        self._told = False
        self.huge_nbytes = 0
        self._guard = threading.Lock()
        self._cancelled = False
        self.locked_nbytes = 0
        self.unlocked_nbytes = 0

    def allocate(self, nbytes: int) -> Memory:
        """Map one slab; raises `CapacityError` where the host has not that much memory."""
        memory = self._allocate_huge(nbytes) if self._huge else None
        if memory is None:
            available = available_memory_nbytes()
            if nbytes > available:
                raise CapacityError(f"slab of {nbytes} bytes: {available} bytes are available")
            memory = self._map(-(-nbytes // PAGE_NBYTES) * PAGE_NBYTES, 0)
        self._tell()
        return memory

    def _allocate_huge(self, nbytes: int) -> Memory | None:
        """A slab of the huge pages that the host keeps; None where there are not enough, or little would be used."""
        n_free, page_nbytes = huge_pages()
        if not n_free:
            return None
        whole = -(-nbytes // page_nbytes) * page_nbytes
        if whole > n_free * page_nbytes or whole - nbytes > whole // 8:
            return None
        try:
            memory = self._map(whole, os.MFD_HUGETLB)
        except CapacityError as error:  # somebody else was faster, or a limit
            logger.debug("no huge pages for a slab: %s", error)
            return None
        self.huge_nbytes += whole
        return memory

    def _map(self, nbytes: int, flags: int) -> Memory:
        try:
            return self._map_or_fail(nbytes, flags)
        except OSError as error:  # a limit of the process: address space, file size, descriptors
            raise CapacityError(f"slab of {nbytes} bytes: {error.strerror or error} (see ulimit -a)") from error

    def _map_or_fail(self, nbytes: int, flags: int) -> Memory:
        fd = os.memfd_create("kvrdma-slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            mapping = mmap.mmap(fd, nbytes, mmap.MAP_SHARED)
            array = np.frombuffer(mapping, dtype=np.uint8)
            if self._node is not None:
                prefer_node(array.ctypes.data, nbytes, self._node)
            if self._huge and not flags:  # a wish, which the kernel may not grant
                _on(_libc.madvise, array, _MADV_HUGEPAGE)
            self._populate(array, is_huge=bool(flags))
        except BaseException:
            os.close(fd)
            raise
        return Memory(array.ctypes.data, nbytes, keepalive=array, fd=fd)

    def available_nbytes(self) -> int:
        """What the host and the control groups leave, and the huge pages that the host keeps."""
        n_free, page_nbytes = huge_pages() if self._huge else (0, 0)
        return available_memory_nbytes() + n_free * page_nbytes

    def release(self, memory: Memory) -> None:
        """Close the descriptor and let go of the pages."""
        _libc.munlock(ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.nbytes))
        if memory.fd is not None:
            os.close(memory.fd)

    def cancel(self) -> None:
        """Have an allocation under way end after its next few MiB."""
        self._cancelled = True

    def _populate(self, array: NDArray[np.uint8], *, is_huge: bool) -> None:
        """Touch and lock the pages, in chunks. A slab is locked as a whole or not at all; huge pages always are."""
        lock = self._lock and not is_huge
        refusal: int | None = None
        for first in range(0, array.nbytes, _CHUNK_NBYTES):
            if self._cancelled:
                raise ClosedError("slab: its pool is being closed")
            chunk = array[first : first + _CHUNK_NBYTES]
            _touch(chunk, may_fault=not is_huge)
            if lock and refusal is None and _on(_libc.mlock, chunk):
                refusal = ctypes.get_errno()
                _on(_libc.munlock, array)
        if self._lock:
            self._count(array.nbytes, refusal)

    def _tell(self) -> None:
        """Say once what kind of pages there are."""
        if not self._told:
            self._told = True
            kind = "of huge pages" if self.huge_nbytes else f"of {PAGE_NBYTES} bytes a page"
            logger.info(
                "slabs %s (free huge pages: %d, transparent ones for shared memory: %s), node %s",
                kind,
                huge_pages()[0],
                shared_huge_pages(),
                "any" if self._node is None else self._node,
            )

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
                "Raise the limit with `ulimit -l unlimited`, LimitMEMLOCK=infinity in the unit file, or "
                "`--ulimit memlock=-1` of a container",
                os.strerror(refusal),
            )


def _on(call: Any, array: NDArray[np.uint8], *arguments: int) -> int:
    """A call of libc on an array's memory: 0, or not, where it is refused."""
    return int(call(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), *arguments))


def _touch(array: NDArray[np.uint8], *, may_fault: bool) -> None:
    """Make every page present, so that no first use waits for the kernel.

    Huge pages that a limit forbids would end the process at a fault: they are only asked for, never touched.
    """
    if not _on(_libc.madvise, array, _MADV_POPULATE_WRITE):
        return
    code = ctypes.get_errno()
    if code != errno.EINVAL or not may_fault:
        raise CapacityError(f"slab of {array.nbytes} bytes: cannot be made present ({os.strerror(code)})")
    array[::PAGE_NBYTES] = 0  # kernels before 5.14
