"""An endpoint of the shm transport: what it copies, and what it answers a peer that wants to."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, ProtocolError, RegionError, TransportError
from kvrdma.layout import Bitmap, Int64s
from kvrdma.memory import Lease
from kvrdma.transports.base import (
    Opcode,
    Priority,
    Rights,
    Transfer,
    TransferBatch,
    call_guarded,
    check_open,
)
from kvrdma.transports.endpoints import EndpointBase, wait_for
from kvrdma.transports.loop import READABLE, WRITABLE, IoLoop, Timer
from kvrdma.transports.regions import RangeStatus, RegionTable, check_ranges, check_remote, explain
from kvrdma.transports.shm import wire
from kvrdma.transports.shm.copying import CopyThreads, Piece
from kvrdma.transports.shm.keys import PAGE_NBYTES, LiveKeys, PeerKeys
from kvrdma.transports.shm.mapping import Mapping, map_shared, open_to_share

PIECE_NBYTES: Final = 4 << 20  # copied in one go: an abort waits for about so much
_PIECE_RANGES: Final = 4096
_MAX_UNSENT: Final = 1024
_PACKETS_A_TURN: Final = 64
_OK: Final = int(RangeStatus.OK)


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """A peer's region as we know it by its key."""

    mapping: Mapping
    nbytes: int
    rights: Rights
    slot: int
    number: int


@dataclass(slots=True, eq=False)
class _Operation:
    """A posted batch. Its columns have a row for each range to copy, once every region that it names is known."""

    batch: TransferBatch
    transfer: Transfer
    priority: int
    deadline: float | None
    ok: Bitmap
    regions: dict[bytes, _Region | RangeStatus] = field(default_factory=dict)
    missing: set[bytes] = field(default_factory=set)
    ranges: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # which of the batch's it is part of
    rows: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # of its remote region
    slots: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # of each remote region's key
    numbers: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    pieces_left: int = 0
    cancelled: bool = False
    error: KVRDMAError | None = None
    timers: tuple[Timer, ...] = ()
    finisher: int = 0  # the thread that makes it terminal


