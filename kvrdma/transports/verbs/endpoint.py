"""An endpoint of the verbs transport: a lane for the bytes, a socket for the control of it."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import socket
import threading
import time
from enum import Enum, auto
from typing import ClassVar, Final

import numpy as np

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, ProtocolError, RegionError, TransportError
from kvrdma.memory import Lease
from kvrdma.transports.base import (
    Opcode,
    Priority,
    Transfer,
    TransferBatch,
    call_guarded,
    check_open,
)
from kvrdma.transports.endpoints import LoopEndpoint
from kvrdma.transports.loop import READABLE, WRITABLE, IoLoop
from kvrdma.transports.regions import check_remote
from kvrdma.transports.verbs import exchange
from kvrdma.transports.verbs.binding import Status
from kvrdma.transports.verbs.exchange import Frame, Grant
from kvrdma.transports.verbs.lane import Chain, Failure, Lane
from kvrdma.transports.verbs.operation import Operation
from kvrdma.transports.verbs.rail import Rail
from kvrdma.transports.verbs.registrations import Registrations

logger = logging.getLogger(__name__)

_READ_NBYTES: Final = 1 << 16
_MAX_UNSENT: Final = 1 << 20  # of a peer that asks and does not listen
_REGION_FAULTS: Final = {Status.LOC_PROT_ERR, Status.REM_INV_REQ_ERR, Status.REM_ACCESS_ERR}


class _State(Enum):
    CONNECTING = auto()  # ours is told, the peer's is not known
    CONNECTED = auto()  # we may be written to; the peer has not said the same
    OPEN = auto()
    CLOSED = auto()


_NEXT: Final = {Frame.PAIR: (_State.CONNECTING, _State.CONNECTED), Frame.READY: (_State.CONNECTED, _State.OPEN)}


class VerbsEndpoint(LoopEndpoint[Operation]):
    """Posts requests on its own queue pair; what the peer posts is served by the device, without this process.

    All state below belongs to the loop's thread; other threads only post calls to it.
    """

    scheme: ClassVar[str] = "verbs"

    def __init__(
        self, sock: socket.socket, loop: IoLoop, rail: Rail, registrations: Registrations, *, peer: str, ticket: bytes
    ) -> None:
        super().__init__(loop, peer=peer, ticket=ticket)
        self._sock = sock
        self._rail = rail
        self._registrations = registrations
        self._state = _State.CONNECTING
        self._settled = threading.Event()
        self._refusal: KVRDMAError | None = None  # why it never was open
        self._numbers = itertools.count(1)
        self._ready: list[Operation] = []
        self._early: list[Operation] = []  # posted before the lane was open
        self._known: dict[bytes, Grant] = {}
        self._asked: dict[bytes, list[Operation]] = {}
        self._granted: dict[int, bytes] = {}
        self._decoder = exchange.Decoder()
        self._unsent = bytearray()
        self._piece_nbytes = 0
        self._lane = Lane(rail, self._on_chain)
        loop.call_soon(self._start)

    # -- the interface, on any thread

    def wait_open(self, timeout: float) -> None:
        """Wait until both ends may write to each other; raises what went wrong, or `DeadlineError`."""
        if not self._settled.wait(timeout):
            self.abort()
            raise DeadlineError(f"verbs: {self._peer} did not connect its queue pair within {timeout:.3g} s")
        if self._refusal is not None:
            raise self._refusal

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
        self._registrations.table.check(batch.local)
        check_remote(self.scheme, batch.remote)
        n = len(batch)
        transfer = Transfer(n, hold=hold)
        operation = Operation(batch, transfer, np.ones(n, dtype=np.bool_), int(priority), next(self._numbers))
        transfer._on_cancel = lambda: self._ask_to_cancel(operation)
        if not n:
            transfer.finish(operation.ok)
            return transfer
        try:
            self._loop.call_soon(lambda: self._submit(operation, timeout))
        except ClosedError as error:
            operation.ok[:] = False
            transfer.finish(operation.ok, error)
            raise
        return transfer

    def revoke(self, number: int) -> None:
        """Tell the peer that a key of ours has ended, if it was given that; on any thread."""
        with contextlib.suppress(ClosedError):
            self._loop.call_soon(lambda: self._tell_revoked(number))

    # -- on the loop's thread: the control socket

    def _start(self) -> None:
        if self.closed():
            return
        self._loop.watch(self._sock.fileno(), READABLE, self._on_socket)
        self._loop.watch(self._lane.fd, READABLE, lambda _: self._progress())
        self._send(exchange.encode_pair(self._lane.address()))

    def _send(self, frame: bytes) -> None:
        if self.closed():
            return
        waiting = bool(self._unsent)
        self._unsent += frame
        if not waiting:
            self._flush()
        if len(self._unsent) > _MAX_UNSENT:
            self.tear_down(ProtocolError(f"verbs: {self._peer} asks, and does not read the answers"))

    def _flush(self) -> None:
        try:
            sent = self._sock.send(self._unsent) if self._unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.tear_down(TransportError(f"verbs: {self._peer}: {error.strerror or error}"))
            return
        del self._unsent[:sent]
        events = READABLE | (WRITABLE if self._unsent else 0)
        self._loop.watch(self._sock.fileno(), events, self._on_socket)

    def _on_socket(self, events: int) -> None:
        if events & WRITABLE:
            self._flush()
        if not events & READABLE or self.closed():
            return
        try:
            data = self._sock.recv(_READ_NBYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.tear_down(TransportError(f"verbs: {self._peer}: {error.strerror or error}"))
            return
        if not data:
            self.tear_down(TransportError(f"verbs: {self._peer} is gone"))
            return
        try:
            for frame, body in self._decoder.feed(data):
                if self.closed():
                    return
                self._on_frame(frame, body)
        except ProtocolError as error:
            logger.warning("verbs endpoint to %s: %s", self._peer, error)
            self.tear_down(error)

    def _on_frame(self, frame: Frame, body: bytes) -> None:
        match frame:
            case Frame.PAIR | Frame.READY:
                before, after = _NEXT[frame]
                if self._state is not before:
                    raise ProtocolError(f"verbs: {frame.name} of a peer that is {self._state.name}")
                if frame is Frame.PAIR:
                    self._connect(body)
                self._state = after if self._state is before else self._state
                if self._state is _State.OPEN:
                    self._open()
            case Frame.ASK:
                grant, number = self._registrations.grant(body, self._rail)
                if number:
                    self._granted[number] = body
                self._send(grant.encode())
            case Frame.GRANT:
                self._on_grant(exchange.decode_grant(body))
            case Frame.REVOKED:
                self._known.pop(body, None)
            case Frame.GOODBYE:
                self.tear_down(ClosedError(f"verbs: {self._peer} closed the connection"))

    def _connect(self, body: bytes) -> None:
        there = exchange.decode_pair(body)
        self._piece_nbytes = min(there.max_message_nbytes, self._rail.limits.max_message_nbytes)
        try:
            self._lane.connect(there)
        except OSError as error:
            self.tear_down(
                TransportError(
                    f"verbs: {self._rail.pick.port} cannot connect to the queue pair of {self._peer}: "
                    f"{error.strerror or error}; is there a way between their addresses?"
                )
            )
            return
        self._send(exchange.encode_note(Frame.READY))

    def _open(self) -> None:
        self._settled.set()
        early, self._early = self._early, []
        for operation in early:
            self._begin(operation)

    def _say_goodbye(self) -> None:
        self._send(exchange.encode_note(Frame.GOODBYE))

    def _tell_revoked(self, number: int) -> None:
        token = self._granted.pop(number, None)
        if token is not None:
            self._send(exchange.encode_token(Frame.REVOKED, token))

    # -- on the loop's thread: operations

    def _submit(self, operation: Operation, timeout: float | None) -> None:
        if self.closed():
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
        if self._state is _State.OPEN:
            self._begin(operation)
        else:
            operation.missing = {remote.token for remote in operation.batch.remote}
            self._early.append(operation)

    def _begin(self, operation: Operation) -> None:
        """Find the keys that an operation needs, then queue it."""
        if operation not in self._operations:  # cancelled meanwhile
            return
        tokens = {remote.token for remote in operation.batch.remote}
        operation.grants = {token: self._known[token] for token in tokens if token in self._known}
        operation.missing = tokens - operation.grants.keys()
        for token in list(operation.missing):
            waiting = self._asked.setdefault(token, [])
            waiting.append(operation)
            if len(waiting) == 1:
                self._send(exchange.encode_token(Frame.ASK, token))
        if not operation.missing:
            self._queue(operation)

    def _on_grant(self, grant: Grant) -> None:
        if grant.token not in self._asked:
            raise ProtocolError("verbs: a grant that nobody asked for")
        if grant.rkey or grant.nbytes:
            self._known[grant.token] = grant
        for operation in self._asked.pop(grant.token):
            if grant.token in operation.missing:
                operation.grants[grant.token] = grant
                operation.missing.discard(grant.token)
                if not operation.missing:
                    self._queue(operation)

    def _queue(self, operation: Operation) -> None:
        try:
            operation.prepare(self._rail, self._piece_nbytes)
        except KeyError:
            operation.refuse(
                np.arange(len(operation.ok)), RegionError("verbs: a local region was deregistered under a transfer")
            )
        if operation.finished:
            self._finish(operation)
            return
        heapq.heappush(self._ready, operation)
        self._dispatch()

    def _dispatch(self) -> None:
        """Post what there is room for, in whole chains."""
        first = last = 0
        operation = None
        try:
            while self._ready and self._state is _State.OPEN:
                operation, lane = self._ready[0], self._lane
                want = min(lane.chain, operation.total - operation.next)
                if not want:
                    heapq.heappop(self._ready)
                    continue
                if lane.room < want:
                    return
                first, last = operation.next, operation.next + want
                operation.next = last
                operation.in_flight += want
                lane.post(
                    operation,
                    first,
                    operation.opcode,
                    operation.addresses[first:last],
                    operation.nbytes[first:last],
                    operation.lkeys[first:last],
                    operation.remote_addresses[first:last],
                    operation.rkeys[first:last],
                )
        except OSError as error:
            failed = TransportError(f"verbs: posting to {self._peer} failed: {error.strerror or error}")
            if operation is not None:
                operation.fail_posted(first, last, failed)
            self.tear_down(failed)

    def _progress(self) -> None:
        failure = self._lane.progress(signalled=True)
        if failure is not None:
            self._break(failure)
        else:
            self._dispatch()

    def _on_chain(self, chain: Chain, count: int) -> None:
        operation: Operation = chain.owner
        operation.in_flight -= count
        if operation.finished:
            self._finish(operation)

    def _finish(self, operation: Operation) -> None:
        self._operations.discard(operation)
        for timer in operation.timers:
            timer.cancel()
        operation.transfer.finish(operation.ok, operation.error)

    def _cancel(self, operation: Operation, error: KVRDMAError | None = None) -> None:
        if operation.cancelled or operation not in self._operations:
            return
        operation.cancelled = True
        operation.drop_rest(error or ClosedError("verbs: cancelled"))
        if operation.finished:
            self._finish(operation)

    def _time_out(self, operation: Operation, timeout: float) -> None:
        self._cancel(operation, DeadlineError(f"verbs: {self._peer} did not serve a batch within {timeout} s"))

    def _give_up(self, timeout: float) -> None:
        self.tear_down(DeadlineError(f"verbs: {self._peer} left a cancelled batch open for {timeout} s"))

    # -- on the loop's thread: ends

    def _break(self, failure: Failure) -> None:
        """A request failed, and the queue pair with it: nothing goes on."""
        operation: Operation = failure.chain.owner
        what = _explain(failure.status, operation.batch.opcode, self._peer)
        if failure.status in _REGION_FAULTS:
            operation.error = operation.error or RegionError(what)
        self.tear_down(TransportError(what), failure)

    def tear_down(self, error: KVRDMAError, failure: Failure | None = None) -> None:
        """End at once, on the loop's thread; `failure` is what the queue pair broke by. Idempotent."""
        first, callbacks = self._mark_closed(error)
        if not first:
            return
        connecting, self._state = self._state is not _State.OPEN, _State.CLOSED
        self._loop.forget(self._sock.fileno())
        self._loop.forget(self._lane.fd)
        self._sock.close()
        for chain, done in self._lane.close(failure):
            operation: Operation = chain.owner
            operation.in_flight -= done
            operation.fail_posted(chain.first + done, chain.first + chain.count, error)
        self._ready.clear()
        self._asked.clear()
        self._early.clear()
        for operation in list(self._operations):
            operation.drop_rest(error)
            self._finish(operation)
        if connecting:
            self._refusal = error
            self._settled.set()
        for callback in callbacks:
            call_guarded(callback)


def _explain(status: int, opcode: Opcode, peer: str) -> str:
    match status:
        case Status.RETRY_EXCEEDED:
            return f"verbs: {peer} does not answer any more"
        case Status.REM_ACCESS_ERR | Status.REM_INV_REQ_ERR:
            return f"verbs: {peer} refused a {opcode.name}: its key was revoked, or does not grant it"
        case Status.LOC_PROT_ERR:
            return f"verbs: a {opcode.name} named memory of ours that is not registered"
        case Status.FLUSHED:
            return f"verbs: the queue pair to {peer} went to ERROR"
        case Status.LOC_QP_OP_ERR:
            return f"verbs: the device could not send to {peer}; is its link down?"
        case _:
            return f"verbs: a {opcode.name} to {peer} ended with status {status} of ibv_wc_status"
