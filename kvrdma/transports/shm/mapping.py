"""Memory as it is given to a peer, and as it is mapped there."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import RegionError, TransportError
from kvrdma.memory import Memory
from kvrdma.transports.base import Rights

_MAP_FAILED: Final = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """A peer's memory in our address space, for as long as its array or a view of it lives."""

    array: NDArray[np.uint8]

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.array.ctypes.data


def check_shareable(memory: Memory) -> None:
    """Raise `RegionError` where memory cannot be given to a peer."""
    if memory.fd is None:
        raise RegionError(
            "shm: this memory has no descriptor, so a peer cannot map it; take it from a PinnedPool or MemfdSlabs, "
            "or use another transport for it"
        )
    why = _why_unfit(memory.fd, memory.nbytes)
    if why is not None:
        raise RegionError(f"shm: this memory cannot be shared: {why}")


def open_to_share(memory: Memory, rights: Rights) -> int:
    """A new descriptor of a region for a peer: without the right to write one that can only be mapped to be read."""
    assert memory.fd is not None
    if Rights.WRITE in rights:
        return os.dup(memory.fd)
    return open_to_read(memory.fd)


def open_to_read(fd: int) -> int:
    """The same file under a new descriptor that only reads. Other users cannot open it anew to write, either."""
    os.fchmod(fd, 0o600)
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def map_shared(fd: int, nbytes: int, *, write: bool = False) -> Mapping:
    """Map memory that a peer gave.

    Raises:
        TransportError: it is not what it should be: a file that could shrink under us would end this process.
    """
    why = _why_unfit(fd, nbytes)
    if why is not None:
        raise TransportError(f"shm: the peer's memory is not mapped: {why}")
    # Not by Python's mmap, which keeps a descriptor: a server would have one for each slab of each client.
    protection = mmap.PROT_READ | mmap.PROT_WRITE if write else mmap.PROT_READ
    address = _libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise TransportError(f"shm: the peer's memory cannot be mapped: {os.strerror(ctypes.get_errno())}")
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    weakref.finalize(raw, _libc.munmap, address, nbytes).atexit = False
    return Mapping(np.ctypeslib.as_array(raw))


def _why_unfit(fd: int, nbytes: int) -> str | None:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError:
        return "its descriptor is not that of a memfd"
    if not seals & fcntl.F_SEAL_SHRINK:
        return "its memfd is not sealed against shrinking (F_SEAL_SHRINK)"
    if size < nbytes:
        return f"its memfd has {size} bytes, {nbytes} are needed"
    return None
