"""An endpoint of the ucx transport: posted batches as one-sided operations of its own worker."""

from __future__ import annotations

import ctypes
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, ProtocolError, RegionError, TransportError
from kvrdma.layout import Bitmap
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
from kvrdma.transports.endpoints import LoopEndpoint
from kvrdma.transports.loop import READABLE, Timer
from kvrdma.transports.regions import RangeStatus, check_remote, explain
from kvrdma.transports.ucx import declarations as c
from kvrdma.transports.ucx.wire import PROBE_NBYTES, Frame, Grant, Hello, Kind
from kvrdma.transports.ucx.worker import Worker

if TYPE_CHECKING:
    from kvrdma.transports.ucx.core import Core

logger = logging.getLogger(__name__)

DEPTH: Final = 64
RECALL_TIMEOUT_S: Final = 1.0
_MAX_KEYS: Final = 1 << 14
_NEED: Final = {Opcode.READ: Rights.READ, Opcode.WRITE: Rights.WRITE}


@dataclass(frozen=True, slots=True)
class Landing:
    """A place for one probe: its address, and UCX's handle of the memory around it."""

    address: int
    memh: int

    def read(self) -> bytes:
        """What is there."""
        return ctypes.string_at(self.address, PROBE_NBYTES)


class _KeyState(Enum):
    ASKED = auto()
    GRANTED = auto()
    REFUSED = auto()


@dataclass(slots=True, eq=False)
class _Key:
    """What we know of a peer's token."""

    token: bytes
    state: _KeyState = _KeyState.ASKED
    grant: Grant | None = None
    rkey: int = 0
    n_under_way: int = 0
    waiting: list[_Operation] = field(default_factory=list)


_Piece = tuple[int, int, int, int, int, _Key]
"""Row, local address, size, remote address, local registration, and the peer's key."""


@dataclass(slots=True, eq=False)
class _Operation:
    """A posted batch. It ends with its last piece, and a WRITE with the flush behind it."""

    batch: TransferBatch
    transfer: Transfer
    priority: int
    number: int
    ok: Bitmap
    n_keys_asked: int = 0
    pieces: Iterator[_Piece] = field(default_factory=lambda: iter(()))
    issued_all: bool = False
    n_under_way: int = 0
    flushing: bool = False
    unflushed: bool = False
    timers: tuple[Timer, ...] = ()
    error: KVRDMAError | None = None
    ended: bool = False


