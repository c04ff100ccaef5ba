"""A listener of the ucx transport: lets peers prove themselves, then makes a worker and an endpoint for each."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvrdma.auth import PROOF_NBYTES, Role
from kvrdma.errors import AuthenticationError, ProtocolError, TransportError
from kvrdma.settings import host_and_port
from kvrdma.transports.base import SecretOf
from kvrdma.transports.listeners import Guest, SocketListener
from kvrdma.transports.tcp import keep_alive
from kvrdma.transports.ucx import wire
from kvrdma.transports.ucx.core import Core
from kvrdma.transports.ucx.settings import Lanes
from kvrdma.transports.ucx.wire import Frame, Hello, Kind


@dataclass(slots=True, eq=False)
class _Guest(Guest):
    """One that has proved itself has yet to say where its worker is."""

    step: Callable[[_Guest, bytes], None] = field(kw_only=True)
    buffer: bytearray = field(default_factory=lambda: bytearray(wire.GREETING_NBYTES))
    have: int = 0

    def expect(self, n: int, step: Callable[[_Guest, bytes], None]) -> None:
        """Wait for n bytes, then take the next step."""
        self.buffer, self.have, self.step = bytearray(n), 0, step


class UcxListener(SocketListener[_Guest]):
    """Makes a worker and an endpoint for each peer that has proved itself. A contact is host:port, and the lanes."""

    def __init__(self, sock: socket.socket, host: str, lanes: Lanes, core: Core, secret_of: SecretOf | None) -> None:
        self._core = core
        contact = f"{host_and_port(host, sock.getsockname()[1])}?lanes={lanes.value}"
        super().__init__("ucx", sock, contact, core.loop, secret_of)

    def _welcome(self, sock: socket.socket, address: Any) -> _Guest:
        return _Guest(sock, f"{address[0]}:{address[1]}", step=self._on_greeting)

    def _encode_challenge(self, challenge: bytes) -> bytes:
        return wire.encode_challenge(challenge)

    def _hear(self, guest: _Guest) -> None:
        n = guest.sock.recv_into(memoryview(guest.buffer)[guest.have :])
        if n == 0:
            raise TransportError("closed before it had proved itself")
        guest.have += n
        if guest.have == len(guest.buffer):
            guest.step(guest, bytes(guest.buffer))

    def _on_greeting(self, guest: _Guest, raw: bytes) -> None:
        greeting = wire.Greeting.decode(raw)
        guest.expect(PROOF_NBYTES, self._on_proof)
        self._challenge(guest, greeting)

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
        self.deliver(endpoint)
        self._core.send(endpoint, hello)
        self._core.send(endpoint, Frame(Kind.READY))
