"""An endpoint of the tcp transport: several streams, operations in flight, and what the peer may do here."""

from __future__ import annotations

import heapq
import itertools
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, ProtocolError, RegionError, TransportError
from kvrdma.layout import Bitmap, Int64s
from kvrdma.memory import Lease
from kvrdma.transports.base import (
    Opcode,
    Priority,
    RemoteRegion,
    Transfer,
    TransferBatch,
    call_guarded,
    check_open,
)
from kvrdma.transports.endpoints import LoopEndpoint
from kvrdma.transports.loop import IoLoop, Timer
from kvrdma.transports.regions import RangeStatus, RegionTable, check_remote, explain
from kvrdma.transports.tcp import wire
from kvrdma.transports.tcp.iovec import make_iovecs
from kvrdma.transports.tcp.responder import Responder
from kvrdma.transports.tcp.stream import OutFrame, Stream
from kvrdma.transports.tcp.wire import Frame, Header

logger = logging.getLogger(__name__)

PIECE_NBYTES: Final = 8 << 20
MIN_PIECE_NBYTES: Final = 4 << 20
_PIECE_RANGES: Final = 4096
_OK: Final = int(RangeStatus.OK)  # members of an enum are slow to look up in CPython 3.11
_URGENT: Final = -1
_REPLY_TO: Final = {Opcode.READ: Frame.READ_REPLY, Opcode.WRITE: Frame.WRITE_REPLY}


@dataclass(slots=True, eq=False)
class _Operation:
    """A posted batch: its transfer, and how many of its pieces are not terminal."""

    transfer: Transfer
    ok: Bitmap
    pieces_left: int
    timers: tuple[Timer, ...] = ()
    error: KVRDMAError | None = None
    cancelled: bool = False


@dataclass(slots=True, eq=False)
class _Piece:
    """What goes as one request on one stream. All that can be is prepared on the thread that posts."""

    operation: _Operation
    opcode: Opcode
    priority: int
    number: int
    rows: Int64s
    addresses: Int64s
    nbytes: Int64s
    iovecs: Int64s
    frame: OutFrame
    keepalive: Any
    stream: Stream | None = None
    arriving: Bitmap | bool = False


def _name_regions(remote: Sequence[RemoteRegion], rows: Int64s) -> tuple[list[bytes], Int64s]:
    """The tokens that a piece needs, and which of them each of its ranges is in."""
    if len(remote) == 1:
        return [remote[0].token], rows
    used, names = np.unique(rows, return_inverse=True)
    return [remote[row].token for row in used], names.astype(np.int64)


