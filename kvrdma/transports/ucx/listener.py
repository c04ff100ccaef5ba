"""A listener of the ucx transport: lets peers prove themselves, then makes a worker and an endpoint for each."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from kvrdma.auth import PROOF_NBYTES, Role, make_nonce
from kvrdma.errors import AuthenticationError, ClosedError, DeadlineError, ProtocolError, TransportError
from kvrdma.settings import host_and_port
from kvrdma.transports.base import Endpoint, Listener, SecretOf, call_guarded, check_open, take_waiting
from kvrdma.transports.loop import READABLE, Timer
from kvrdma.transports.tcp import keep_alive
from kvrdma.transports.ucx import wire
from kvrdma.transports.ucx.core import Core
from kvrdma.transports.ucx.settings import Lanes
from kvrdma.transports.ucx.wire import Frame, Hello, Kind

logger = logging.getLogger(__name__)

GREETING_TIMEOUT_S: Final = 5.0
_MAX_GREETING: Final = 256  # sockets that have not said yet who they are
_ACCEPTS_A_TURN: Final = 32
_ACCEPT_PAUSE_S: Final = 0.5


@dataclass(slots=True, eq=False)
class _Guest:
    """A socket that has not proved itself yet, or not said where its worker is."""

    sock: socket.socket
    peer: str
    step: Callable[[_Guest, bytes], None]
    buffer: bytearray
    have: int = 0
    greeting: wire.Greeting | None = None
    secret: bytes = field(default=b"", repr=False)
    challenge: bytes = field(default_factory=make_nonce)
    timer: Timer | None = None

    def expect(self, n: int, step: Callable[[_Guest, bytes], None]) -> None:
        """Wait for n bytes, then take the next step."""
        self.buffer, self.have, self.step = bytearray(n), 0, step


class UcxListener(Listener):
    """Everything below the interface runs on the loop's thread."""

    def __init__(self, sock: socket.socket, host: str, lanes: Lanes, core: Core, secret_of: SecretOf | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._core = core
        self._loop = core.loop
        self._secret_of = secret_of
        self._contact = f"{host_and_port(host, sock.getsockname()[1])}?lanes={lanes.value}"
        self._guests: set[_Guest] = set()
        self._ready: queue.SimpleQueue[Endpoint | None] = queue.SimpleQueue()
        self._callback: Callable[[Endpoint], None] | None = None
        self._closed = False
        self._loop.call_soon(lambda: self._loop.watch(sock.fileno(), READABLE, lambda _: self._accept()))

    @property
    def contact_address(self) -> str:
        """What a peer gives to `connect`: host:port, and the lanes."""
        return self._contact

    def accept(self, *, timeout: float) -> Endpoint:
        """Wait for the next peer."""
        check_open(self._closed, "ucx listener")
        try:
            endpoint = self._ready.get(timeout=timeout)
        except queue.Empty:
            raise DeadlineError(f"ucx: nobody connected to {self._contact} within {timeout} s") from None
        if endpoint is None:
            self._ready.put(None)  # for the next one who waits
            raise ClosedError("ucx listener: closed")
        return endpoint

    def on_endpoint(self, callback: Callable[[Endpoint], None]) -> None:
        """Hand every endpoint that nobody has accepted to a callback."""

        def begin() -> None:
            self._callback = callback
            for endpoint in take_waiting(self._ready):
                call_guarded(callback, endpoint)

        self._loop.run(begin)

    def close(self) -> None:
        """Accept no more."""
        if not self._closed:
            self._closed = True
            self._loop.run(self._tear_down)
            self._ready.put(None)

    def _tear_down(self) -> None:
        self._loop.forget(self._sock.fileno())
        self._sock.close()
        for guest in list(self._guests):
            self._dismiss(guest)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors, say: level-triggered, the loop would ask again at once, for ever.
                logger.warning("ucx listener %s: accept failed: %s", self._contact, error)
                self._loop.forget(self._sock.fileno())
                self._loop.call_at(time.monotonic() + _ACCEPT_PAUSE_S, self._resume)
                return
            if len(self._guests) >= _MAX_GREETING:
                sock.close()
                continue
            sock.setblocking(False)
            guest = _Guest(sock, f"{address[0]}:{address[1]}", self._on_greeting, bytearray(wire.GREETING_NBYTES))
            self._guests.add(guest)
            self._loop.watch(sock.fileno(), READABLE, partial(self._on_guest, guest))
            guest.timer = self._loop.call_at(time.monotonic() + GREETING_TIMEOUT_S, partial(self._dismiss, guest))

    def _resume(self) -> None:
        if not self._closed:
            self._loop.watch(self._sock.fileno(), READABLE, lambda _: self._accept())

    def _on_guest(self, guest: _Guest, events: int) -> None:
        try:
            n = guest.sock.recv_into(memoryview(guest.buffer)[guest.have :])
            if n == 0:
                raise TransportError("closed before it had proved itself")
            guest.have += n
            if guest.have == len(guest.buffer):
                guest.step(guest, bytes(guest.buffer))
        except BlockingIOError:
            return
        except (ProtocolError, AuthenticationError) as error:
            logger.warning("ucx listener %s: %s: %s", self._contact, guest.peer, error)
            if guest.greeting is None:  # a peer of another version learns which one this is
                with contextlib.suppress(OSError):
                    guest.sock.send(wire.encode_challenge(guest.challenge))
            self._dismiss(guest)
        except (OSError, TransportError, ClosedError) as error:
            logger.debug("ucx listener %s: %s: %s", self._contact, guest.peer, error)
            self._dismiss(guest)

    def _on_greeting(self, guest: _Guest, raw: bytes) -> None:
        greeting = wire.Greeting.decode(raw)
        secret = b"" if self._secret_of is None else self._secret_of(greeting.ticket)
        if secret is None:
            raise AuthenticationError("its ticket is not one of ours")
        guest.greeting, guest.secret = greeting, secret
        guest.expect(PROOF_NBYTES, self._on_proof)
        guest.sock.send(wire.encode_challenge(guest.challenge))

    def _on_proof(self, guest: _Guest, raw: bytes) -> None:
        assert guest.greeting is not None
        if not guest.greeting.check(raw, Role.CLIENT, guest.secret, guest.challenge):
            raise AuthenticationError("its proof does not hold")
        guest.expect(wire.HEADER_NBYTES, self._on_hello_header)
        guest.sock.send(guest.greeting.prove(Role.SERVER, guest.secret, guest.challenge))

    def _on_hello_header(self, guest: _Guest, raw: bytes) -> None:
        kind, _, nbytes = wire.decode_header(raw)
        if kind is not Kind.HELLO or nbytes == 0:
            raise ProtocolError(f"ucx: {kind.name} of {nbytes} bytes where HELLO was due")
        guest.expect(nbytes, self._on_hello)

    def _on_hello(self, guest: _Guest, raw: bytes) -> None:
        """Make this end's worker and endpoint, and hand the endpoint over before the peer hears of it."""
        assert guest.greeting is not None
        theirs = Hello.decode(raw)
        worker = self._core.make_worker()
        try:
            hello = Frame(Kind.HELLO, 0, self._core.hello(worker).encode())
            keep_alive(guest.sock)
            endpoint = self._core.adopt(worker, theirs, guest.sock, peer=guest.peer, ticket=guest.greeting.ticket)
            self._strike(guest)
        finally:
            self._core.give_up(worker)
        if self._callback is not None:
            call_guarded(self._callback, endpoint)
        else:
            self._ready.put(endpoint)
        self._core.send(endpoint, hello)
        self._core.send(endpoint, Frame(Kind.READY))

    def _dismiss(self, guest: _Guest) -> None:
        if guest in self._guests:
            self._strike(guest)
            self._loop.forget(guest.sock.fileno())
            guest.sock.close()

    def _strike(self, guest: _Guest) -> None:
        self._guests.discard(guest)
        if guest.timer is not None:
            guest.timer.cancel()
