"""One socket of an endpoint: frames out by priority, frames in by a small state machine, payloads in place."""

from __future__ import annotations

import heapq
import itertools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from kvrdma.errors import ProtocolError, TransportError
from kvrdma.layout import Int64s
from kvrdma.transports.loop import READABLE, WRITABLE, IoLoop
from kvrdma.transports.tcp.iovec import IoCursor
from kvrdma.transports.tcp.wire import HEADER_NBYTES, Header

logger = logging.getLogger(__name__)

_CONTROL_NBYTES: Final = 16 << 10
_LOW_WATER_NBYTES: Final = 128 << 10
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
    cursor: IoCursor | None = None

    def prepare(self) -> IoCursor | None:
        """Make ready to be sent; nothing is left to do where there is no payload. On any thread."""
        if self.cursor is None and len(self.payload):
            head = np.frombuffer(self.head, dtype=np.uint8)
            self.cursor = IoCursor(self.payload, (head, self.keepalive), before=(head.ctypes.data, head.nbytes))
        return self.cursor


class Inbox(Protocol):
    """What an endpoint does with what its streams receive."""

    def on_frame(self, stream: Stream, header: Header, body: bytes) -> tuple[Int64s, Any] | None:
        """Take a frame; for one with a payload: the iovecs to receive it into, and what keeps them alive."""

    def on_payload(self, stream: Stream, header: Header) -> None:
        """Take note that a frame's payload has arrived."""

    def on_broken(self, stream: Stream, error: TransportError) -> None:
        """Take note that the socket is of no use any more."""


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
        self._header: Header | None = None  # of the frame whose body or payload is awaited
        self._control = bytearray(_CONTROL_NBYTES)  # headers and bodies, as they come
        self._start = self._end = 0  # what of it is not taken yet
        self._control_array = np.frombuffer(self._control, dtype=np.uint8)
        self._control_place = (self._control_array.ctypes.data, _CONTROL_NBYTES)
        self._large: bytearray | None = None  # a body that the control buffer cannot hold
        self._have = 0  # bytes of it
        self._payload: IoCursor | None = None  # ends with the control buffer

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
                cursor = frame.prepare() or self._send_small(frame)
                if cursor is None:
                    if frame.on_sent is not None:
                        frame.on_sent()
                    continue
                self._out = (frame, cursor)
            frame, cursor = self._out
            if cursor.send(self._fd) < 0:
                self._watch(READABLE | WRITABLE)
                return
            if cursor.done == cursor.total:
                self._out = None
                if frame.on_sent is not None:
                    frame.on_sent()

    def _send_small(self, frame: OutFrame) -> IoCursor | None:
        """Send a frame that is a head only; gives a cursor over what the socket did not take."""
        try:
            sent = self._sock.send(frame.head, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent == len(frame.head):
            return None
        rest = np.frombuffer(frame.head, dtype=np.uint8)[sent:]
        return IoCursor(_NO_IOVECS, rest, before=(rest.ctypes.data, rest.nbytes))

    def _receive(self) -> None:
        for _ in range(_STEPS_A_TURN):
            if self._closed:
                return
            if self._payload is not None:
                asked = self._payload.total - self._payload.done
                n = self._payload.receive(self._fd)
            else:
                target = self._room()
                asked = len(target)
                try:
                    n = self._sock.recv_into(target)
                except BlockingIOError:
                    n = -1
            if n == 0:
                raise TransportError("tcp: the peer closed the connection")
            if n > 0:
                self._take(n)
            if n < asked:  # the socket is drained: the loop says when there is more
                break
        if not self._closed:
            self._set_low_water()

    def _room(self) -> memoryview:
        """Where bytes go that are no payload: the rest of a large body, or the control buffer behind what it has."""
        if self._large is not None:
            return memoryview(self._large)[self._have :]
        if self._start:
            n = self._end - self._start
            self._control[:n] = self._control[self._start : self._end]
            self._start, self._end = 0, n
        return memoryview(self._control)[self._end :]

    def _set_low_water(self) -> None:
        """Be woken when a good part of the payload has come, not at every segment: fewer, larger calls."""
        rest = 1 if self._payload is None else self._payload.total - _CONTROL_NBYTES - self._payload.done
        wanted = max(1, min(_LOW_WATER_NBYTES, rest))
        if wanted != self._low_water:
            self._low_water = wanted
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)

    def _take(self, n: int) -> None:
        """Take note of n bytes that have come, and of every frame that they make whole."""
        if self._payload is not None:
            beyond = self._payload.done - (self._payload.total - _CONTROL_NBYTES)
            if beyond < 0:
                return
            # The iovecs end with the control buffer, so what follows the payload came in the same call.
            self._payload = None
            self._start, self._end = 0, beyond
            self._finish_payload()
        elif self._large is not None:
            self._have += n
            if self._have < len(self._large):
                return
            body, self._large = bytes(self._large), None
            self._begin(body)
        else:
            self._end += n
        while not self._closed and self._payload is None and self._large is None and self._next():
            pass

    def _next(self) -> bool:
        """Take a header or a body out of the control buffer; False where neither is whole."""
        n = self._end - self._start
        if self._header is None:
            if n < HEADER_NBYTES:
                return False
            self._header = Header.decode(self._control[self._start : self._start + HEADER_NBYTES])
            self._start += HEADER_NBYTES
            return True
        needed = self._header.body_nbytes
        if n >= needed:
            body = bytes(self._control[self._start : self._start + needed])
            self._start += needed
            self._begin(body)
            return True
        if needed > _CONTROL_NBYTES:
            self._large, self._have = bytearray(needed), n
            self._large[:n] = self._control[self._start : self._end]
            self._start = self._end = 0
        return False

    def _begin(self, body: bytes) -> None:
        """Hand a frame to the endpoint; make ready for its payload, whose first bytes may be here already."""
        header = self._header
        assert header is not None
        target = self._inbox.on_frame(self, header, body)
        if self._closed:
            return
        if not header.payload_nbytes:
            self._header = None
            return
        if target is None:
            raise ProtocolError(f"tcp: {header.frame.name} brings a payload that nobody asked for")
        iovecs, keepalive = target
        payload = IoCursor(iovecs, keepalive, after=self._control_place)
        n = min(self._end - self._start, header.payload_nbytes)
        payload.fill(self._control_array[self._start : self._start + n])
        self._start += n
        if n == header.payload_nbytes:
            self._finish_payload()
        else:
            self._start = self._end = 0
            self._payload = payload

    def _finish_payload(self) -> None:
        header, self._header = self._header, None
        assert header is not None
        self._inbox.on_payload(self, header)
