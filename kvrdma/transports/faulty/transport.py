"""`FaultyTransport`: hands everything but posts to the transport inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from kvrdma.errors import RegionError
from kvrdma.memory import Memory
from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    RemoteRegion,
    Rights,
    SecretOf,
    TransferBatch,
    Transport,
)
from kvrdma.transports.faulty.endpoint import FaultyEndpoint
from kvrdma.transports.faulty.plan import FaultPlan
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.tcp import TcpTransport


class FaultyTransport(Transport):
    """Another transport (tcp by default), with the faults of a plan (none by default). Both ends need one."""

    scheme: ClassVar[str] = FaultyEndpoint.scheme
    by_name_only: ClassVar[bool] = True

    def __init__(self, inner: Transport | None = None, plan: FaultPlan | None = None) -> None:
        self.inner = TcpTransport() if inner is None else inner
        self.plan = FaultPlan.none() if plan is None else plan
        self.clock = IoLoop("kvrdma-faulty")
        self._regions: dict[int, MemoryRegion] = {}

    @classmethod
    def with_plan(cls, plan: FaultPlan, make_inner: Callable[[], Transport] = TcpTransport) -> type[FaultyTransport]:
        """A class with a plan of its own, for the registry, which makes transports without arguments."""

        class Planned(FaultyTransport):
            def __init__(self) -> None:
                super().__init__(make_inner(), plan)

        return Planned

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable."""
        region = self.inner.register(memory)
        self._regions[region.handle] = region
        return region

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports."""
        self._regions.pop(region.handle, None)
        self.inner.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region."""
        return replace(self.inner.export(region, rights), scheme=self.scheme)

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        self.inner.revoke(replace(remote, scheme=self.inner.scheme))

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener."""
        return FaultyEndpoint(self.inner.connect(address, timeout=timeout, ticket=ticket, secret=secret), self)

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener."""
        return FaultyListener(self.inner.listen(address, secret_of=secret_of), self)

    def close(self) -> None:
        """Abort every endpoint."""
        self.inner.close()
        self.clock.close()

    def inside(self, batch: TransferBatch) -> TransferBatch:
        """A batch as the inner transport takes it; raises `RegionError` where a region cannot be used here."""
        for region in batch.local:
            if self._regions.get(region.handle) is not region:
                raise RegionError(f"faulty: region {region.handle} is not registered with this transport")
        for remote in batch.remote:
            if remote.scheme != self.scheme:
                raise RegionError(f"faulty: a remote region of scheme {remote.scheme!r} cannot be used here")
        return replace(batch, remote=[replace(remote, scheme=self.inner.scheme) for remote in batch.remote])


class FaultyListener(Listener):
    """Wraps the endpoints of the inner listener."""

    def __init__(self, inner: Listener, transport: FaultyTransport) -> None:
        self._inner = inner
        self._transport = transport

    @property
    def contact_address(self) -> str:
        """What a peer gives to `connect`."""
        return self._inner.contact_address

    def accept(self, *, timeout: float) -> Endpoint:
        """Wait for the next peer."""
        return FaultyEndpoint(self._inner.accept(timeout=timeout), self._transport)

    def on_endpoint(self, callback: Callable[[Endpoint], None]) -> None:
        """Hand endpoints to a callback."""
        self._inner.on_endpoint(lambda endpoint: callback(FaultyEndpoint(endpoint, self._transport)))

    def close(self) -> None:
        """Accept no more."""
        self._inner.close()
