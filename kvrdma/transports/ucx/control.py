"""The control socket of a connection, on an I/O loop: frames out, frames in, and its end as the first sign of a dead
peer."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Final

from kvrdma.errors import TransportError
from kvrdma.transports.loop import READABLE, WRITABLE, IoLoop
from kvrdma.transports.ucx.wire import Frame, FrameReader

logger = logging.getLogger(__name__)

_RECEIVE_NBYTES: Final = 64 << 10
_MAX_UNSENT: Final = 4 << 20


class ControlStream:
    """A non-blocking socket. Everything here runs on the loop's thread.

    `on_frame` takes what arrives; `on_broken` is told once that nothing more will.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: IoLoop,
        *,
        on_frame: Callable[[Frame], None],
        on_broken: Callable[[TransportError], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._on_frame = on_frame
        self._on_broken = on_broken
        self._reader = FrameReader()
        self._unsent = bytearray()
        self._closed = False
        loop.watch(self._fd, READABLE, self._on_ready)

    def send(self, frame: Frame) -> None:
        """Send a frame, or queue what the socket does not take."""
        if not self._closed:
            self._unsent += frame.encode()
            self._guarded(self._flush)

    def close(self) -> None:
        """Give up the socket, and what was not sent."""
        if not self._closed:
            self._closed = True
            self._loop.forget(self._fd)
            self._sock.close()

    def _on_ready(self, events: int) -> None:
        if events & WRITABLE:
            self._guarded(self._flush)
        if events & READABLE:
            self._guarded(self._receive)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            step()
        except TransportError as error:
            self._on_broken(error)
        except OSError as error:
            self._on_broken(TransportError(f"ucx: {error.strerror or error}"))

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        del self._unsent[:sent]
        if len(self._unsent) > _MAX_UNSENT:
            raise TransportError("ucx: the peer reads nothing from its control socket")
        self._loop.watch(self._fd, READABLE | WRITABLE if self._unsent else READABLE, self._on_ready)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_NBYTES)
        except BlockingIOError:
            return
        if not data:
            raise TransportError("ucx: the peer closed the connection")
        for frame in self._reader.feed(data):
            self._on_frame(frame)
            if self._closed:
                return
