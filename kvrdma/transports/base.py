"""A transport's contract: one-sided, batched READ and WRITE between registered memory of two processes.

Memory model. Terminal means: neither NIC nor peer can write these buffers any more, and nothing that is still
read from them will be used. A time-out is not terminal: it cancels, and the lease stays held until the
transfer is terminal. No order is promised between ranges or between transfers.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, IntEnum, auto
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, RegionError
from kvrdma.layout import Bitmap, Int64s
from kvrdma.memory import Lease, Memory

logger = logging.getLogger(__name__)


class Opcode(Enum):
    """What a batch does: READ brings remote bytes here, WRITE takes local bytes there."""

    READ = 1
    WRITE = 2


class Rights(Flag):
    """What an exported region allows a peer to do."""

    READ = auto()
    WRITE = auto()


class Priority(IntEnum):
    """Which of two waiting transfers goes first: the lower one."""

    LOAD = 0
    PREFETCH = 1
    OFFLOAD = 2


@dataclass(frozen=True, slots=True, eq=False)
class MemoryRegion:
    """Local memory that a transport may use; made once by `Transport.register`."""

    memory: Memory
    handle: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.memory.nbytes


@dataclass(frozen=True, slots=True)
class RemoteRegion:
    """A peer's exported memory: what `export` gave it, opaque to all but its scheme."""

    scheme: str
    nbytes: int
    token: bytes


@dataclass(frozen=True, slots=True)
class TransferBatch:
    """Ranges to move, as int64 columns over tables of regions. Transports split them as they need.

    Raises:
        RegionError: columns of unequal length, or a range outside its region.
    """

    opcode: Opcode
    local: Sequence[MemoryRegion]
    remote: Sequence[RemoteRegion]
    local_rows: Int64s
    local_offsets: Int64s
    remote_rows: Int64s
    remote_offsets: Int64s
    nbytes: Int64s

    def __post_init__(self) -> None:
        # Copies: what was checked here must be what is moved later, whatever the caller does with its arrays.
        for name in ("local_rows", "local_offsets", "remote_rows", "remote_offsets", "nbytes"):
            object.__setattr__(self, name, np.array(getattr(self, name)))
        columns = (self.local_rows, self.local_offsets, self.remote_rows, self.remote_offsets, self.nbytes)
        if any(column.dtype != np.int64 or column.shape != self.nbytes.shape for column in columns):
            raise RegionError("batch: five int64 columns of one length are needed")
        if not len(self):
            return
        if (self.nbytes < 1).any():
            raise RegionError("batch: every range needs at least 1 byte")
        sides = (
            ("local", self.local, self.local_rows, self.local_offsets),
            ("remote", self.remote, self.remote_rows, self.remote_offsets),
        )
        for side, regions, rows, offsets in sides:
            sizes = np.array([region.nbytes for region in regions], dtype=np.int64)
            if (rows < 0).any() or (rows >= len(sizes)).any():
                raise RegionError(f"batch: a {side} row names none of the {len(sizes)} {side} regions")
            outside = np.flatnonzero((offsets < 0) | (offsets > sizes[rows] - self.nbytes))
            if outside.size:
                i = int(outside[0])
                first, nbytes = int(offsets[i]), int(self.nbytes[i])
                raise RegionError(
                    f"batch: range {i} is bytes {first}..{first + nbytes} of a {side} region of {sizes[rows[i]]} bytes"
                )

    def __len__(self) -> int:
        return len(self.nbytes)

    @property
    def total_nbytes(self) -> int:
        """Bytes of all ranges together."""
        return int(self.nbytes.sum())


class Transfer:
    """Work under way. `ok` says which ranges (or keys) arrived whole; a failed one has an `error`.

    `cancel` asks for an early end; the transfer is terminal when it really is.
    """

    def __init__(self, n: int, *, hold: Lease | None = None, on_cancel: Callable[[], None] | None = None) -> None:
        self.ok: Bitmap = np.zeros(n, dtype=np.bool_)
        self.error: KVRDMAError | None = None
        self._hold = None if hold is None else hold.retain()
        self._on_cancel = on_cancel
        self._guard = threading.Lock()
        self._finished = False
        self._terminal = threading.Event()
        self._callbacks: list[Callable[[Transfer], None]] = []

    def done(self) -> bool:
        """Whether it is terminal."""
        return self._terminal.is_set()

    def result(self, timeout: float | None = None) -> Bitmap:
        """Wait until it is terminal and give `ok`: bool[n].

        A failure of the network or the peer shows as False and in `error`, it does not raise.

        Raises:
            DeadlineError: not terminal after `timeout` seconds. Its memory is still in use.
        """
        if not self._terminal.wait(timeout):
            raise DeadlineError(f"transfer: not terminal after {timeout} s")
        return self.ok

    def add_done_callback(self, callback: Callable[[Transfer], None]) -> None:
        """Call back once it is terminal, on whatever thread finds that out; at once if it is already."""
        with self._guard:
            if not self._terminal.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def cancel(self) -> None:
        """Ask for an early end. Ranges that have arrived stay; the rest is False."""
        if not self.done() and self._on_cancel is not None:
            self._on_cancel()

    def finish(self, ok: Bitmap | None = None, error: KVRDMAError | None = None) -> None:
        """Make it terminal. For whoever made the transfer; once.

        The hold is let go first: whoever returns from `result` may count on that.
        """
        with self._guard:
            if self._finished:
                raise AssertionError("transfer: finished twice")
            self._finished = True
            if ok is not None:
                self.ok = ok
            self.error = error
            hold, self._hold = self._hold, None
        try:
            if hold is not None:
                hold.release()
        finally:
            with self._guard:
                callbacks, self._callbacks = self._callbacks, []
                self._terminal.set()
            for callback in callbacks:
                call_guarded(callback, self)


