"""Streams that prove themselves: opening those of an endpoint, and the listener that joins them.

Shared by the transports that have sockets: for their bytes (tcp), or for the control of what moves them.
"""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvrdma.auth import PROOF_NBYTES, Role
from kvrdma.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    DeadlineError,
    TransportError,
)
from kvrdma.settings import Url, host_and_port
from kvrdma.transports.base import Endpoint, SecretOf
from kvrdma.transports.listeners import Guest, SocketListener
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.tcp import wire

logger = logging.getLogger(__name__)

_BACKLOG: Final = 128


def open_streams(
    address: str,
    count: int,
    *,
    timeout: float,
    ticket: bytes,
    secret: bytes,
    dialect: wire.Dialect = wire.TCP,
) -> list[socket.socket]:
    """Open the streams of a new endpoint, in blocking mode; both ends have proved themselves on each of them.

    Raises:
        TransportError, DeadlineError: the listener cannot be reached, or turned us away.
        AuthenticationError: the listener does not know the secret.
    """
    what = f"{dialect.name}: {address}"
    if len(ticket) > wire.MAX_TICKET:
        raise ConfigError(f"{dialect.name}: a ticket has at most {wire.MAX_TICKET} bytes, not {len(ticket)}")
    host, port = parse_address(address, name=dialect.name)
    session = secrets.token_bytes(wire.SESSION_NBYTES)
    deadline = time.monotonic() + timeout
    greetings = [wire.Greeting(session, index, count, ticket, dialect=dialect) for index in range(count)]
    socks: list[socket.socket] = []
    try:
        for greeting in greetings:
            sock = socket.create_connection((host, port), timeout=_left(deadline, what))
            socks.append(sock)
            if sock.getsockname() == sock.getpeername():
                # Where nobody listens on a port of the ephemeral range, TCP may meet and greet itself.
                raise TransportError(f"{dialect.name}: cannot reach {address}: nobody listens there")
            sock.sendall(greeting.encode())
        challenges = []
        for sock, greeting in zip(socks, greetings, strict=True):
            raw = receive_exactly(sock, wire.CHALLENGE_NBYTES, deadline, what)
            challenge = wire.decode_challenge(raw, dialect)
            challenges.append(challenge)
            sock.sendall(greeting.prove(Role.CLIENT, secret, challenge))
        for sock, greeting, challenge in zip(socks, greetings, challenges, strict=True):
            proof = receive_exactly(sock, PROOF_NBYTES, deadline, what)
            if not greeting.check(proof, Role.SERVER, secret, challenge):
                raise AuthenticationError(f"{what} did not prove that it knows the secret of this ticket")
    except BaseException as error:
        for sock in socks:
            sock.close()
        if isinstance(error, TimeoutError):
            raise DeadlineError(f"{what} did not answer within {timeout} s") from None
        if isinstance(error, OSError):
            raise TransportError(f"{dialect.name}: cannot reach {address}: {error.strerror or error}") from error
        raise
    return socks


def open_listener(
    address: str,
    loop: IoLoop,
    adopt: Callable[..., Endpoint],
    secret_of: SecretOf | None,
    dialect: wire.Dialect = wire.TCP,
) -> StreamListener:
    """Listen on host:port; port 0 picks a free one. Raises `TransportError` where it is taken or not ours."""
    host, port = parse_address(address, allow_zero=True, name=dialect.name)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise TransportError(f"{dialect.name}: cannot listen on {address}: {error.strerror or error}") from error
    try:
        return StreamListener(sock, host, loop, adopt, secret_of, dialect)
    except ClosedError:
        sock.close()
        raise


@dataclass(slots=True, eq=False)
class _Guest(Guest):
    """One that has proved itself waits for the other streams of its session."""

    buffer: bytearray = field(default_factory=lambda: bytearray(wire.GREETING_NBYTES))
    have: int = 0
    proved: bool = False


