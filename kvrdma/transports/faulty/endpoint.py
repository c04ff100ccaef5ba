"""A batch's way through the faults: what it waits for, when it goes inside, and when it is terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, TransportError
from kvrdma.layout import Bitmap
from kvrdma.memory import Lease, Memory
from kvrdma.transports.base import Endpoint, MemoryRegion, Opcode, Priority, Transfer, TransferBatch
from kvrdma.transports.faulty.plan import Fault, FaultKind
from kvrdma.transports.loop import Timer

if TYPE_CHECKING:
    from kvrdma.transports.faulty.transport import FaultyTransport


@dataclass(slots=True, eq=False)
class _Posted:
    """A batch under way: the caller's transfer, and the inner one once there is one."""

    transfer: Transfer
    batch: TransferBatch
    priority: Priority
    timeout: float | None
    fault: Fault | None
    inner: Transfer | None = None
    error: KVRDMAError | None = None
    timers: list[Timer] = field(default_factory=list)
    bounce: MemoryRegion | None = None
    finisher: int = 0  # the thread that makes it terminal

    @property
    def kind(self) -> FaultKind | None:
        """What befalls it."""
        return None if self.fault is None else self.fault.kind

    def cancel_timers(self) -> None:
        """Forget what was to happen to it. On the clock's thread."""
        for timer in self.timers:
            timer.cancel()


_NOT_POSTED_AT_ONCE: Final = (FaultKind.DELAY, FaultKind.DROP, FaultKind.LATE)


