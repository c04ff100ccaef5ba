"""The serving half of an endpoint: a peer's READ and WRITE on memory that was exported to it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import ProtocolError
from kvrdma.layout import Int64s
from kvrdma.transports.base import Rights
from kvrdma.transports.regions import RangeStatus, RegionTable
from kvrdma.transports.tcp import wire
from kvrdma.transports.tcp.iovec import make_iovecs
from kvrdma.transports.tcp.stream import OutFrame, Stream
from kvrdma.transports.tcp.wire import Frame, Header

MAX_REPLIES_QUEUED: Final = wire.MAX_STREAMS * wire.MAX_DEPTH
_SCRATCH_NBYTES: Final = 64 << 10

_Key = tuple[Stream, int]


class Responder:
    """Checks each range against the region table, then lets the stream move the bytes. On the loop's thread."""

    def __init__(self, table: RegionTable) -> None:
        self._table = table
        self._reads: dict[_Key, tuple[OutFrame, int]] = {}
        self._writes: dict[_Key, NDArray[np.uint8]] = {}

    def read(self, stream: Stream, header: Header, body: bytes) -> None:
        """Answer with the bytes of every range that is allowed."""
        key = (stream, header.op)
        if key in self._reads or len(self._reads) >= MAX_REPLIES_QUEUED:
            raise ProtocolError(f"tcp: {MAX_REPLIES_QUEUED} requests wait for a reply, or one number twice")
        status, addresses, nbytes, memories = self._resolve(header, body, Rights.READ)
        allowed = status == RangeStatus.OK
        total = int(nbytes[allowed].sum())
        if total > wire.MAX_PAYLOAD:
            raise ProtocolError(f"tcp: a READ of {total} bytes; {wire.MAX_PAYLOAD} are allowed")
        frame = OutFrame(
            wire.encode_reply(Frame.READ_REPLY, header.op, header.priority, status, total),
            header.priority,
            make_iovecs(addresses[allowed], nbytes[allowed]) if total else np.zeros((0, 2), dtype=np.int64),
            memories,
        )
        frame.on_sent = lambda: self._forget_read(key)
        self._reads[key] = (frame, len(status))
        stream.send(frame)

    def write(self, stream: Stream, header: Header, body: bytes) -> tuple[Int64s, Any]:
        """Say where the payload goes; ranges that are not allowed go to a place that nobody reads."""
        key = (stream, header.op)
        if key in self._writes or len(self._writes) >= MAX_REPLIES_QUEUED:
            raise ProtocolError(f"tcp: {MAX_REPLIES_QUEUED} WRITE requests wait for a reply, or one number twice")
        status, addresses, nbytes, memories = self._resolve(header, body, Rights.WRITE)
        if (nbytes < 1).any() or int(nbytes.sum()) != header.payload_nbytes or not header.payload_nbytes:
            raise ProtocolError("tcp: a WRITE request whose payload is not as long as its ranges")
        refused = status != RangeStatus.OK
        self._writes[key] = status
        if not refused.any():
            return make_iovecs(addresses, nbytes), memories
        scratch = np.empty(min(_SCRATCH_NBYTES, int(nbytes[refused].max())), dtype=np.uint8)
        addresses[refused] = scratch.ctypes.data
        # What is refused goes into the same few bytes over and over: it must not cost memory.
        times = np.where(refused, -(-nbytes // len(scratch)), 1)
        pieces = np.repeat(np.where(refused, len(scratch), nbytes), times)
        last = np.cumsum(times) - 1
        pieces[last] = nbytes - pieces[last] * (times - 1)
        return make_iovecs(np.repeat(addresses, times), pieces), (scratch, memories)

    def written(self, stream: Stream, header: Header) -> None:
        """The payload is in place: say so."""
        key = (stream, header.op)
        head = wire.encode_reply(Frame.WRITE_REPLY, header.op, header.priority, self._writes[key], 0)
        stream.send(OutFrame(head, header.priority, on_sent=lambda: self._forget_write(key)))

    def cancel(self, stream: Stream, header: Header) -> None:
        """Send no payload for a READ that has not begun to be answered; the reply itself still goes."""
        waiting = self._reads.get((stream, header.op))
        if waiting is None:
            return
        frame, n_ranges = waiting
        if not frame.started:
            status = np.full(n_ranges, RangeStatus.CANCELLED, dtype=np.uint8)
            frame.head = wire.encode_reply(Frame.READ_REPLY, header.op, header.priority, status, 0)
            frame.payload = np.zeros((0, 2), dtype=np.int64)
            frame.keepalive = None

    def clear(self) -> None:
        """Let go of everything; the streams are closed."""
        self._reads.clear()
        self._writes.clear()

    def _forget_read(self, key: _Key) -> None:
        self._reads.pop(key, None)

    def _forget_write(self, key: _Key) -> None:
        self._writes.pop(key, None)

    def _resolve(self, header: Header, body: bytes, need: Rights) -> tuple[NDArray[np.uint8], Int64s, Int64s, Any]:
        tokens, rows, offsets, nbytes = wire.decode_request(header, body)
        if (nbytes > wire.MAX_PAYLOAD).any():
            raise ProtocolError(f"tcp: a range of more than {wire.MAX_PAYLOAD} bytes")
        status, addresses, memories = self._table.resolve(tokens, rows, offsets, nbytes, need)
        return status, addresses, nbytes, memories