class StreamListener(SocketListener[_Guest]):
    """Accepts streams and joins those of one session into an endpoint, which `adopt` makes of their sockets."""

    def __init__(
        self,
        sock: socket.socket,
        host: str,
        loop: IoLoop,
        adopt: Callable[..., Endpoint],
        secret_of: SecretOf | None,
        dialect: wire.Dialect = wire.TCP,
    ) -> None:
        self._adopt = adopt
        self._dialect = dialect
        super().__init__(dialect.name, sock, host_and_port(host, sock.getsockname()[1]), loop, secret_of)

    def _welcome(self, sock: socket.socket, address: Any) -> _Guest:
        return _Guest(sock, f"{address[0]}:{address[1]}")

    def _encode_challenge(self, challenge: bytes) -> bytes:
        return wire.encode_challenge(challenge, self._dialect)

    def _hear(self, guest: _Guest) -> None:
        """Read a greeting and answer with a challenge; then read the proof."""
        n = guest.sock.recv_into(memoryview(guest.buffer)[guest.have :])
        if n == 0:
            raise TransportError("closed before it had proved itself")
        guest.have += n
        if guest.have < len(guest.buffer):
            return
        if guest.greeting is None:
            greeting = wire.Greeting.decode(bytes(guest.buffer), self._dialect)
            guest.buffer, guest.have = bytearray(PROOF_NBYTES), 0
            self._challenge(guest, greeting)
            return
        if not guest.greeting.check(bytes(guest.buffer), Role.CLIENT, guest.secret, guest.challenge):
            raise AuthenticationError("its proof does not hold")
        guest.proved = True
        self._loop.forget(guest.sock.fileno())
        self._join(guest.greeting)

    def _join(self, greeting: wire.Greeting) -> None:
        """Make an endpoint once the last of a session's streams has proved itself."""
        found = [(g.greeting, g) for g in self._guests if g.greeting and g.greeting.session == greeting.session]
        mates = [(said, g) for said, g in found if g.proved]
        if any((said.count, said.ticket) != (greeting.count, greeting.ticket) for said, _ in mates):
            for _, guest in found:
                self._dismiss(guest)
            return
        if sorted(said.index for said, _ in mates) != list(range(greeting.count)):
            return
        mates.sort(key=lambda mate: mate[0].index)
        for _, guest in mates:
            self._strike(guest)
        peer = mates[0][1].peer
        try:
            endpoint = self._adopt([guest.sock for _, guest in mates], peer=peer, ticket=greeting.ticket)
        except (OSError, ClosedError) as error:
            logger.debug("%s listener %s: %s: %s", self._scheme, self._contact, peer, error)
            for _, guest in mates:
                guest.sock.close()
            return
        # Our proofs go last: once `connect` has returned, this end is known to whoever waits for it here.
        self.deliver(endpoint)
        try:
            for said, guest in mates:
                guest.sock.send(said.prove(Role.SERVER, guest.secret, guest.challenge))
        except OSError as error:
            logger.debug("%s listener %s: %s left before it was answered: %s", self._scheme, self._contact, peer, error)
            endpoint.abort()


def parse_address(address: str, *, allow_zero: bool = False, name: str = "tcp") -> tuple[str, int]:
    """Split host:port or [host]:port; raises `ConfigError`."""
    if allow_zero and address.endswith(":0"):
        host, _ = parse_address(address[:-1] + "1", name=name)
        return host, 0
    url = Url.parse(f"tcp://{address}")
    if len(url.hosts) != 1 or url.hosts[0][1] is None or url.path or url.options:
        raise ConfigError(f"{name}: {address!r} is not host:port")
    return url.hosts[0][0], url.hosts[0][1]


def keep_alive(sock: Any) -> None:
    """Send at once, and notice within about 12 s a peer that vanished without a word (power, cable)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _left(deadline: float, what: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError(f"{what} did not answer in time")
    return left


def receive_exactly(sock: socket.socket, n: int, deadline: float, what: str) -> bytes:
    """Exactly `n` bytes; raises `DeadlineError`, or `TransportError` where `what` closes the stream before."""
    raw = b""
    while len(raw) < n:
        sock.settimeout(_left(deadline, what))
        part = sock.recv(n - len(raw))
        if not part:
            raise TransportError(
                f"{what} turned a stream away: another version, a ticket or secret that it does not know"
            )
        raw += part
    return raw
