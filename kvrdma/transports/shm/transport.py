"""`ShmTransport`: connects and listens on abstract Unix sockets, between processes of one user on one host."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final

from kvrdma.auth import Role
from kvrdma.errors import (
    AuthenticationError,
    CapacityError,
    ClosedError,
    ConfigError,
    DeadlineError,
    TransportError,
)
from kvrdma.memory import Memory
from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    RemoteRegion,
    Rights,
    SecretOf,
    Transport,
)
from kvrdma.transports.listeners import Guest, SocketListener
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.parts import OpenParts
from kvrdma.transports.regions import RegionTable
from kvrdma.transports.shm import wire
from kvrdma.transports.shm.copying import CopyThreads, default_threads
from kvrdma.transports.shm.endpoint import ShmEndpoint
from kvrdma.transports.shm.keys import LiveKeys
from kvrdma.transports.shm.mapping import check_shareable

logger = logging.getLogger(__name__)

_BACKLOG: Final = 128
_RETRY_S: Final = 0.005
_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}")
_CREDENTIALS = struct.Struct("3i")


class ShmTransport(Transport):
    """One I/O thread serves every endpoint, and `threads` copy (by default one for four CPUs, four at most).

    Local memory may be any; only memory with a descriptor (a slab of ours) can be exported.

    Raises:
        ConfigError: no thread at all.
    """

    scheme: ClassVar[str] = "shm"
    same_host: ClassVar[bool] = True

    def __init__(self, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ConfigError(f"shm: threads must be at least 1, not {threads}")
        self._keys = LiveKeys()
        self._table = RegionTable(self.scheme, on_revoked=self._keys.end)
        self._loop = IoLoop("kvrdma-shm")
        self._threads = CopyThreads(threads or default_threads())
        self._parts: OpenParts[Endpoint] = OpenParts(self.scheme)

    @classmethod
    def usable(cls) -> str | None:
        """Why it cannot be used here, or None."""
        if not sys.platform.startswith("linux"):
            return "only on Linux"
        return None if Path("/proc/self/fd").exists() else "/proc is not mounted"

    @classmethod
    def can_reach(cls, address: str) -> bool:
        """Whether the listener is on this host and in this network namespace."""
        return address.partition("/")[0] == this_host()

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable."""
        if memory.device != "cpu":
            raise ConfigError(f"shm: memory on {memory.device} cannot be registered, only CPU memory")
        return self._table.register(memory)

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports."""
        self._table.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region.

        Raises:
            RegionError: the memory has no descriptor, or one that is not sealed against shrinking.
            CapacityError: 8,192 keys are exported already.
        """
        self._table.check([region])
        check_shareable(region.memory)
        remote = self._table.export(region, rights)
        export = self._table.find(remote.token)
        assert export is not None
        try:
            self._keys.add(export.number)
        except CapacityError:
            self._table.revoke(remote)
            raise
        return remote

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back: no copy by it counts any more. One that writes may still be in the middle of it."""
        self._table.revoke(remote)

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener of this host."""
        self._parts.check()
        if len(ticket) > wire.MAX_TICKET:
            raise ConfigError(f"shm: a ticket has at most {wire.MAX_TICKET} bytes, not {len(ticket)}")
        deadline = time.monotonic() + timeout
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _connect(sock, parse_address(address), deadline, address)
            check_user(sock, address)
            greeting = wire.Greeting(ticket)
            challenge = wire.decode_challenge(_exchange(sock, greeting.encode(), deadline, address))
            proof = _exchange(sock, greeting.prove(Role.CLIENT, secret, challenge), deadline, address)
            if not greeting.check(proof, Role.SERVER, secret, challenge):
                raise AuthenticationError(f"shm: {address} did not prove that it knows the secret of this ticket")
            return self._adopt(sock, peer=address, ticket=ticket)
        except BaseException as error:
            sock.close()
            if isinstance(error, TimeoutError):
                raise DeadlineError(f"shm: {address} did not answer within {timeout} s") from None
            if isinstance(error, OSError):
                raise TransportError(f"shm: cannot reach {address}: {error.strerror or error}") from error
            raise

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener under a name; an empty one picks a free one."""
        self._parts.check()
        name = parse_address(address) if address else f"kvrdma-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.bind(_abstract(name))
            sock.listen(_BACKLOG)
            listener = ShmListener(sock, name, self._loop, self._adopt, secret_of)
        except OSError as error:
            sock.close()
            raise TransportError(f"shm: cannot listen on {address}: {error.strerror or error}") from error
        except ClosedError:
            sock.close()
            raise
        return self._parts.add_listener(listener)

    def close(self) -> None:
        """Abort every endpoint, and end the threads."""
        if not self._parts.close():
            return
        self._loop.close()
        self._threads.close()
        self._keys.close()

    def _adopt(self, sock: socket.socket, *, peer: str, ticket: bytes) -> Endpoint:
        sock.setblocking(False)
        endpoint = ShmEndpoint(sock, self._loop, self._threads, self._table, self._keys, peer=peer, ticket=ticket)
        return self._parts.add_endpoint(endpoint)


class ShmListener(SocketListener[Guest]):
    """Accepts processes of our own user that prove themselves."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        loop: IoLoop,
        adopt: Callable[..., Endpoint],
        secret_of: SecretOf | None,
    ) -> None:
        self._adopt = adopt
        self._numbers = itertools.count(1)
        super().__init__("shm", sock, f"{this_host()}/{name}", loop, secret_of)

    def _welcome(self, sock: socket.socket, address: Any) -> Guest:
        pid = check_user(sock, "a peer")
        return Guest(sock, f"process {pid} ({next(self._numbers)})")

    def _encode_challenge(self, challenge: bytes) -> bytes:
        return wire.encode_challenge(challenge)

    def _hear(self, guest: Guest) -> None:
        """Read a greeting and answer with a challenge; then read the proof."""
        packet = guest.sock.recv(wire.MAX_PACKET)
        if not packet:
            raise TransportError("closed before it had proved itself")
        if guest.greeting is None:
            self._challenge(guest, wire.Greeting.decode(packet))
            return
        if not guest.greeting.check(packet, Role.CLIENT, guest.secret, guest.challenge):
            raise AuthenticationError("its proof does not hold")
        self._loop.forget(guest.sock.fileno())
        self._admit(guest, guest.greeting)

    def _admit(self, guest: Guest, greeting: wire.Greeting) -> None:
        self._strike(guest)
        try:
            endpoint = self._adopt(guest.sock, peer=guest.peer, ticket=greeting.ticket)
        except ClosedError as error:
            logger.debug("shm listener %s: %s: %s", self._contact, guest.peer, error)
            guest.sock.close()
            return
        # Our proof goes last: once `connect` has returned, this end is known to whoever waits for it here.
        self.deliver(endpoint)
        try:
            guest.sock.send(greeting.prove(Role.SERVER, guest.secret, guest.challenge))
        except OSError as error:
            logger.debug("shm listener %s: %s left before it was answered: %s", self._contact, guest.peer, error)
            endpoint.abort()