class ShmEndpoint(EndpointBase):
    """Copies what is posted here on the transport's threads, from and to memory that the peer gave for its keys."""

    scheme: ClassVar[str] = "shm"

    def __init__(
        self,
        sock: socket.socket,
        loop: IoLoop,
        threads: CopyThreads,
        table: RegionTable,
        keys: LiveKeys,
        *,
        peer: str,
        ticket: bytes,
    ) -> None:
        super().__init__(peer=peer, ticket=ticket)
        self._sock = sock
        self._loop = loop
        self._threads = threads
        self._table = table
        self._keys = keys
        self._operations: dict[_Operation, None] = {}
        self._regions: dict[bytes, _Region] = {}
        self._peer_keys: PeerKeys | None = None
        self._asked: dict[bytes, list[_Operation]] = {}
        self._unsent: deque[wire.Ask | wire.Answer] = deque()
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
        deadline = None if timeout is None else time.monotonic() + timeout
        transfer = Transfer(len(batch), hold=hold)
        operation = _Operation(batch, transfer, int(priority), deadline, np.ones(len(batch), dtype=np.bool_))
        transfer._on_cancel = lambda: self._cancel(operation, ClosedError("shm: cancelled"))
        try:
            tokens = {remote.token for remote in batch.remote} if len(batch) else set()
            with self._guard:
                operation.regions |= {token: self._regions[token] for token in tokens if token in self._regions}
            operation.missing = tokens - operation.regions.keys()
            if operation.missing:
                with self._guard:
                    check_open(self._closed, str(self))
                    self._loop.call_soon(lambda: self._ask(operation, timeout))
                    self._operations[operation] = None
            else:
                self._launch(operation)
        except BaseException:
            operation.ok[:] = False
            self._finish(operation)
            raise
        return transfer

    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end, then close."""
        if not self._closed and not self._loop.inside() and not self._threads.inside():
            deadline = time.monotonic() + timeout
            with self._guard:
                pending = [operation.transfer for operation in self._operations]
            wait_for(pending, deadline)
        self._end(ClosedError(f"{self}: closed"))

    def abort(self) -> None:
        """End at once."""
        self._end(ClosedError(f"{self}: aborted"))

    # -- a batch's way

    def _launch(self, operation: _Operation) -> None:
        """Every region is known: queue what there is to copy. Raises `ClosedError`."""
        pieces = self._plan(operation)
        with self._guard:  # so that an end finds it queued, or not at all
            check_open(self._closed, str(self))
            if pieces:
                operation.pieces_left = len(pieces)
                self._threads.submit(operation.priority, pieces)
            self._operations[operation] = None
        if not pieces:
            self._finish(operation)

    def _plan(self, operation: _Operation) -> list[Piece]:
        batch = operation.batch
        reads = batch.opcode is Opcode.READ
        need = Rights.READ if reads else Rights.WRITE
        n = len(batch.remote)
        base, size = np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=np.int64)
        slots, numbers = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        state = np.full(n + 1, RangeStatus.BAD_KEY, dtype=np.uint8)
        for row, remote in enumerate(batch.remote):
            region = operation.regions.get(remote.token, RangeStatus.BAD_KEY)
            if isinstance(region, RangeStatus):
                state[row] = region
                continue
            base[row], size[row] = region.mapping.address, region.nbytes
            slots[row], numbers[row] = region.slot, region.number
            state[row] = RangeStatus.OK if need in region.rights else RangeStatus.NO_RIGHT
        status, theirs = check_ranges(base, size, state, batch.remote_rows, batch.remote_offsets, batch.nbytes)
        ranges = np.arange(len(batch))
        if status.any():
            operation.ok[:] = status == _OK
            ranges = np.flatnonzero(operation.ok)
            operation.error = RegionError(f"shm: {explain(int(status[status != _OK][0]))}")
        ours = np.array([region.memory.address for region in batch.local], dtype=np.int64)
        ours = (ours[batch.local_rows] + batch.local_offsets)[ranges] if len(ranges) else ranges
        operation.slots, operation.numbers = slots, numbers
        return self._cut(operation, ranges, *((ours, theirs[ranges]) if reads else (theirs[ranges], ours)))

    def _cut(self, operation: _Operation, ranges: Int64s, targets: Int64s, sources: Int64s) -> list[Piece]:
        """Cut what there is to copy into pieces of about `PIECE_NBYTES`, and longer ranges into several."""
        nbytes = operation.batch.nbytes[ranges]
        if (nbytes > PIECE_NBYTES).any():
            times = -(-nbytes // PIECE_NBYTES)
            within = (np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)) * PIECE_NBYTES
            ranges, targets, sources = (
                np.repeat(ranges, times),
                np.repeat(targets, times) + within,
                np.repeat(sources, times) + within,
            )
            nbytes = np.minimum(np.repeat(nbytes, times) - within, PIECE_NBYTES)
        operation.ranges, operation.rows = ranges, operation.batch.remote_rows[ranges]
        if not len(ranges):
            return []
        cuts = [0, len(ranges)]
        if len(ranges) > 1:
            by_bytes = (np.cumsum(nbytes) - nbytes) // PIECE_NBYTES
            by_ranges = np.arange(len(ranges)) // _PIECE_RANGES
            cuts[1:1] = (np.flatnonzero(np.diff(by_bytes) | np.diff(by_ranges)) + 1).tolist()
        columns = targets.tolist(), sources.tolist(), nbytes.tolist()
        return [
            Piece(self, operation, first, last, *(column[first:last] for column in columns))
            for first, last in itertools.pairwise(cuts)
        ]

    def may_copy(self, piece: Piece) -> bool:
        """Leave out what must not be copied; on a copying thread."""
        operation: _Operation = piece.operation
        if operation.deadline is not None and time.monotonic() > operation.deadline:
            self._cancel(operation, DeadlineError("shm: its turn did not come before its deadline"))
        if operation.cancelled or self._closed:
            return False
        dead = self._dead(piece)
        if dead is not None:
            for column in (piece.targets, piece.sources, piece.nbytes):
                column[:] = itertools.compress(column, ~dead)
        return True

    def copied(self, piece: Piece, whole: bool) -> None:
        """Take note of what has arrived; on a copying thread, or on that which ends the endpoint."""
        operation: _Operation = piece.operation
        dead = self._dead(piece) if whole else None
        with self._guard:
            if not whole:
                operation.ok[operation.ranges[piece.first : piece.last]] = False
                operation.error = operation.error or self._error
            elif dead is not None:
                operation.ok[operation.ranges[piece.first : piece.last][dead]] = False
                operation.error = operation.error or RegionError(f"shm: {explain(RangeStatus.BAD_KEY)}")
            operation.pieces_left -= 1
            last = operation.pieces_left == 0
        if last:
            self._finish(operation)

    def _dead(self, piece: Piece) -> NDArray[np.bool_] | None:
        """Which ranges of a piece have keys that were revoked; None where none have."""
        operation: _Operation = piece.operation
        assert self._peer_keys is not None
        alive = self._peer_keys.alive(operation.slots, operation.numbers)
        if alive.all():
            return None
        with self._guard:
            for row in np.flatnonzero(~alive).tolist():
                self._regions.pop(operation.batch.remote[row].token, None)
        dead: NDArray[np.bool_] = ~alive[operation.rows[piece.first : piece.last]]
        return dead if dead.any() else None

    def _cancel(self, operation: _Operation, error: KVRDMAError) -> None:
        """Copy no more of it. One whose regions are asked for ends with the answer, or with the endpoint."""
        with self._guard:
            if not operation.cancelled and not operation.finisher:
                operation.cancelled = True
                operation.error = operation.error or error

    def _finish(self, operation: _Operation) -> None:
        """Make it terminal; whoever comes second does nothing."""
        with self._guard:
            if operation.finisher:
                return
            operation.finisher = threading.get_ident()
        try:
            operation.transfer.finish(operation.ok, operation.error)
        finally:
            with self._guard:
                self._operations.pop(operation, None)

    def _end(self, error: KVRDMAError) -> None:
        first, callbacks = self._mark_closed(error)
        if first:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            try:
                self._loop.call_soon(self._shut)
            except ClosedError:
                self._sock.close()
        for piece in self._threads.withdraw(self):
            self.copied(piece, False)
        with self._guard:
            waiting = [operation for operation in self._operations if operation.missing]
        for operation in waiting:
            operation.ok[:] = False
            operation.error = operation.error or self._error
            self._finish(operation)
        with self._guard:
            ending = [operation for operation in self._operations if operation.finisher != threading.get_ident()]
        for operation in ending:
            operation.transfer.result()  # another thread is just about to finish it
        for callback in callbacks:
            call_guarded(callback)

    # -- packets, on the loop's thread

    def _start(self) -> None:
        if not self._closed:
            self._loop.watch(self._sock.fileno(), READABLE, self._on_ready)

    def _shut(self) -> None:
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        self._unsent.clear()
        self._asked.clear()

    def _ask(self, operation: _Operation, timeout: float | None) -> None:
        """Ask for the regions that a batch waits for."""
        if self._closed:
            return  # whoever ended it has seen the operation
        if timeout is not None:
            now = time.monotonic()
            late = DeadlineError(f"shm: {self._peer} did not say within {timeout} s which memory a key is for")
            operation.timers = (
                self._loop.call_at(now + timeout, lambda: self._cancel(operation, late)),
                self._loop.call_at(now + 2 * timeout, lambda: self._give_up(operation, late)),
            )
        for token in operation.missing:
            asked = self._asked.setdefault(token, [])
            asked.append(operation)
            if len(asked) == 1:
                self._send(wire.Ask(token))

    def _give_up(self, operation: _Operation, error: KVRDMAError) -> None:
        if not operation.transfer.done():
            self._end(error)

    def _send(self, packet: wire.Ask | wire.Answer) -> None:
        if len(self._unsent) >= _MAX_UNSENT:
            self._end(ProtocolError(f"shm: {self._peer} asks and does not read the answers"))
            return
        self._unsent.append(packet)
        if len(self._unsent) == 1:
            self._guarded(self._pump)

    def _pump(self) -> None:
        while self._unsent:
            packet = self._unsent[0]
            fds: list[int] = []
            if isinstance(packet, wire.Answer) and packet.status is RangeStatus.OK:
                export = self._table.find(packet.token)
                if export is None:  # revoked since
                    packet = wire.Answer(packet.token, RangeStatus.BAD_KEY)
                else:
                    fds = [open_to_share(export.region.memory, export.rights), self._keys.fd]
            try:
                socket.send_fds(self._sock, [packet.encode()], fds)
            except BlockingIOError:
                self._loop.watch(self._sock.fileno(), READABLE | WRITABLE, self._on_ready)
                return
            finally:
                if fds:
                    os.close(fds[0])
            self._unsent.popleft()
        self._loop.watch(self._sock.fileno(), READABLE, self._on_ready)

    def _on_ready(self, events: int) -> None:
        if events & WRITABLE:
            self._guarded(self._pump)
        if events & READABLE:
            self._guarded(self._receive)

    def _guarded(self, step: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            step()
        except OSError as error:
            self._end(TransportError(f"shm: {self._peer}: {error.strerror or error}"))
        except TransportError as error:
            self._end(TransportError(f"{error} ({self._peer})"))

    def _receive(self) -> None:
        for _ in range(_PACKETS_A_TURN):
            if self._closed:
                return
            try:
                packet, fds, flags, _ = socket.recv_fds(
                    self._sock, wire.MAX_PACKET, wire.MAX_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            try:
                if not packet:
                    raise TransportError("shm: the peer closed the connection")
                if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                    raise TransportError("shm: a packet that is too long, or descriptors that could not be taken")
                message = wire.decode(packet)
                if isinstance(message, wire.Ask):
                    self._on_ask(message)
                else:
                    self._on_answer(message, fds)
            finally:
                for fd in fds:
                    os.close(fd)

    def _on_ask(self, ask: wire.Ask) -> None:
        export = self._table.find(ask.token)
        slot = None if export is None else self._keys.slot(export.number)
        if export is None or slot is None:
            self._send(wire.Answer(ask.token, RangeStatus.BAD_KEY))
        else:
            self._send(wire.Answer(ask.token, RangeStatus.OK, export.rights, slot, export.number, export.region.nbytes))

    def _on_answer(self, answer: wire.Answer, fds: list[int]) -> None:
        if answer.token not in self._asked:
            raise ProtocolError("shm: an answer that nobody asked for")
        found: _Region | RangeStatus = answer.status
        if answer.status is RangeStatus.OK:
            if len(fds) != wire.MAX_FDS:
                raise ProtocolError(f"shm: memory with {len(fds)} descriptors, not {wire.MAX_FDS}")
            if answer.slot >= PAGE_NBYTES // 8:
                raise ProtocolError(f"shm: a key of slot {answer.slot}")
            if self._peer_keys is None:
                self._peer_keys = PeerKeys(map_shared(fds[1], PAGE_NBYTES))
            mapping = map_shared(fds[0], answer.nbytes, write=Rights.WRITE in answer.rights)
            found = _Region(mapping, answer.nbytes, answer.rights, answer.slot, answer.number)
            with self._guard:
                self._regions[answer.token] = found
        for operation in self._asked.pop(answer.token):
            operation.regions[answer.token] = found
            left = operation.missing - operation.regions.keys()
            if left:
                continue
            for timer in operation.timers:
                timer.cancel()
            with self._guard:
                if operation.finisher:
                    continue
                operation.missing = set()
            try:
                self._launch(operation)
            except ClosedError as error:
                operation.ok[:] = False
                operation.error = operation.error or error
                self._finish(operation)