class Endpoint(ABC):
    """One end of a connection between two processes; either end reads and writes what the other exported."""

    scheme: ClassVar[str]

    @property
    @abstractmethod
    def peer(self) -> str:
        """Who is at the other end, for logs."""

    @property
    @abstractmethod
    def ticket(self) -> bytes:
        """What the end that connected said of itself; ties the connection to a control plane's."""

    @abstractmethod
    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        """Queue a batch; returns at once. `hold` is retained until the transfer is terminal.

        After `timeout` seconds the transfer is cancelled, and after as much again the endpoint is aborted,
        so that every transfer with a time-out becomes terminal.

        Raises:
            ClosedError: the endpoint is closed; nothing was queued.
        """

    @abstractmethod
    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end (at most `timeout` seconds), then close. Idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """End at once: every transfer is terminal, unfinished ranges False, when this returns. Idempotent."""

    @abstractmethod
    def closed(self) -> bool:
        """Whether it was closed, aborted, or lost its peer."""

    @abstractmethod
    def add_close_callback(self, callback: Callable[[], None]) -> None:
        """Call back once when the endpoint is closed, for whatever reason."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.abort()


SecretOf = Callable[[bytes], bytes | None]
"""The secret behind a ticket; None where nobody was given it."""


class Listener(ABC):
    """Where peers connect to. `contact_address` is what to tell them."""

    @property
    @abstractmethod
    def contact_address(self) -> str:
        """What a peer gives to `Transport.connect`."""

    @abstractmethod
    def accept(self, *, timeout: float) -> Endpoint:
        """Wait for the next peer; raises `DeadlineError`, or `ClosedError` once closed."""

    @abstractmethod
    def on_endpoint(self, callback: Callable[[Endpoint], None]) -> None:
        """Hand endpoints to a callback, on the transport's thread, instead of to `accept`.

        Every new one, and those that came before and were not accepted.
        """

    @abstractmethod
    def close(self) -> None:
        """Accept no more; endpoints already made live on. Idempotent."""


class Transport(ABC):
    """One per process and scheme: registers memory, exports it, connects and listens."""

    scheme: ClassVar[str]
    enforces_rights: ClassVar[bool] = True
    """Whether a peer that was given a READ key is kept from writing by the transport itself."""

    by_name_only: ClassVar[bool] = False
    """Whether it is used only where a user's order names it: for what is no good choice by itself."""

    same_host: ClassVar[bool] = False
    """Whether it reaches processes of this host only. Its addresses are names then, and an empty one picks one."""

    @abstractmethod
    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable; once for each slab, never in the data path."""

    @abstractmethod
    def deregister(self, region: MemoryRegion) -> None:
        """Undo `register` and revoke every export; no transfer of ours may be using the region."""

    @abstractmethod
    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key that lets a peer do what `rights` says, for as long as it is not revoked."""

    @abstractmethod
    def revoke(self, remote: RemoteRegion) -> None:
        """Take an export back: requests that arrive later fail. Unknown ones are ignored."""

    @abstractmethod
    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener. `ticket` says who we are; both ends prove that they know the `secret` behind it.

        Raises:
            TransportError, DeadlineError: the listener cannot be reached, or turned us away.
            AuthenticationError: the listener does not know the secret.
        """

    @abstractmethod
    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener for whoever proves that it knows the secret of its ticket.

        `secret_of` is called on the transport's thread; without it every ticket has the empty secret.

        Raises:
            TransportError: the address is taken or not ours.
        """

    @abstractmethod
    def close(self) -> None:
        """Abort what is open and end the transport's threads. Idempotent."""

    @classmethod
    def usable(cls) -> str | None:
        """Why this transport cannot be used in this process, or None if it can."""
        return None

    @classmethod
    def can_reach(cls, address: str) -> bool:
        """Whether an address that a peer offered can be reached from here: the hook of negotiation."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def call_guarded(callback: Callable[..., None], *args: Any) -> None:
    """Call a user's callback on a transport's thread, where an exception would hit whoever comes next."""
    try:
        callback(*args)
    except Exception:
        logger.exception("a callback failed: %r", callback)


def check_open(closed: bool, what: str) -> None:
    """Raise `ClosedError` where something is used after its end."""
    if closed:
        raise ClosedError(f"{what}: closed")