class UcxEndpoint(LoopEndpoint[_Operation]):
    """One worker of UCX, one control socket. All state belongs to the loop's thread; others post calls to it.

    A peer's token is asked after over the control socket when it is first used: the answer says where its memory
    lies and holds UCX's key. So what a correct peer posts is checked before it goes out, for a remote access
    error would end the connection, and a recalled key is used no more.
    """

    scheme: ClassVar[str] = "ucx"

    def __init__(self, core: Core, worker: Worker, *, peer: str, ticket: bytes) -> None:
        super().__init__(core.loop, peer=peer, ticket=ticket)
        self._core = core
        self._worker = worker
        self._numbers = itertools.count(1)
        self._waiting: list[tuple[int, int, _Operation]] = []
        self._n_bytes = 0  # of what is under way
        self._keys: dict[bytes, _Key] = {}
        self._asked: dict[int, _Key] = {}
        self._recalled: set[_Key] = set()  # that requests under way still use
        self._told: dict[int, list[threading.Event]] = {}  # exports that the peer knows of, and who waits for their end

    @property
    def why(self) -> KVRDMAError:
        """What ended it."""
        return self._error

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
        self._core.table.check(batch.local)
        check_remote(self.scheme, batch.remote)
        n = len(batch)
        transfer = Transfer(n, hold=hold)
        operation = _Operation(batch, transfer, int(priority), next(self._numbers), np.ones(n, dtype=np.bool_))
        transfer._on_cancel = lambda: self._ask_to_cancel(operation)
        if n == 0:
            transfer.finish(operation.ok)
            return transfer
        try:
            self._loop.call_soon(lambda: self._submit(operation, timeout))
        except ClosedError as error:
            transfer.finish(None, error)
            raise
        return transfer

    def _say_goodbye(self) -> None:
        self._send(Frame(Kind.GOODBYE))

    # -- posting, on the loop's thread

    def _submit(self, operation: _Operation, timeout: float | None) -> None:
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
        for row in np.unique(operation.batch.remote_rows).tolist():
            key = self._key(operation.batch.remote[row].token)
            if key.state is _KeyState.ASKED:
                key.waiting.append(operation)
                operation.n_keys_asked += 1
        if not self._closed and operation.n_keys_asked == 0:
            self._prepare(operation)
            self.pump()

    def _key(self, token: bytes) -> _Key:
        key = self._keys.get(token)
        if key is None:
            if len(self._keys) >= _MAX_KEYS:
                for old in [known for known, key in self._keys.items() if key.state is _KeyState.REFUSED]:
                    del self._keys[old]
            key = self._keys[token] = _Key(token)
            number = next(self._numbers)
            self._asked[number] = key
            self._send(Frame(Kind.ASK, number, token))
        return key

    def _prepare(self, operation: _Operation) -> None:
        """Check a batch against what the peer granted, and cut it into pieces."""
        batch = operation.batch
        need = _NEED[batch.opcode]
        keys = [self._keys.get(remote.token) for remote in batch.remote]
        granted = [None if key is None or key.state is not _KeyState.GRANTED else key.grant for key in keys]
        state = [
            RangeStatus.BAD_KEY if g is None else RangeStatus.OK if need in g.rights else RangeStatus.NO_RIGHT
            for g in granted
        ]
        limits = np.array([0 if g is None else g.nbytes for g in granted], dtype=np.int64)
        bases = np.array([0 if g is None else g.address for g in granted], dtype=np.int64)
        status = np.array(state, dtype=np.uint8)[batch.remote_rows]
        limit = limits[batch.remote_rows]
        outside = (batch.nbytes > limit) | (batch.remote_offsets > limit - batch.nbytes)
        status[outside & (status == RangeStatus.OK)] = RangeStatus.BAD_BOUNDS
        good = status == RangeStatus.OK
        operation.ok &= good
        if not good.all():
            operation.error = RegionError(f"ucx: {explain(int(status[~good][0]))}")
        rows = np.flatnonzero(good)
        nbytes = batch.nbytes[rows]
        here = np.array([region.memory.address for region in batch.local], dtype=np.int64)
        addresses = here[batch.local_rows[rows]] + batch.local_offsets[rows]
        remotes = bases[batch.remote_rows[rows]] + batch.remote_offsets[rows]
        longest = self._core.lanes.piece_nbytes
        if rows.size and int(nbytes.max()) > longest:
            parts = -(-nbytes // longest)
            shift = (np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)) * longest
            rows, nbytes = np.repeat(rows, parts), np.minimum(longest, np.repeat(nbytes, parts) - shift)
            addresses, remotes = np.repeat(addresses, parts) + shift, np.repeat(remotes, parts) + shift
        registrations = [self._core.registration(region).memh for region in batch.local]
        operation.pieces = zip(
            rows.tolist(),
            addresses.tolist(),
            nbytes.tolist(),
            remotes.tolist(),
            [registrations[row] for row in batch.local_rows[rows].tolist()],
            [keys[row] for row in batch.remote_rows[rows].tolist()],
            strict=True,
        )
        heapq.heappush(self._waiting, (operation.priority, operation.number, operation))

    def pump(self) -> None:
        """Start what the window has room for, the most urgent first."""
        worker, window_nbytes = self._worker, self._core.lanes.window_nbytes
        while self._waiting and not self._closed:
            if worker.n_under_way >= DEPTH or self._n_bytes >= window_nbytes:
                break
            operation = self._waiting[0][2]
            piece = next(operation.pieces, None)
            if piece is None:
                heapq.heappop(self._waiting)
                operation.issued_all = True
                self._advance(operation)
                continue
            row, address, nbytes, remote, memh, key = piece
            if key.state is not _KeyState.GRANTED:  # recalled since
                operation.ok[row] = False
                operation.error = operation.error or RegionError(f"ucx: {explain(RangeStatus.BAD_KEY)}")
                continue
            operation.n_under_way += 1
            key.n_under_way += 1
            self._n_bytes += nbytes
            start = worker.get
            if operation.batch.opcode is Opcode.WRITE:
                start = worker.put
                operation.unflushed = True
            start(address, nbytes, remote, key.rkey, memh, partial(self._on_piece, operation, key, row, nbytes))
        if not self._closed:
            self._core.wake(self)

    def _on_piece(self, operation: _Operation, key: _Key, row: int, nbytes: int, status: int) -> None:
        operation.n_under_way -= 1
        self._n_bytes -= nbytes
        key.n_under_way -= 1
        if status != c.OK:
            operation.ok[row] = False
            operation.error = operation.error or self._failure(status)
        if key.n_under_way == 0 and key.state is _KeyState.REFUSED:
            self._let_go(key)
        self._advance(operation)

    def _on_flushed(self, operation: _Operation, status: int) -> None:
        operation.flushing = False
        if status != c.OK:
            operation.ok[:] = False
            operation.error = operation.error or self._failure(status)
        self._advance(operation)

    def _advance(self, operation: _Operation) -> None:
        """End an operation of which nothing is left."""
        if operation.ended or not operation.issued_all or operation.n_under_way or operation.flushing:
            return
        if operation.unflushed and not self._closed:
            operation.unflushed, operation.flushing = False, True
            self._worker.flush(partial(self._on_flushed, operation))
            return
        if operation.unflushed:  # its bytes may be there, or not
            operation.ok[:] = False
        operation.ended = True
        self._operations.discard(operation)
        for timer in operation.timers:
            timer.cancel()
        operation.transfer.finish(operation.ok, operation.error)

    def _failure(self, status: int) -> KVRDMAError:
        return TransportError(f"ucx: {self._peer}: {self._core.context.library.explain(status)}")

    def _cancel(self, operation: _Operation, error: KVRDMAError | None = None) -> None:
        """Start no more of it. What is under way ends by itself, or with the endpoint."""
        if operation.ended or operation.issued_all:
            return
        operation.error = operation.error or error or ClosedError("ucx: cancelled")
        if operation.n_keys_asked:  # nothing of it has begun
            operation.ok[:] = False
        for row, *_ in operation.pieces:
            operation.ok[row] = False
        self._waiting = [entry for entry in self._waiting if entry[2] is not operation]
        heapq.heapify(self._waiting)
        operation.issued_all = True
        self._advance(operation)

    def _time_out(self, operation: _Operation, timeout: float) -> None:
        error = DeadlineError(f"ucx: {self._peer} did not serve a batch within {timeout} s")
        operation.error = operation.error or error
        self._cancel(operation, error)

    def _give_up(self, timeout: float) -> None:
        self.tear_down(DeadlineError(f"ucx: {self._peer} left a cancelled batch open for {timeout} s"))

    # -- turns of the loop

    def turn(self) -> bool:
        """Let UCX work. False where nothing is left to do until `event_fd` says so."""
        busy = self._worker.progress()
        if self._closed:
            return False
        if self._worker.failure is not None:
            self.tear_down(self._failure(self._worker.failure))
            return False
        if busy:
            self.pump()
            return True
        return not self._worker.arm()

    def watch(self) -> None:
        """Be called when UCX has something to do."""
        self._loop.watch(self._worker.event_fd, READABLE, lambda _: self._core.wake(self))

    def probe(self, theirs: Hello, landing: Landing, conclude: Callable[[KVRDMAError | None], None]) -> None:
        """Read the peer's probe, the first thing that goes over the lanes; raises `TransportError`."""
        rkey = self._worker.unpack(theirs.probe_key)

        def on_end(status: int) -> None:
            self._worker.forget_key(rkey)
            if status == c.OK:
                self._worker.established = True
                self._send(Frame(Kind.READY))
            conclude(None if status == c.OK else self._failure(status))

        self._worker.get(landing.address, PROBE_NBYTES, theirs.probe_address, rkey, landing.memh, on_end)

    def tear_down(self, error: KVRDMAError) -> None:
        """End everything, by force. On the loop's thread."""
        first, callbacks = self._mark_closed(error)
        if not first:
            return
        for operation in self._operations:
            operation.error = operation.error or error
        self._core.drop(self)
        self._loop.forget(self._worker.event_fd)
        self._worker.disconnect(drain_s=self._core.lanes.drain_s)
        for key in [*self._keys.values(), *self._recalled]:
            self._let_go(key)
        self._keys.clear()
        self._worker.destroy()
        self._waiting.clear()
        for operation in list(self._operations):  # what had not begun
            for row, *_ in operation.pieces:
                operation.ok[row] = False
            if operation.n_keys_asked:
                operation.ok[:] = False
            operation.issued_all = True
            self._advance(operation)
        for waiters in self._told.values():
            for waiter in waiters:
                waiter.set()
        self._told.clear()
        for callback in callbacks:
            call_guarded(callback)

    def _let_go(self, key: _Key) -> None:
        """Give back a key that no request uses, and tell its owner so where it asked for that."""
        if key.rkey:
            self._worker.forget_key(key.rkey)
            key.rkey = 0
            self._recalled.discard(key)
            if key.grant is not None and key.state is _KeyState.REFUSED:
                self._send(Frame(Kind.RECALLED, key.grant.export))

    # -- the control socket, on the loop's thread

    def on_frame(self, frame: Frame) -> None:
        """What the peer says."""
        match frame.kind:
            case Kind.ASK:
                self._answer(frame)
            case Kind.GRANT:
                self._on_grant(frame)
            case Kind.RECALL:
                self._on_recall(frame.number)
            case Kind.RECALLED:
                for waiter in self._told.pop(frame.number, []):
                    waiter.set()
            case Kind.READY:
                self._worker.established = True
            case Kind.GOODBYE:
                self.tear_down(ClosedError(f"ucx: {self._peer} closed the connection"))
            case _:
                raise ProtocolError(f"ucx: {frame.kind.name} in the middle of a connection")

    def on_broken(self, error: TransportError) -> None:
        """The socket ended: the first sign of a dead peer."""
        if isinstance(error, ProtocolError):
            logger.warning("ucx endpoint to %s: %s", self._peer, error)
        self.tear_down(TransportError(f"{error} ({self._peer})"))

    def recall(self, number: int) -> threading.Event | None:
        """Ask for an export back; the event is set when the peer uses it no more, or cannot. None: it never had it."""
        if number not in self._told or self._closed:
            return None
        over = threading.Event()
        self._told[number].append(over)
        self._send(Frame(Kind.RECALL, number))
        self._loop.call_at(time.monotonic() + RECALL_TIMEOUT_S, lambda: self._end_recall(over))
        return over

    def _end_recall(self, over: threading.Event) -> None:
        if not over.is_set():
            self.tear_down(DeadlineError(f"ucx: {self._peer} did not let go of a revoked key"))

    def _answer(self, frame: Frame) -> None:
        export = self._core.table.find(frame.body)
        body = b""
        if export is not None:
            self._told.setdefault(export.number, [])
            memory = export.region.memory
            packed = self._core.registration(export.region).packed
            body = Grant(export.number, memory.address, memory.nbytes, export.rights, packed).encode()
        self._send(Frame(Kind.GRANT, frame.number, body))

    def _on_grant(self, frame: Frame) -> None:
        key = self._asked.pop(frame.number, None)
        if key is None:
            raise ProtocolError(f"ucx: an answer to question {frame.number}, which was not asked")
        key.state = _KeyState.REFUSED
        if frame.body:
            key.grant = Grant.decode(frame.body)
            key.rkey = self._worker.unpack(key.grant.packed)
            key.state = _KeyState.GRANTED
        waiting, key.waiting = key.waiting, []
        for operation in waiting:
            operation.n_keys_asked -= 1
            if operation.n_keys_asked == 0 and not operation.ended:
                self._prepare(operation)
        self.pump()

    def _on_recall(self, export: int) -> None:
        for token, key in list(self._keys.items()):
            if key.grant is not None and key.grant.export == export:
                key.state = _KeyState.REFUSED
                del self._keys[token]
                self._recalled.add(key)
                if key.n_under_way == 0:
                    self._let_go(key)
                return
        self._send(Frame(Kind.RECALLED, export))

    def _send(self, frame: Frame) -> None:
        if not self._closed:
            self._core.send(self, frame)