@functools.cache
def this_host() -> str:
    """What two processes have in common that can reach each other: the running kernel, and its network namespace."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text().strip()}.{network.stat().st_ino}"
    except OSError:
        return f"unknown-{socket.gethostname()}"


def parse_address(address: str) -> str:
    """The name of a listener of this host: of an address that `contact_address` gave, or a name alone.

    Raises:
        ConfigError: it is neither.
        TransportError: it is one of another host, or of another network namespace of this one.
    """
    host, slash, name = address.rpartition("/")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"shm: {address!r} is no address; a name of letters, digits and ._- is expected")
    if slash and host != this_host():
        raise TransportError(f"shm: {address} is on another host, or in another network namespace of this one")
    return name


def check_user(sock: socket.socket, peer: str) -> int:
    """The peer's process id; raises `TransportError` where it is neither of our own user nor root."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid not in (0, os.geteuid()):
        raise TransportError(
            f"shm: {peer} belongs to user {uid}, this process to user {os.geteuid()}: "
            "only processes of one user, or root, share memory"
        )
    return int(pid)


def _abstract(name: str) -> str:
    return f"\0{name}"


def _connect(sock: socket.socket, name: str, deadline: float, address: str) -> None:
    while True:
        sock.settimeout(_left(deadline, address))
        try:
            sock.connect(_abstract(name))
        except BlockingIOError:  # so many connect at this moment; a Unix socket does not wait by itself
            time.sleep(_RETRY_S)
        else:
            return


def _left(deadline: float, address: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError(f"shm: {address} did not answer in time")
    return left


def _exchange(sock: socket.socket, said: bytes, deadline: float, address: str) -> bytes:
    sock.settimeout(_left(deadline, address))
    answer = b""
    with contextlib.suppress(ConnectionError):  # closed before it had read what we say
        sock.sendall(said)
        answer = sock.recv(wire.MAX_PACKET)
    if not answer:
        raise TransportError(
            f"shm: {address} turned us away: another user, another version, a ticket or secret that it does not know"
        )
    return answer
