"""Vectored socket I/O straight from and into pool memory: iovecs are numpy columns, never lists of views.

Python's own sendmsg wants a buffer object a range. Here a batch's iovecs are one int64[n, 2] array of
(address, nbytes), which is what the kernel's `struct iovec` is on 64-bit Linux, and the call goes by ctypes,
which releases the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.layout import Int64s

IOV_MAX: Final = 1024
_MSG_NOSIGNAL: Final = 0x4000


class _MsgHdr(ctypes.Structure):
    _fields_ = (
        ("msg_name", ctypes.c_void_p),
        ("msg_namelen", ctypes.c_uint32),
        ("msg_iov", ctypes.c_void_p),
        ("msg_iovlen", ctypes.c_size_t),
        ("msg_control", ctypes.c_void_p),
        ("msg_controllen", ctypes.c_size_t),
        ("msg_flags", ctypes.c_int),
    )


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.sendmsg, _libc.recvmsg):
    _call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    _call.restype = ctypes.c_ssize_t


def make_iovecs(addresses: Int64s, nbytes: Int64s) -> Int64s:
    """Lay out int64[m, 2], neighbours that touch merged into one."""
    n = len(addresses)
    if n > 1:
        touches = addresses[:-1] + nbytes[:-1] == addresses[1:]
        if touches.any():
            starts = np.flatnonzero(np.concatenate(([True], ~touches)))
            nbytes = np.add.reduceat(nbytes, starts)
            addresses = addresses[starts]
    iovecs = np.empty((len(addresses), 2), dtype=np.int64)
    iovecs[:, 0], iovecs[:, 1] = addresses, nbytes
    return iovecs


class IoCursor:
    """Where a vectored send or receive stands. `keepalive` owns the memory that the iovecs point to.

    `before` and `after` are (address, nbytes) of what comes first and last: a frame's head, the control buffer.
    """

    __slots__ = ("_base", "_ends", "_first", "_iovecs", "_keepalive", "_message", "_pointer", "done", "total")

    def __init__(
        self,
        iovecs: Int64s,
        keepalive: Any,
        *,
        before: tuple[int, int] | None = None,
        after: tuple[int, int] | None = None,
    ) -> None:
        first, last = int(before is not None), int(after is not None)
        whole = np.empty((first + len(iovecs) + last, 2), dtype=np.int64)
        whole[first : first + len(iovecs)] = iovecs
        if before is not None:
            whole[0] = before
        if after is not None:
            whole[-1] = after
        self._iovecs = whole
        self._base = self._iovecs.ctypes.data
        self._ends = whole[:, 1].cumsum()
        self._first = 0
        self._keepalive = keepalive
        self._message = _MsgHdr()
        self._pointer = ctypes.addressof(self._message)
        self.total = int(self._ends[-1]) if len(whole) else 0
        self.done = 0

    def send(self, fd: int) -> int:
        """Send what the socket takes now: bytes, or -1 where it takes none; raises `OSError`."""
        return self._move(_libc.sendmsg, fd, _MSG_NOSIGNAL)

    def receive(self, fd: int) -> int:
        """Receive what is there now: bytes, 0 at the stream's end, -1 where nothing is there."""
        return self._move(_libc.recvmsg, fd, 0)

    def fill(self, data: NDArray[np.uint8]) -> None:
        """Receive bytes that came in another way; no more than there is room for."""
        at, n = 0, data.nbytes
        while at < n:
            address, room = self._iovecs[self._first].tolist()
            part = min(room, n - at)
            ctypes.memmove(address, data.ctypes.data + at, part)
            at += part
            self.done += part
            if self.done < self.total:
                self._advance()

    def _move(self, call: Any, fd: int, flags: int) -> int:
        message = self._message
        message.msg_iov = self._base + 16 * self._first
        message.msg_iovlen = min(IOV_MAX, len(self._iovecs) - self._first)
        while (n := call(fd, self._pointer, flags)) < 0:
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return -1
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        self.done += n
        if self.done < self.total:
            self._advance()
        return int(n)

    def _advance(self) -> None:
        first = int(self._ends.searchsorted(self.done, side="right"))
        iovecs = self._iovecs
        rest = int(self._ends[first]) - self.done
        if rest < iovecs[first, 1]:
            iovecs[first, 0] += iovecs[first, 1] - rest
            iovecs[first, 1] = rest
        self._first = first
