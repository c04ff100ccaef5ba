"""A rail: one port of an open device, and what is registered with it. Everything that is made here is counted."""

from __future__ import annotations

import errno
import logging
import resource
import threading
from collections import Counter
from typing import Final

from kvrdma.errors import CapacityError, ConfigError, KVRDMAError, TransportError
from kvrdma.memory import Memory
from kvrdma.transports.base import MemoryRegion, Rights
from kvrdma.transports.regions import Export
from kvrdma.transports.verbs.binding import Access, Binding, Device, Pair, PortLimits, Queue, Region
from kvrdma.transports.verbs.devices import Pick

logger = logging.getLogger(__name__)

counts: Final[Counter[str]] = Counter()
"""How many objects of each kind this process has made and not yet destroyed."""

_MTU_NBYTES: Final = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}


class Rail:
    """An open device, the port that is used, and the registrations of a transport's regions and exports.

    Regions are registered for our own use with the right to write to them here, and once more for each export, with
    the rights that it grants and no others: so the device itself holds peers to them, and a revoked key is gone there.

    Raises:
        TransportError: the device does not open.
    """

    def __init__(self, binding: Binding, pick: Pick) -> None:
        self.pick = pick
        try:
            self.device: Device = binding.open(pick.port.device)
        except OSError as error:
            raise TransportError(
                f"verbs: {pick.port.device} cannot be opened: {error.strerror or error} "
                "(in a container, it needs /dev/infiniband)"
            ) from error
        counts["devices"] += 1
        try:
            self.limits: PortLimits = self.device.port(pick.port.number)
        except OSError as error:
            self._close_device()
            raise TransportError(f"verbs: {pick.port} does not say what it can do: {error}") from error
        self._guard = threading.Lock()
        self._local: dict[int, Region] = {}
        self._exported: dict[int, Region] = {}
        logger.info(
            "verbs: %s opened by %s, MTU %d", pick.port, binding.name, _MTU_NBYTES.get(self.limits.active_mtu, 0)
        )

    @property
    def gid(self) -> bytes:
        """Ours, or zeros where the port has none."""
        return bytes(16) if self.pick.gid is None else self.pick.gid.raw

    # -- memory

    def register(self, region: MemoryRegion) -> None:
        """Register a region for our own use."""
        made = self._register(region.memory, Access.LOCAL_WRITE)
        with self._guard:
            self._local[region.handle] = made

    def deregister(self, region: MemoryRegion) -> None:
        """Undo it."""
        with self._guard:
            made = self._local.pop(region.handle, None)
        self._deregister(made)

    def lkey(self, region: MemoryRegion) -> int:
        """The key for our own use of a region."""
        return self._local[region.handle].lkey

    def export(self, export: Export) -> None:
        """Register a region for what an export grants."""
        access = Access(0)
        if Rights.READ in export.rights:
            access |= Access.REMOTE_READ
        if Rights.WRITE in export.rights:
            access |= Access.REMOTE_WRITE | Access.LOCAL_WRITE  # verbs grants the one only with the other
        made = self._register(export.region.memory, access)
        with self._guard:
            self._exported[export.number] = made

    def revoke(self, number: int) -> None:
        """Undo it: requests that arrive later fail."""
        with self._guard:
            made = self._exported.pop(number, None)
        self._deregister(made)

    def rkey(self, number: int) -> int | None:
        """The key of an export; None where it was revoked."""
        made = self._exported.get(number)
        return None if made is None else made.rkey

    def _register(self, memory: Memory, access: Access) -> Region:
        try:
            if memory.device == "cpu":
                made = self.device.register(memory.address, memory.nbytes, access)
            elif memory.fd is None:
                raise ConfigError(f"verbs: memory on {memory.device} needs its dmabuf to be registered")
            else:
                made = self.device.register_dmabuf(memory.fd, 0, memory.nbytes, memory.address, access)
        except OSError as error:
            raise _explain(error, memory, self.pick.port.device) from error
        counts["regions"] += 1
        return made

    def _deregister(self, made: Region | None) -> None:
        if made is not None:
            made.close()
            counts["regions"] -= 1

    # -- queues

    def make_queue(self, depth: int) -> Queue:
        """A completion queue."""
        try:
            made = self.device.make_queue(depth)
        except OSError as error:
            raise CapacityError(f"verbs: {self.pick.port.device} gives no completion queue more: {error}") from error
        counts["queues"] += 1
        return made

    def make_pair(self, queue: Queue, depth: int, chain: int) -> Pair:
        """A queue pair."""
        try:
            made = queue.make_pair(depth, chain)
        except OSError as error:
            raise CapacityError(
                f"verbs: {self.pick.port.device} gives no queue pair more, of {self.device.limits.max_pairs} that it "
                f"has: {error}"
            ) from error
        counts["pairs"] += 1
        return made

    def close_queue(self, queue: Queue) -> None:
        """Destroy a completion queue."""
        queue.close()
        counts["queues"] -= 1

    def close_pair(self, pair: Pair) -> None:
        """Destroy a queue pair."""
        pair.close()
        counts["pairs"] -= 1

    def close(self) -> None:
        """Deregister all and close the device; its queues and pairs must be gone."""
        with self._guard:
            made = [*self._local.values(), *self._exported.values()]
            self._local.clear()
            self._exported.clear()
        for each in made:
            self._deregister(each)
        self._close_device()

    def _close_device(self) -> None:
        self.device.close()
        counts["devices"] -= 1


def _explain(error: OSError, memory: Memory, device: str) -> KVRDMAError:
    what = f"verbs: {device} does not register {memory.nbytes} bytes"
    if error.errno in {errno.ENOMEM, errno.EAGAIN}:
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit != resource.RLIM_INFINITY:
            return CapacityError(
                f"{what}: this process may lock {limit} bytes (ulimit -l), and what is exported counts twice; raise it "
                "(LimitMEMLOCK=infinity in systemd, --ulimit memlock=-1 in docker)"
            )
    if error.errno in {errno.EOPNOTSUPP, errno.ENOTSUP} and memory.device != "cpu":
        return ConfigError(f"{what} of {memory.device}: it knows no dmabuf (kernel 5.12 and a driver that has it)")
    return CapacityError(f"{what}: {error.strerror or error}")
