"""In process: both ends in one process, for tests, `memory://` pools and as the smallest example of a transport."""

from __future__ import annotations

import ctypes
import hmac
import itertools
import queue
import threading
import time
from typing import ClassVar

import numpy as np

from kvrdma.errors import AuthenticationError, ClosedError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.memory import Lease, Memory
from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    Opcode,
    Priority,
    RemoteRegion,
    Rights,
    SecretOf,
    Transfer,
    TransferBatch,
    Transport,
    call_guarded,
    check_open,
)
from kvrdma.transports.endpoints import EndpointBase
from kvrdma.transports.listeners import QueueListener
from kvrdma.transports.regions import RangeStatus, RegionTable, check_remote, explain

_listeners: dict[str, InprocListener] = {}
_guard = threading.Lock()
_numbers = itertools.count(1)


class InprocTransport(Transport):
    """Copies between registered regions on a thread of each endpoint's own."""

    scheme: ClassVar[str] = "inproc"
    same_host: ClassVar[bool] = True

    def __init__(self) -> None:
        self.table = RegionTable(self.scheme)
        self._open: set[Endpoint | Listener] = set()
        self._closed = False

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable."""
        return self.table.register(memory)

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports."""
        self.table.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region."""
        return self.table.export(region, rights)

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        self.table.revoke(remote)

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener of this process."""
        check_open(self._closed, "inproc transport")
        with _guard:
            listener = _listeners.get(address)
        if listener is None:
            raise TransportError(f"inproc: nobody listens on {address!r}")
        expected = b"" if listener.secret_of is None else listener.secret_of(ticket)
        if expected is None or not hmac.compare_digest(expected, secret):
            raise AuthenticationError(f"inproc: {address!r} does not know the ticket, or another secret for it")
        here = InprocEndpoint(self.table, listener.transport.table, peer=address, ticket=ticket)
        there = InprocEndpoint(listener.transport.table, self.table, peer=f"peer of {address}", ticket=ticket)
        here.join(there)
        self.adopt(here)
        listener.transport.adopt(there)
        listener.deliver(there)
        return here

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener under a name; an empty one picks a free one."""
        check_open(self._closed, "inproc transport")
        listener = InprocListener(self, address or f"inproc-{next(_numbers)}", secret_of)
        with _guard:
            if listener.contact_address in _listeners:
                raise TransportError(f"inproc: {address!r} is taken")
            _listeners[listener.contact_address] = listener
        self._open.add(listener)
        if self._closed:  # meanwhile, by another thread
            listener.close()
            raise ClosedError("inproc transport: closed")
        return listener

    def adopt(self, endpoint: Endpoint) -> None:
        """Keep an endpoint until it ends, so that `close` can abort it."""
        self._open.add(endpoint)
        endpoint.add_close_callback(lambda: self._open.discard(endpoint))
        if self._closed:
            endpoint.abort()

    def close(self) -> None:
        """Abort every endpoint."""
        if not self._closed:
            self._closed = True
            for part in list(self._open):
                part.abort() if isinstance(part, Endpoint) else part.close()

    @classmethod
    def can_reach(cls, address: str) -> bool:
        """Whether the listener is in this process."""
        return address in _listeners


class InprocListener(QueueListener):
    """Hands the other end of each connection to whoever accepts."""

    def __init__(self, transport: InprocTransport, name: str, secret_of: SecretOf | None) -> None:
        super().__init__("inproc")
        self.transport = transport
        self.secret_of = secret_of
        self._name = name

    @property
    def contact_address(self) -> str:
        """The name."""
        return self._name

    def _shut(self) -> None:
        with _guard:
            _listeners.pop(self._name, None)


_Job = tuple[int, int, TransferBatch | None, Transfer | None, float | None]


class InprocEndpoint(EndpointBase):
    """Executes its own batches, lowest priority number first, by memmove."""

    scheme: ClassVar[str] = "inproc"

    def __init__(self, table: RegionTable, peer_table: RegionTable, *, peer: str, ticket: bytes) -> None:
        super().__init__(peer=peer, ticket=ticket)
        self._table = table
        self._peer_table = peer_table
        self._other: InprocEndpoint | None = None
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._order = itertools.count()
        self._posted: dict[Transfer, bool] = {}  # those that are not terminal, and whether a thread is finishing it
        self._idle = threading.Condition(self._guard)
        self._cancelled: set[Transfer] = set()
        self._thread = threading.Thread(target=self._run, name="kvrdma-inproc", daemon=True)
        self._thread.start()

    def join(self, other: InprocEndpoint) -> None:
        """Tie both ends together: when one ends, so does the other."""
        self._other, other._other = other, self

    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        """Queue a batch; returns at once."""
        self._table.check(batch.local)
        check_remote(self.scheme, batch.remote)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._guard:
            check_open(self._closed, str(self))
            transfer = Transfer(len(batch), hold=hold)
            transfer._on_cancel = lambda: self._cancelled.add(transfer)
            self._posted[transfer] = False
            self._jobs.put((int(priority), next(self._order), batch, transfer, deadline))
        return transfer

    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end, then close."""
        with self._idle:
            self._idle.wait_for(lambda: all(transfer.done() for transfer in self._posted), timeout)
        self.abort()

    def abort(self) -> None:
        """End at once, here and there."""
        self._end()
        if self._other is not None:
            self._other._end()

    def _end(self) -> None:
        caller = threading.current_thread()
        first, callbacks = self._mark_closed(ClosedError(f"{self}: aborted"))
        if first:
            self._jobs.put((-1, -1, None, None, None))
        elif caller is self._thread or (self._other is not None and caller is self._other._thread):
            return  # whoever began it may be waiting for this very thread
        if caller is not self._thread:
            self._thread.join()
        with self._guard:
            unfinished = list(self._posted)
        for transfer in unfinished:
            self._finish(transfer, None, ClosedError(f"{self}: aborted"))
        if caller is not self._thread:
            for transfer in unfinished:
                transfer.result()  # another thread may be just about to finish it
        for callback in callbacks:
            call_guarded(callback)

    def _run(self) -> None:
        while True:
            _, _, batch, transfer, deadline = self._jobs.get()
            if batch is None or transfer is None or self._closed:
                return
            if transfer in self._cancelled:
                self._finish(transfer, None, ClosedError("inproc: cancelled"))
            elif deadline is not None and time.monotonic() > deadline:
                self._finish(transfer, None, DeadlineError("inproc: not begun before its deadline"))
            else:
                self._execute(batch, transfer)

    def _execute(self, batch: TransferBatch, transfer: Transfer) -> None:
        need = Rights.READ if batch.opcode is Opcode.READ else Rights.WRITE
        status, remote, _ = self._peer_table.resolve(
            [region.token for region in batch.remote],
            batch.remote_rows,
            batch.remote_offsets,
            batch.nbytes,
            need,
        )
        ok = status == RangeStatus.OK
        error: KVRDMAError | None = None
        refused = status[status != RangeStatus.OK]
        if refused.size:
            error = RegionError(f"inproc: {explain(int(refused[0]))}")
        for i in np.flatnonzero(ok):
            if self._closed:
                ok[i:] = False
                error = ClosedError(f"{self}: aborted")
                break
            local = batch.local[batch.local_rows[i]].memory.address + int(batch.local_offsets[i])
            source, target = (int(remote[i]), local) if batch.opcode is Opcode.READ else (local, int(remote[i]))
            ctypes.memmove(target, source, int(batch.nbytes[i]))
        self._finish(transfer, ok, error)

    def _finish(self, transfer: Transfer, ok: np.ndarray | None, error: KVRDMAError | None) -> None:
        with self._guard:
            if self._posted.get(transfer, True):
                return  # by another thread
            self._posted[transfer] = True
        try:
            transfer.finish(ok, error)
        finally:
            with self._idle:
                del self._posted[transfer]
                self._cancelled.discard(transfer)
                self._idle.notify_all()
