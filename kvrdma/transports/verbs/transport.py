"""`VerbsTransport`: connects and listens by TCP, and moves bytes by the RDMA device that lies on the way."""

from __future__ import annotations

import socket
import time
from typing import ClassVar

from kvrdma.errors import ClosedError, ConfigError, KVRDMAError
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
from kvrdma.transports.tcp import keep_alive
from kvrdma.transports.tcp.session import open_listener, open_streams
from kvrdma.transports.verbs.binding import Binding, load_binding
from kvrdma.transports.verbs.devices import list_ports, pick_port
from kvrdma.transports.verbs.endpoint import VerbsEndpoint
from kvrdma.transports.verbs.exchange import VERBS
from kvrdma.transports.verbs.rail import Rail
from kvrdma.transports.verbs.registrations import Registrations


class VerbsTransport(Transport):
    """RDMA READ and WRITE of libibverbs, on RoCE v2 and InfiniBand. One I/O thread serves every endpoint.

    `device` names the port to use: a device (`mlx5_0`), a port of it (`mlx5_0:1`), or a network (`10.1.0.0/16`) that
    its GID is in; else it is the one on the route to the peer. `binding` is `pyverbs` or `ibverbs`, else the first
    that works.

    Raises:
        ConfigError: no binding to libibverbs, or no such device.
    """

    scheme: ClassVar[str] = "verbs"
    by_name_only: ClassVar[bool] = True  # until the faults of links and peers are tests in the guest
    enforces_rights: ClassVar[bool] = True

    def __init__(self, *, device: str = "", binding: str = "") -> None:
        self._binding: Binding = load_binding(binding)
        self._wanted = device
        self._registrations = Registrations(self._on_revoked)
        self._parts: OpenParts[VerbsEndpoint] = OpenParts(self.scheme)
        if device:
            self._rail("")
        self._loop = IoLoop("kvrdma-verbs")

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable; memory of a GPU by its dmabuf."""
        return self._registrations.register(memory)

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports."""
        self._registrations.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region. The device holds peers to the rights."""
        return self._registrations.export(region, rights)

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        self._registrations.revoke(remote)

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener, and connect a queue pair to one of its."""
        self._parts.check()
        deadline = time.monotonic() + timeout
        socks = open_streams(address, 1, timeout=timeout, ticket=ticket, secret=secret, dialect=VERBS)
        try:
            endpoint = self._adopt(socks, peer=address, ticket=ticket)
        except BaseException:
            socks[0].close()
            raise
        endpoint.wait_open(max(0.0, deadline - time.monotonic()))
        return endpoint

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener on host:port; port 0 picks a free one."""
        self._parts.check()
        listener = open_listener(address, self._loop, self._adopt_guest, secret_of, VERBS)
        return self._parts.add_listener(listener)

    def close(self) -> None:
        """Abort every endpoint, end the I/O thread, deregister all memory and close the devices."""
        if not self._parts.close():
            return
        self._loop.close()
        self._parts.abort_endpoints()
        self._registrations.close()

    @classmethod
    def usable(cls) -> str | None:
        """Why there is no RDMA here, or None."""
        try:
            load_binding()
        except ConfigError as error:
            return str(error)
        ports = list_ports()
        if not ports:
            return "this host has no RDMA device (/sys/class/infiniband is empty)"
        refused = [port.why_not() for port in ports]
        return None if None in refused else "; ".join(why for why in refused if why)

    def _rail(self, local_address: str) -> Rail:
        pick = pick_port(list_ports(), wanted=self._wanted, local_address=local_address)
        return self._registrations.rail(self._binding, pick)

    def _adopt(self, socks: list[socket.socket], *, peer: str, ticket: bytes) -> VerbsEndpoint:
        (sock,) = socks
        rail = self._rail(sock.getsockname()[0])
        sock.setblocking(False)
        keep_alive(sock)
        endpoint = VerbsEndpoint(sock, self._loop, rail, self._registrations, peer=peer, ticket=ticket)
        return self._parts.add_endpoint(endpoint)

    def _adopt_guest(self, socks: list[socket.socket], *, peer: str, ticket: bytes) -> Endpoint:
        """The same for a listener, which lets go of a guest at these errors."""
        try:
            return self._adopt(socks, peer=peer, ticket=ticket)
        except KVRDMAError as error:
            raise ClosedError(f"verbs: {error}") from error

    def _on_revoked(self, number: int) -> None:
        for endpoint in self._parts.endpoints():
            endpoint.revoke(number)