class FaultyEndpoint(Endpoint):
    """Posts to the inner endpoint what the plan lets through, and completes when and how the plan says."""

    scheme: ClassVar[str] = "faulty"

    def __init__(self, inner: Endpoint, transport: FaultyTransport) -> None:
        self._inner = inner
        self._transport = transport
        self._idle = threading.Condition()
        self._open: dict[_Posted, None] = {}
        self._held: list[_Posted] = []
        self._ended = False
        # The first close callback: what was never posted is terminal before anybody else hears of the end.
        inner.add_close_callback(self._on_closed)

    @property
    def peer(self) -> str:
        """Who is at the other end, for logs."""
        return self._inner.peer

    @property
    def ticket(self) -> bytes:
        """What the end that connected said of itself."""
        return self._inner.ticket

    def closed(self) -> bool:
        """Whether it was closed, aborted, or lost its peer."""
        return self._inner.closed()

    def add_close_callback(self, callback: Callable[[], None]) -> None:
        """Call back once when the endpoint is closed."""
        self._inner.add_close_callback(callback)

    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        """Queue a batch; returns at once."""
        inside = self._transport.inside(batch)
        fault = self._transport.plan.next(batch) if len(batch) else None
        transfer = Transfer(len(batch), hold=hold)
        posted = _Posted(transfer, inside, priority, timeout, fault)
        transfer._on_cancel = lambda: self._cancel(posted, ClosedError("faulty: cancelled"))
        try:
            with self._idle:
                self._open[posted] = None
                if self._ended:
                    raise ClosedError(f"faulty endpoint to {self.peer}: closed")
            self._begin(posted)
        except BaseException as error:
            posted.error = error if isinstance(error, KVRDMAError) else None
            self._finish(posted)
            raise
        return transfer

    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end, then close."""
        deadline = time.monotonic() + timeout
        with self._idle:
            self._idle.wait_for(lambda: all(posted.transfer.done() for posted in self._open), timeout)
            self._ended = True
        self._inner.close(timeout=max(0.0, deadline - time.monotonic()))
        self._sweep(ClosedError(f"faulty endpoint to {self.peer}: closed"))

    def abort(self) -> None:
        """End at once."""
        self._end(ClosedError(f"faulty endpoint to {self.peer}: aborted"))

    # -- a batch's way

    def _begin(self, posted: _Posted) -> None:
        if posted.kind not in _NOT_POSTED_AT_ONCE:
            self._post_inside(posted, posted.timeout)
            return
        calls: list[tuple[float, Callable[[], None]]] = []
        if posted.fault is not None and posted.kind is FaultKind.DELAY:
            calls.append((posted.fault.seconds, lambda: self._post_later(posted)))
        if posted.timeout is not None:
            late = DeadlineError(f"faulty: {self.peer} did not serve a batch within {posted.timeout} s")
            calls.append((posted.timeout, lambda: self._cancel(posted, late)))
            calls.append((2 * posted.timeout, lambda: self._give_up(posted, late)))
        self._call_later(posted, calls)

    def _call_later(self, posted: _Posted, calls: list[tuple[float, Callable[[], None]]]) -> None:
        clock, now = self._transport.clock, time.monotonic()

        def start() -> None:
            if not posted.transfer.done():
                posted.timers += [clock.call_at(now + seconds, call) for seconds, call in calls]

        clock.call_soon(start)

    def _post_inside(self, posted: _Posted, timeout: float | None) -> None:
        batch = posted.batch
        if posted.fault is not None and posted.kind is FaultKind.CORRUPT and batch.opcode is Opcode.WRITE:
            batch = self._corrupt_copy(posted, posted.fault)
        elif posted.kind is FaultKind.RESET:
            batch = first_half(batch)
        with self._idle:  # so that a cancel or an end finds it before or after, not in between
            if posted.finisher or posted.inner is not None:
                return
            if self._ended:
                raise ClosedError(f"faulty endpoint to {self.peer}: closed")
            inner = self._inner.post(batch, priority=posted.priority, timeout=timeout)
            posted.inner = inner
        inner.add_done_callback(lambda _: self._on_inner_done(posted))

    def _post_later(self, posted: _Posted) -> None:
        try:
            self._post_inside(posted, None)
        except KVRDMAError as error:
            posted.error = posted.error or error
            self._finish(posted)

    def _cancel(self, posted: _Posted, error: KVRDMAError) -> None:
        with self._idle:
            if posted.finisher or posted.error is not None:
                return
            posted.error = error
            inner = posted.inner
        if posted.kind is FaultKind.LATE:
            self._post_later(posted)
        elif inner is not None:
            inner.cancel()
        elif posted.kind is FaultKind.DELAY:
            self._finish(posted)

    def _give_up(self, posted: _Posted, error: KVRDMAError) -> None:
        if not posted.transfer.done():
            self._end(error)

    def _on_inner_done(self, posted: _Posted) -> None:
        if posted.fault is not None and posted.kind is FaultKind.CORRUPT and posted.batch.opcode is Opcode.READ:
            arrived = np.flatnonzero(posted.inner.ok) if posted.inner is not None else ()
            self._flip([local_bytes(posted.batch, int(i)) for i in arrived], posted.fault)
        elif posted.kind is FaultKind.RESET:
            self._end(TransportError(f"faulty: the connection to {self.peer} was reset"))
        with self._idle:
            held, self._held = self._held, []
            waits = posted.kind is FaultKind.REORDER and not held and not self._ended
            if waits:
                self._held = [posted]
        if waits and posted.fault is not None:
            with contextlib.suppress(ClosedError):  # the end of the clock is that of every transfer
                self._call_later(posted, [(posted.fault.seconds, lambda: self._finish(posted))])
            return
        for each in (posted, *held):
            self._finish(each)

    def _finish(self, posted: _Posted) -> None:
        """Make it terminal; whoever comes second does nothing."""
        with self._idle:
            if posted.finisher:
                return
            posted.finisher = threading.get_ident()
            if posted in self._held:
                self._held.remove(posted)
        inner = posted.inner
        ok: Bitmap = np.zeros(len(posted.batch), dtype=np.bool_)
        error = posted.error
        if inner is not None:
            error = error or inner.error
            if posted.kind is FaultKind.RESET:
                whole = len(ok) // 2
                ok[:whole] = inner.ok[:whole]
                error = error or TransportError(f"faulty: the connection to {self.peer} was reset")
            else:
                ok = inner.ok
        if posted.bounce is not None:
            self._transport.inner.deregister(posted.bounce)
        with contextlib.suppress(ClosedError):
            self._transport.clock.call_soon(posted.cancel_timers)
        try:
            posted.transfer.finish(ok, error)
        finally:
            with self._idle:
                self._open.pop(posted, None)
                self._idle.notify_all()

    # -- ends

    def _end(self, error: KVRDMAError) -> None:
        with self._idle:
            self._ended = True  # first: nothing is posted inside behind the abort
        self._inner.abort()
        self._sweep(error)

    def _on_closed(self) -> None:
        with self._idle:
            self._ended = True
        self._sweep(ClosedError(f"faulty endpoint to {self.peer}: closed"))

    def _sweep(self, error: KVRDMAError) -> None:
        """Make terminal whatever the inner endpoint has nothing to do with any more."""
        with self._idle:
            over = [posted for posted in self._open if posted.inner is None or posted.inner.done()]
        for posted in over:
            if posted.inner is None:
                posted.error = posted.error or error
            self._finish(posted)
        for posted in over:
            if posted.finisher != threading.get_ident():
                posted.transfer.result()  # another thread is just about to finish it

    # -- flipped bytes

    def _corrupt_copy(self, posted: _Posted, fault: Fault) -> TransferBatch:
        """The same WRITE from memory of our own, where a byte is another: the caller's memory stays as it is."""
        batch = posted.batch
        copy = np.concatenate([local_bytes(batch, i) for i in range(len(batch))])
        self._flip([copy], fault)
        posted.bounce = self._transport.inner.register(Memory.of(copy))
        offsets = np.cumsum(batch.nbytes) - batch.nbytes
        return replace(batch, local=[posted.bounce], local_rows=np.zeros_like(offsets), local_offsets=offsets)

    def _flip(self, parts: Sequence[NDArray[np.uint8]], fault: Fault) -> None:
        """Flip the lowest bit of the byte that a fault names, counted over all the parts."""
        total = sum(len(part) for part in parts)
        at = total // 2 if fault.byte is None else fault.byte % max(1, total)
        for part in parts:
            if at < len(part):
                part[at] ^= 1
                self._transport.plan.note(fault)
                return
            at -= len(part)


def local_bytes(batch: TransferBatch, i: int) -> NDArray[np.uint8]:
    """The local bytes of range i, without a copy."""
    first = int(batch.local_offsets[i])
    return batch.local[int(batch.local_rows[i])].memory.array()[first : first + int(batch.nbytes[i])]


def first_half(batch: TransferBatch) -> TransferBatch:
    """The first half of the ranges, or of the only range's bytes."""
    n = len(batch) // 2 or 1
    nbytes = batch.nbytes[:n] if len(batch) > 1 else np.maximum(batch.nbytes // 2, 1)
    return replace(
        batch,
        local_rows=batch.local_rows[:n],
        local_offsets=batch.local_offsets[:n],
        remote_rows=batch.remote_rows[:n],
        remote_offsets=batch.remote_offsets[:n],
        nbytes=nbytes,
    )
