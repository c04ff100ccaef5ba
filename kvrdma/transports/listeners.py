"""What listeners share: endpoints that wait to be taken, and sockets whose peers have to prove themselves first."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, TypeVar

from kvrdma.auth import make_nonce
from kvrdma.errors import AuthenticationError, ClosedError, DeadlineError, ProtocolError, TransportError
from kvrdma.logs import LimitedLog
from kvrdma.transports.base import Endpoint, Listener, SecretOf, call_guarded, check_open
from kvrdma.transports.loop import READABLE, IoLoop, Timer

GREETING_TIMEOUT_S: Final = 5.0
_MAX_GUESTS: Final = 256  # sockets that have not said yet who they are
_ACCEPTS_A_TURN: Final = 32
_ACCEPT_PAUSE_S: Final = 0.5


class QueueListener(Listener):
    """Hands endpoints to whoever accepts, or to a callback."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._guard = threading.Lock()
        self._ready: queue.SimpleQueue[Endpoint | None] = queue.SimpleQueue()
        self._callback: Callable[[Endpoint], None] | None = None
        self._closed = False

    def accept(self, *, timeout: float) -> Endpoint:
        """Wait for the next peer."""
        check_open(self._closed, f"{self._scheme} listener")
        try:
            endpoint = self._ready.get(timeout=timeout)
        except queue.Empty:
            where = self.contact_address
            raise DeadlineError(f"{self._scheme}: nobody connected to {where} within {timeout} s") from None
        if endpoint is None:
            self._ready.put(None)  # for the next one who waits
            raise ClosedError(f"{self._scheme} listener: closed")
        return endpoint

    def on_endpoint(self, callback: Callable[[Endpoint], None]) -> None:
        """Hand every endpoint that nobody has accepted to a callback."""
        with self._guard:
            self._callback = callback
        while True:
            try:
                endpoint = self._ready.get_nowait()
            except queue.Empty:
                return
            if endpoint is None:
                self._ready.put(None)  # it is closed, and stays so
                return
            call_guarded(callback, endpoint)

    def close(self) -> None:
        """Accept no more."""
        if not self._closed:
            self._closed = True
            self._shut()
            self._ready.put(None)

    def deliver(self, endpoint: Endpoint) -> None:
        """Take a new peer's endpoint."""
        with self._guard:
            callback = self._callback
            if callback is None:
                self._ready.put(endpoint)
        if callback is not None:
            call_guarded(callback, endpoint)

    @abstractmethod
    def _shut(self) -> None:
        """Let no more peers in; called once."""


@dataclass(slots=True, eq=False)
class Guest:
    """A socket that has not proved itself yet."""

    sock: socket.socket
    peer: str
    greeting: Any = None
    secret: bytes = field(default=b"", repr=False)
    challenge: bytes = field(default_factory=make_nonce)
    timer: Timer | None = None


G = TypeVar("G", bound=Guest)


class SocketListener(QueueListener, Generic[G]):
    """Accepts sockets and dismisses those that do not prove themselves in time.

    Everything below the interface runs on the loop's thread. What is said on the sockets is a subclass's.
    """

    def __init__(
        self, scheme: str, sock: socket.socket, contact: str, loop: IoLoop, secret_of: SecretOf | None
    ) -> None:
        super().__init__(scheme)
        sock.setblocking(False)
        self._sock = sock
        self._contact = contact
        self._loop = loop
        self._secret_of = secret_of
        self._guests: set[G] = set()
        self._logger = logging.getLogger(type(self).__module__)
        self._strangers = LimitedLog(self._logger)
        loop.call_soon(self._resume)

    @property
    def contact_address(self) -> str:
        """What a peer gives to `connect`."""
        return self._contact

    def on_endpoint(self, callback: Callable[[Endpoint], None]) -> None:
        """Hand every endpoint that nobody has accepted to a callback, on the loop's thread."""
        self._loop.run(lambda: super(SocketListener, self).on_endpoint(callback))

    @abstractmethod
    def _welcome(self, sock: socket.socket, address: Any) -> G:
        """The guest of a socket that was accepted; raises `TransportError` to turn it away."""

    @abstractmethod
    def _hear(self, guest: G) -> None:
        """Read what a guest says, and answer.

        Raises:
            BlockingIOError: it has not said all of it.
            ProtocolError, AuthenticationError: it is a stranger, which is logged.
            TransportError, ClosedError, OSError: it cannot be let in.
        """

    @abstractmethod
    def _encode_challenge(self, challenge: bytes) -> bytes:
        """What is sent after a greeting; it says which version this end has."""

    def _challenge(self, guest: G, greeting: Any) -> None:
        """Note what a guest said of itself, and have it prove that it knows the secret."""
        secret = b"" if self._secret_of is None else self._secret_of(greeting.ticket)
        if secret is None:
            raise AuthenticationError("its ticket is not one of ours")
        guest.greeting, guest.secret = greeting, secret
        guest.sock.send(self._encode_challenge(guest.challenge))

    def _dismiss(self, guest: G) -> None:
        if guest in self._guests:
            self._strike(guest)
            self._loop.forget(guest.sock.fileno())
            guest.sock.close()

    def _strike(self, guest: G) -> None:
        """It is no guest any more; its socket stays open."""
        self._guests.discard(guest)
        if guest.timer is not None:
            guest.timer.cancel()

    def _shut(self) -> None:
        self._loop.run(self._tear_down)

    def _tear_down(self) -> None:
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        for guest in list(self._guests):
            self._dismiss(guest)
        self._strangers.close()

    def _resume(self) -> None:
        if not self._closed:
            self._loop.watch(self._sock.fileno(), READABLE, lambda _: self._accept())

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, say: level-triggered, the loop would ask again at once, for ever.
                self._logger.warning("%s listener %s: accept failed: %s", self._scheme, self._contact, error)
                self._loop.forget(self._sock.fileno())
                self._loop.call_at(time.monotonic() + _ACCEPT_PAUSE_S, self._resume)
                return
            try:
                guest = self._welcome(sock, address)
                if len(self._guests) >= _MAX_GUESTS:
                    raise TransportError(f"{_MAX_GUESTS} others have not proved themselves yet")
            except TransportError as error:
                self._strangers.warning("%s listener %s: turned away: %s", self._scheme, self._contact, error)
                sock.close()
                continue
            sock.setblocking(False)
            self._guests.add(guest)
            self._loop.watch(sock.fileno(), READABLE, partial(self._on_guest, guest))
            guest.timer = self._loop.call_at(time.monotonic() + GREETING_TIMEOUT_S, partial(self._dismiss, guest))

    def _on_guest(self, guest: G, events: int) -> None:
        try:
            self._hear(guest)
        except BlockingIOError:
            return
        except (ProtocolError, AuthenticationError) as error:
            self._strangers.warning("%s listener %s: %s: %s", self._scheme, self._contact, guest.peer, error)
            if guest.greeting is None:  # a peer of another version learns which one this is
                with contextlib.suppress(OSError):
                    guest.sock.send(self._encode_challenge(guest.challenge))
            self._dismiss(guest)
        except (OSError, TransportError, ClosedError) as error:
            self._logger.debug("%s listener %s: %s: %s", self._scheme, self._contact, guest.peer, error)
            self._dismiss(guest)