class TcpEndpoint(LoopEndpoint[_Operation]):
    """Emulates one-sided READ and WRITE: the peer's I/O thread serves requests, its callers never do.

    All state below belongs to the loop's thread; other threads only post calls to it.
    """

    scheme: ClassVar[str] = "tcp"

    def __init__(
        self, socks: Sequence[socket.socket], loop: IoLoop, table: RegionTable, *, peer: str, ticket: bytes
    ) -> None:
        super().__init__(loop, peer=peer, ticket=ticket)
        self._table = table
        self._waiting: list[tuple[int, int, _Piece]] = []
        self._in_flight: dict[int, _Piece] = {}
        self._numbers = itertools.count(1)
        self._streams = [Stream(sock, loop, self) for sock in socks]
        self._responder = Responder(table)
        loop.call_soon(self._start)

    # -- the interface, on any thread

    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        """Queue a batch; returns at once."""
        check_open(self._closed, str(self))
        self._table.check(batch.local)
        check_remote(self.scheme, batch.remote)
        n = len(batch)
        operation = _Operation(Transfer(n, hold=hold), np.ones(n, dtype=np.bool_), 0)
        transfer = operation.transfer
        transfer._on_cancel = lambda: self._ask_to_cancel(operation)
        pieces = self._split(batch, operation, int(priority))
        operation.pieces_left = len(pieces)
        if not pieces:
            transfer.finish(operation.ok)
            return transfer
        try:
            self._loop.call_soon(lambda: self._submit(operation, pieces, timeout))
        except ClosedError as error:
            operation.ok[:] = False
            transfer.finish(operation.ok, error)
            raise
        return transfer

    def _split(self, batch: TransferBatch, operation: _Operation, priority: int) -> list[_Piece]:
        """Cut a batch into pieces that go as one request each, ranges that are too long included."""
        n = len(batch)
        if n == 0:
            return []
        bases = np.array([region.memory.address for region in batch.local], dtype=np.int64)
        rows = np.arange(n, dtype=np.int64)
        addresses = bases[batch.local_rows] + batch.local_offsets
        remote_rows, remote_offsets, nbytes = batch.remote_rows, batch.remote_offsets, batch.nbytes
        total = batch.total_nbytes
        piece_nbytes = min(PIECE_NBYTES, max(MIN_PIECE_NBYTES, -(-total // len(self._streams))))
        if int(nbytes.max()) > piece_nbytes:
            parts = -(-nbytes // piece_nbytes)
            within = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
            shift = within * piece_nbytes
            rows = np.repeat(rows, parts)
            nbytes = np.minimum(piece_nbytes, nbytes[rows] - shift)
            addresses = addresses[rows] + shift
            remote_rows, remote_offsets = remote_rows[rows], remote_offsets[rows] + shift
        cuts = [0, len(rows)]
        if total > piece_nbytes or len(rows) > _PIECE_RANGES:
            by_bytes = (np.cumsum(nbytes) - nbytes) // piece_nbytes
            by_ranges = np.arange(len(rows)) // _PIECE_RANGES
            cuts[1:1] = (np.flatnonzero(np.diff(by_bytes) | np.diff(by_ranges)) + 1).tolist()
        keepalive = (batch.local, operation.transfer)
        writes = batch.opcode is Opcode.WRITE
        pieces = []
        for first, last in itertools.pairwise(cuts):
            part = slice(first, last)
            number, sizes = next(self._numbers), nbytes[part]
            tokens, names = _name_regions(batch.remote, remote_rows[part])
            iovecs = make_iovecs(addresses[part], sizes)
            head = wire.encode_request(
                Frame.WRITE_REQUEST if writes else Frame.READ_REQUEST,
                number,
                priority,
                tokens,
                names,
                remote_offsets[part],
                sizes,
                int(sizes.sum()) if writes else 0,
            )
            frame = OutFrame(head, priority, iovecs, keepalive) if writes else OutFrame(head, _URGENT)
            frame.prepare()
            pieces.append(
                _Piece(
                    operation,
                    batch.opcode,
                    priority,
                    number,
                    rows[part],
                    addresses[part],
                    sizes,
                    iovecs,
                    frame,
                    keepalive,
                )
            )
        return pieces

    # -- on the loop's thread

    def _start(self) -> None:
        for stream in self._streams:
            if not self._closed:
                stream.start()

    def _submit(self, operation: _Operation, pieces: list[_Piece], timeout: float | None) -> None:
        if self._closed:
            operation.ok[:] = False
            operation.transfer.finish(operation.ok, ClosedError(f"{self}: closed"))
            return
        self._operations.add(operation)
        if timeout is not None:
            now = time.monotonic()
            operation.timers = (
                self._loop.call_at(now + timeout, lambda: self._time_out(operation, timeout)),
                self._loop.call_at(now + 2 * timeout, lambda: self._give_up(timeout)),
            )
        for piece in pieces:
            heapq.heappush(self._waiting, (piece.priority, piece.number, piece))
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and not self._closed:
            stream = min(self._streams, key=lambda s: s.in_flight)
            if stream.in_flight >= wire.MAX_DEPTH:
                return  # the rest waits here, where a LOAD can overtake it
            piece = heapq.heappop(self._waiting)[2]
            if piece.operation.cancelled:
                self._finish_piece(piece, False)
                continue
            piece.stream = stream
            stream.in_flight += 1
            self._in_flight[piece.number] = piece
            stream.send(piece.frame)

    def _finish_piece(self, piece: _Piece, ok: Bitmap | bool) -> None:
        operation = piece.operation
        if piece.stream is not None:
            piece.stream.in_flight -= 1
            piece.stream = None
        if isinstance(ok, bool):
            if not ok:
                operation.ok[piece.rows] = False
        elif not ok.all():
            operation.ok[piece.rows[~ok]] = False
        operation.pieces_left -= 1
        if operation.pieces_left == 0:
            self._operations.discard(operation)
            for timer in operation.timers:
                timer.cancel()
            operation.transfer.finish(operation.ok, operation.error)

    def _cancel(self, operation: _Operation, error: KVRDMAError | None = None) -> None:
        if operation.cancelled or operation not in self._operations:
            return
        operation.cancelled = True
        operation.error = operation.error or error or ClosedError("tcp: cancelled")
        for piece in [p for p in self._in_flight.values() if p.operation is operation]:
            if piece.stream is not None:  # a send that fails ends all of them
                piece.stream.send(OutFrame(wire.encode_note(Frame.CANCEL, piece.number), _URGENT))
        waiting = [entry for entry in self._waiting if entry[2].operation is operation]
        self._waiting = [entry for entry in self._waiting if entry[2].operation is not operation]
        heapq.heapify(self._waiting)
        for _, _, piece in waiting:
            self._finish_piece(piece, False)

    def _time_out(self, operation: _Operation, timeout: float) -> None:
        self._cancel(operation, DeadlineError(f"tcp: {self._peer} did not serve a batch within {timeout} s"))

    def _give_up(self, timeout: float) -> None:
        self.tear_down(DeadlineError(f"tcp: {self._peer} left a cancelled batch open for {timeout} s"))

    def _say_goodbye(self) -> None:
        if not self._closed:
            for stream in self._streams:
                stream.send(OutFrame(wire.encode_note(Frame.GOODBYE), _URGENT))

    def tear_down(self, error: KVRDMAError) -> None:
        """End at once, on the loop's thread. Idempotent."""
        first, callbacks = self._mark_closed(error)
        if not first:
            return
        for stream in self._streams:
            stream.close()
        self._responder.clear()
        unfinished = [*self._in_flight.values(), *(entry[2] for entry in self._waiting)]
        self._waiting.clear()
        self._in_flight.clear()
        for piece in unfinished:
            piece.operation.error = piece.operation.error or error
            self._finish_piece(piece, False)
        for callback in callbacks:
            call_guarded(callback)

    # -- Inbox: what the streams receive, on the loop's thread

    def on_broken(self, stream: Stream, error: TransportError) -> None:
        """Give up the endpoint: its other streams could not tell which bytes are missing."""
        if isinstance(error, ProtocolError):
            logger.warning("tcp endpoint to %s: %s", self._peer, error)
        self.tear_down(TransportError(f"{error} ({self._peer})"))

    def on_frame(self, stream: Stream, header: Header, body: bytes) -> tuple[Int64s, Any] | None:
        """Serve a request, or match a reply with its piece."""
        match header.frame:
            case Frame.READ_REQUEST:
                self._responder.read(stream, header, body)
            case Frame.WRITE_REQUEST:
                return self._responder.write(stream, header, body)
            case Frame.READ_REPLY | Frame.WRITE_REPLY:
                return self._on_reply(stream, header, body)
            case Frame.CANCEL:
                self._responder.cancel(stream, header)
            case Frame.GOODBYE:
                self.tear_down(ClosedError(f"tcp: {self._peer} closed the connection"))
        return None

    def on_payload(self, stream: Stream, header: Header) -> None:
        """The bytes of a READ reply or a WRITE request are where they belong."""
        if header.frame is Frame.WRITE_REQUEST:
            self._responder.written(stream, header)
            return
        piece = self._in_flight.pop(header.op)
        self._finish_piece(piece, piece.arriving)
        self._dispatch()

    def _on_reply(self, stream: Stream, header: Header, body: bytes) -> tuple[Int64s, Any] | None:
        piece = self._in_flight.get(header.op)
        if (
            piece is None
            or piece.stream is not stream
            or header.frame is not _REPLY_TO[piece.opcode]
            or header.n_ranges not in {0, len(piece.rows)}
        ):
            raise ProtocolError(f"tcp: {header.frame.name} {header.op} answers no request of this stream")
        iovecs, nbytes = piece.iovecs, piece.nbytes
        ok: Bitmap | bool = True  # without a body every range is OK
        if body:
            status = np.frombuffer(body, dtype=np.uint8)
            ok = arrived = status == _OK
            if piece.operation.error is None and not arrived.all():
                piece.operation.error = RegionError(f"tcp: {explain(int(status[~arrived][0]))}")
            nbytes = nbytes[arrived]
            iovecs = make_iovecs(piece.addresses[arrived], nbytes)
        if header.frame is Frame.READ_REPLY:
            if header.payload_nbytes != int(nbytes.sum()):
                raise ProtocolError("tcp: a READ reply whose size is not that of its ranges")
            if header.payload_nbytes:
                piece.arriving = ok
                return iovecs, piece.keepalive
        del self._in_flight[header.op]
        self._finish_piece(piece, ok)
        self._dispatch()
        return None
