"""What endpoints share: who is at the other end, how they end, and whom they tell of it."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Generic, Protocol, TypeVar

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError
from kvrdma.transports.base import Endpoint, Transfer
from kvrdma.transports.loop import IoLoop


class EndpointBase(Endpoint):
    """Keeps what every endpoint does. `_guard` guards `_closed`, `_error` and the callbacks."""

    def __init__(self, *, peer: str, ticket: bytes) -> None:
        self._peer = peer
        self._ticket = ticket
        self._guard = threading.Lock()
        self._closed = False
        self._error: KVRDMAError = ClosedError(f"{self}: closed")
        """What ended it."""
        self._close_callbacks: list[Callable[[], None]] = []

    @property
    def peer(self) -> str:
        """Who is at the other end, for logs."""
        return self._peer

    @property
    def ticket(self) -> bytes:
        """What the end that connected said of itself."""
        return self._ticket

    def closed(self) -> bool:
        """Whether it was closed, aborted, or lost its peer."""
        return self._closed

    def add_close_callback(self, callback: Callable[[], None]) -> None:
        """Call back once when the endpoint is closed."""
        with self._guard:
            if not self._closed:
                self._close_callbacks.append(callback)
                return
        callback()

    def __str__(self) -> str:
        return f"{self.scheme} endpoint to {self._peer}"

    def _mark_closed(self, error: KVRDMAError) -> tuple[bool, list[Callable[[], None]]]:
        """Whether this call is the one that ends it; and the callbacks, for whoever comes first to call them."""
        with self._guard:
            first = not self._closed
            if first:
                self._closed, self._error = True, error
            callbacks, self._close_callbacks = self._close_callbacks, []
        return first, callbacks


class HasTransfer(Protocol):
    """An operation that was posted."""

    transfer: Transfer


Operation = TypeVar("Operation", bound=HasTransfer)


class LoopEndpoint(EndpointBase, Generic[Operation]):
    """One whose state belongs to a loop's thread: other threads only post calls to it."""

    def __init__(self, loop: IoLoop, *, peer: str, ticket: bytes) -> None:
        super().__init__(peer=peer, ticket=ticket)
        self._loop = loop
        self._operations: set[Operation] = set()

    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end, then close."""
        if self._closed:
            return
        if not self._loop.inside():
            deadline = monotonic() + timeout
            pending: list[Transfer] = []
            self._loop.run(lambda: pending.extend(operation.transfer for operation in self._operations))
            wait_for(pending, deadline)
        self._loop.run(self._say_goodbye)
        self._end(ClosedError(f"{self}: closed"))

    def abort(self) -> None:
        """End at once."""
        self._end(ClosedError(f"{self}: aborted"))

    def _end(self, error: KVRDMAError) -> None:
        self._loop.run(lambda: self.tear_down(error))

    def _ask_to_cancel(self, operation: Operation) -> None:
        with contextlib.suppress(ClosedError):  # the loop has ended, and every transfer with it
            self._loop.call_soon(lambda: self._cancel(operation))

    @abstractmethod
    def tear_down(self, error: KVRDMAError) -> None:
        """End at once, on the loop's thread. Idempotent."""

    @abstractmethod
    def _cancel(self, operation: Operation, error: KVRDMAError | None = None) -> None:
        """End an operation early, for the reason given or because its poster asked for it."""

    @abstractmethod
    def _say_goodbye(self) -> None:
        """Tell the peer that this is the end, if it still listens."""


def wait_for(transfers: Iterable[Transfer], deadline: float) -> None:
    """Wait until transfers are terminal, or until `time.monotonic()` is `deadline`."""
    with contextlib.suppress(DeadlineError):
        for transfer in transfers:
            transfer.result(max(0.0, deadline - monotonic()))
