"""The baselines of the transport benchmark: plain blocking sockets, and memcpy; nothing else."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

WRITE: Final = b"W"
READ: Final = b"R"
_ACK: Final = b"A"
_IOV_MAX: Final = 1024


def send_views(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Send every view, whole."""
    first, skip = 0, 0
    while first < len(views):
        part = [views[first][skip:], *views[first + 1 : first + _IOV_MAX]] if skip else views[first : first + _IOV_MAX]
        first, skip = _advance(views, first, skip, sock.sendmsg(part))


def receive_views(sock: socket.socket, views: Sequence[memoryview]) -> bool:
    """Fill every view; False where the peer closed."""
    first, skip = 0, 0
    while first < len(views):
        part = [views[first][skip:], *views[first + 1 : first + _IOV_MAX]] if skip else views[first : first + _IOV_MAX]
        n = sock.recvmsg_into(part)[0]
        if n == 0:
            return False
        first, skip = _advance(views, first, skip, n)
    return True


def _advance(views: Sequence[memoryview], first: int, skip: int, n: int) -> tuple[int, int]:
    n += skip
    while first < len(views) and n >= len(views[first]):
        n -= len(views[first])
        first += 1
    return first, n


def serve_plain(sock: socket.socket, views: Sequence[memoryview]) -> None:
    """Answer batches until the peer closes: WRITE fills our views, READ sends them."""
    while request := sock.recv(1):
        if request == WRITE:
            if not receive_views(sock, views):
                return
            sock.sendall(_ACK)
        else:
            send_views(sock, views)


class Baseline(Protocol):
    """Moves the same batches as the transport that is measured."""

    def begin(self, *, write: bool) -> None:
        """Start a batch."""

    def finish_one(self, *, write: bool) -> None:
        """Wait for the oldest batch."""


class PlainClient:
    """Keeps `depth` batches under way on one socket; `finish_one` waits for the oldest."""

    def __init__(self, sock: socket.socket, views: Sequence[memoryview]) -> None:
        self._sock = sock
        self._views = views

    def begin(self, *, write: bool) -> None:
        """Start a batch."""
        if write:
            self._sock.sendall(WRITE)
            send_views(self._sock, self._views)
        else:
            self._sock.sendall(READ)

    def finish_one(self, *, write: bool) -> None:
        """Wait for the oldest batch."""
        ended = not self._sock.recv(1) if write else not receive_views(self._sock, self._views)
        if ended:
            raise ConnectionError("the baseline's peer closed the connection")


class MemcpyClient:
    """Copies each block once, between two pieces of this process's memory, when its batch is waited for."""

    def __init__(self, array: NDArray[np.uint8], offsets: Sequence[int], nbytes: int) -> None:
        self._other = np.ones_like(array)
        self._nbytes = nbytes
        ours, theirs = array.ctypes.data, self._other.ctypes.data
        self._places = [(ours + offset, theirs + offset) for offset in offsets]

    def begin(self, *, write: bool) -> None:
        """Nothing to do yet."""

    def finish_one(self, *, write: bool) -> None:
        """Copy."""
        for ours, theirs in self._places:
            ctypes.memmove(*((theirs, ours) if write else (ours, theirs)), self._nbytes)
