"""`TcpTransport`: connects and listens. Each stream proves itself, and finds those of its endpoint by greeting."""

from __future__ import annotations

import socket
from typing import ClassVar, Final

from kvrdma.errors import ConfigError
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
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.parts import OpenParts
from kvrdma.transports.regions import RegionTable
from kvrdma.transports.tcp import wire
from kvrdma.transports.tcp.endpoint import TcpEndpoint
from kvrdma.transports.tcp.session import keep_alive, open_listener, open_streams

_LOCAL_SNDBUF_NBYTES: Final = 512 << 10


class TcpTransport(Transport):
    """One I/O thread serves every endpoint; `streams` connections make one endpoint.

    Raises:
        ConfigError: a number of streams outside 1..64.
    """

    scheme: ClassVar[str] = "tcp"

    def __init__(self, *, streams: int = 1) -> None:
        if not 1 <= streams <= wire.MAX_STREAMS:
            raise ConfigError(f"tcp: streams must lie in 1..{wire.MAX_STREAMS}, not {streams}")
        self._n_streams = streams
        self._table = RegionTable(self.scheme)
        self._loop = IoLoop("kvrdma-tcp")
        self._parts: OpenParts[Endpoint] = OpenParts(self.scheme)

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable."""
        if memory.device != "cpu":
            raise ConfigError(f"tcp: memory on {memory.device} cannot be registered, only CPU memory")
        return self._table.register(memory)

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports. A request that is being served keeps the memory until it ends."""
        self._table.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region."""
        return self._table.export(region, rights)

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        self._table.revoke(remote)

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Open every stream of a new endpoint."""
        self._parts.check()
        socks = open_streams(address, self._n_streams, timeout=timeout, ticket=ticket, secret=secret)
        try:
            return self._adopt(socks, peer=address, ticket=ticket)
        except BaseException:
            for sock in socks:
                sock.close()
            raise

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener on host:port; port 0 picks a free one."""
        self._parts.check()
        listener = open_listener(address, self._loop, self._adopt, secret_of)
        return self._parts.add_listener(listener)

    def close(self) -> None:
        """Abort every endpoint and end the I/O thread."""
        if not self._parts.close():
            return
        self._loop.close()

    def _adopt(self, socks: list[socket.socket], *, peer: str, ticket: bytes) -> Endpoint:
        for sock in socks:
            _tune(sock)
        endpoint = TcpEndpoint(socks, self._loop, self._table, peer=peer, ticket=ticket)
        return self._parts.add_endpoint(endpoint)


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.getpeername()[0] == sock.getsockname()[0]:
        # Within one host a long queue only cools the CPU's cache: each byte is copied out soon after it is
        # copied in, or from main memory (measured: a fifth of the rate). A real network needs the kernel's tuning.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_SNDBUF_NBYTES)
    keep_alive(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12_000)
