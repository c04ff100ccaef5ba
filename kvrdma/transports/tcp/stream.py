"""One socket of an endpoint: frames out by priority, frames in by a small state machine, payloads in place."""

from __future__ import annotations

import heapq
import itertools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Protocol

import numpy as np

from kvrdma.errors import ProtocolError, TransportError
from kvrdma.layout import Int64s
from kvrdma.transports.tcp.iovec import IoCursor
from kvrdma.transports.tcp.loop import READABLE, WRITABLE, IoLoop
from kvrdma.transports.tcp.wire import HEADER_NBYTES, Header

logger = logging.getLogger(__name__)

_LOW_WATER_NBYTES: Final = 256 << 10
_STEPS_A_TURN: Final = 32  # then the loop's other sockets have their turn
_NO_IOVECS: Final = np.zeros((0, 2), dtype=np.int64)


@dataclass(slots=True, eq=False)
class OutFrame:
    """A frame to send: header and body as bytes, the payload where it lies. `keepalive` owns its memory."""

    head: bytes
    priority: int
    payload: Int64s = field(default_factory=lambda: _NO_IOVECS)
    keepalive: Any = None
    started: bool = False
    on_sent: Callable[[], None] | None = None


class Inbox(Protocol):
    """What an endpoint does with what its streams receive."""

    def on_frame(self, stream: Stream, header: Header, body: bytes) -> tuple[Int64s, Any] | None:
        """Take a frame; for one with a payload: the iovecs to receive it into, and what keeps them alive."""

    def on_payload(self, stream: Stream, header: Header) -> None:
        """Take note that a frame's payload has arrived."""

    def on_broken(self, stream: Stream, error: TransportError) -> None:
        """Take note that the socket is of no use any more."""


class _Expect(Enum):
    HEADER = 1
    BODY = 2
    PAYLOAD = 3


class Stream:
    """A non-blocking socket on an I/O loop. Everything here runs on the loop's thread."""

    def __init__(self, sock: socket.socket, loop: IoLoop, inbox: Inbox) -> None:
        self.in_flight = 0  # the endpoint's operations that wait for a reply on this stream
        self._sock = sock
        self._fd = sock.fileno()
        self._loop = loop
        self._inbox = inbox
        self._queue: list[tuple[int, int, OutFrame]] = []
        self._order = itertools.count()
        self._out: tuple[OutFrame, IoCursor] | None = None
        self._closed = False
        self._events = 0
        self._low_water = 1
        self._expect = _Expect.HEADER
        self._have = 0
        self._header: Header | None = None
        self._header_buffer = bytearray(HEADER_NBYTES)
        self._buffer = memoryview(self._header_buffer)
        self._header_array = np.frombuffer(self._header_buffer, dtype=np.uint8)
        self._header_iovec = np.array([[self._header_array.ctypes.data, HEADER_NBYTES]], dtype=np.int64)
        self._payload: IoCursor | None = None

    def start(self) -> None:
        """Begin to receive."""
        self._watch(READABLE)

    def send(self, frame: OutFrame) -> None:
        """Queue a frame, and send what the socket takes."""
        heapq.heappush(self._queue, (frame.priority, next(self._order), frame))
        if self._out is None:
            self._guarded(self._pump)

    def close(self) -> None:
        """Give up the socket and every frame that is queued."""
        if self._closed:
            return
        self._closed = True
        self._loop.forget(self._fd)
        self._sock.close()
        self._queue.clear()
        self._out = None
        self._payload = None

    def _watch(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.watch(self._fd, events, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & WRITABLE:
            self._guarded(self._pump)
        if events & READABLE and not self._closed:
            self._guarded(self._receive)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            step()
        except TransportError as error:
            self._inbox.on_broken(self, error)
        except OSError as error:
            self._inbox.on_broken(self, TransportError(f"tcp: {error.strerror or error}"))
        except Exception as error:  # in the middle of a frame the stream is of no use any more, whatever it was
            logger.exception("tcp: a stream failed unexpectedly")
            self._inbox.on_broken(self, TransportError(f"tcp: {type(error).__name__}: {error}"))

    def _pump(self) -> None:
        while not self._closed:
            if self._out is None:
                if not self._queue:
                    self._watch(READABLE)
                    return
                frame = heapq.heappop(self._queue)[2]
                frame.started = True
                head = np.frombuffer(frame.head, dtype=np.uint8)
                first = np.array([[head.ctypes.data, head.nbytes]], dtype=np.int64)
                iovecs = np.concatenate((first, frame.payload)) if len(frame.payload) else first
                self._out = (frame, IoCursor(iovecs, (head, frame.keepalive)))
            frame, cursor = self._out
            if cursor.send(self._fd) < 0:
                self._watch(READABLE | WRITABLE)
                return
            if cursor.done == cursor.total:
                self._out = None
                if frame.on_sent is not None:
                    frame.on_sent()

    def _receive(self) -> None:
        for _ in range(_STEPS_A_TURN):
            if self._closed:
                return
            if self._payload is not None:
                n = self._payload.receive(self._fd)
            else:
                try:
                    n = self._sock.recv_into(self._buffer[self._have :])
                except BlockingIOError:
                    n = -1
            if n < 0:
                self._set_low_water()
                return
            if n == 0:
                raise TransportError("tcp: the peer closed the connection")
            self._take(n)

    def _set_low_water(self) -> None:
        """Be woken when a good part of the payload has come, not at every segment: fewer, larger calls."""
        rest = 1 if self._payload is None else self._payload.total - HEADER_NBYTES - self._payload.done
        wanted = max(1, min(_LOW_WATER_NBYTES, rest))
        if wanted != self._low_water:
            self._low_water = wanted
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _take(self, n: int) -> None:
        if self._payload is not None:
            payload_nbytes = self._payload.total - HEADER_NBYTES
            if self._payload.done < payload_nbytes:
                return
            # The iovecs end with the next header, so its bytes came in the same call.
            self._have = self._payload.done - payload_nbytes
            self._payload = None
            finished, self._header = self._header, None
            assert finished is not None
            self._expect = _Expect.HEADER
            self._inbox.on_payload(self, finished)
        else:
            self._have += n
        while not self._closed and self._payload is None and self._have == len(self._buffer):
            self._next()

    def _next(self) -> None:
        if self._expect is _Expect.HEADER:
            self._header = Header.decode(self._header_buffer)
            self._expect = _Expect.BODY
            self._buffer = memoryview(bytearray(self._header.body_nbytes))
            self._have = 0
            return
        header = self._header
        assert header is not None
        target = self._inbox.on_frame(self, header, bytes(self._buffer))
        self._buffer = memoryview(self._header_buffer)
        self._have = 0
        self._expect = _Expect.HEADER
        if header.payload_nbytes:
            if target is None:
                raise ProtocolError(f"tcp: {header.frame.name} brings a payload that nobody asked for")
            iovecs, keepalive = target
            self._payload = IoCursor(np.concatenate((iovecs, self._header_iovec)), keepalive)
            self._expect = _Expect.PAYLOAD
