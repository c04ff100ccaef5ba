"""What a transport has registered and exported, on every rail that it has opened."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvrdma.errors import ClosedError
from kvrdma.memory import Memory
from kvrdma.transports.base import MemoryRegion, RemoteRegion, Rights
from kvrdma.transports.regions import Export, RangeStatus, RegionTable
from kvrdma.transports.verbs.binding import Binding
from kvrdma.transports.verbs.devices import Pick
from kvrdma.transports.verbs.exchange import Grant
from kvrdma.transports.verbs.rail import Rail


class Registrations:
    """Regions and exports, the same on each rail: one that is opened later gets what there is already. Thread-safe.

    Nothing stays behind where a rail refuses. `on_revoked` is told the number of a key that ended.
    """

    def __init__(self, on_revoked: Callable[[int], None]) -> None:
        self._on_revoked = on_revoked
        self.table = RegionTable("verbs", on_revoked=self._revoked)
        self._guard = threading.RLock()
        self._rails: dict[tuple[str, int, int], Rail] = {}
        self._regions: dict[int, MemoryRegion] = {}
        self._exports: dict[int, Export] = {}
        self._closed = False

    def rail(self, binding: Binding, pick: Pick) -> Rail:
        """The rail of a port, opened at its first use."""
        name = (pick.port.device, pick.port.number, -1 if pick.gid is None else pick.gid.index)
        with self._guard:
            if self._closed:
                raise ClosedError("verbs transport: closed")
            if name not in self._rails:
                rail = Rail(binding, pick)
                try:
                    for region in self._regions.values():
                        rail.register(region)
                    for export in self._exports.values():
                        rail.export(export)
                except BaseException:
                    rail.close()
                    raise
                self._rails[name] = rail
            return self._rails[name]

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable on every rail."""
        with self._guard:
            region = self.table.register(memory)
            try:
                for rail in self._rails.values():
                    rail.register(region)
            except BaseException:
                self._forget(region)
                raise
            self._regions[region.handle] = region
        return region

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and its exports."""
        with self._guard:
            self._forget(region)

    def _forget(self, region: MemoryRegion) -> None:
        self.table.deregister(region)
        self._regions.pop(region.handle, None)
        for rail in self._rails.values():
            rail.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region on every rail."""
        with self._guard:
            remote = self.table.export(region, rights)
            export = self.table.find(remote.token)
            assert export is not None
            try:
                for rail in self._rails.values():
                    rail.export(export)
            except BaseException:
                self.table.revoke(remote)
                raise
            self._exports[export.number] = export
        return remote

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        self.table.revoke(remote)

    def _revoked(self, number: int) -> None:
        with self._guard:
            self._exports.pop(number, None)
            for rail in self._rails.values():
                rail.revoke(number)
        self._on_revoked(number)

    def grant(self, token: bytes, rail: Rail) -> tuple[Grant, int]:
        """The answer to a peer that asks for a token on a rail, and the export's number."""
        export = self.table.find(token)
        rkey = None if export is None else rail.rkey(export.number)
        if export is None or rkey is None:
            return Grant(token, RangeStatus.BAD_KEY), 0
        memory = export.region.memory
        return Grant(token, RangeStatus.OK, export.rights, memory.address, memory.nbytes, rkey), export.number

    def close(self) -> None:
        """Deregister all and close the rails."""
        with self._guard:
            self._closed = True
            rails, self._rails = list(self._rails.values()), {}
        for rail in rails:
            rail.close()
