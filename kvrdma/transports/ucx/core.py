"""What the endpoints of one ucx transport share: the loop, UCX's context, and the registrations."""

from __future__ import annotations

import ctypes
import logging
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from kvrdma.errors import CapacityError, ClosedError, TransportError
from kvrdma.memory import Memory
from kvrdma.transports.base import MemoryRegion, check_open
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.regions import RegionTable
from kvrdma.transports.ucx.control import ControlStream
from kvrdma.transports.ucx.endpoint import Landing, UcxEndpoint
from kvrdma.transports.ucx.library import load_library
from kvrdma.transports.ucx.settings import NO_PORT, Lanes, rdma_ports, variables
from kvrdma.transports.ucx.wire import PROBE_NBYTES, Frame, Hello
from kvrdma.transports.ucx.worker import Context, Worker

logger = logging.getLogger(__name__)

_MAX_PROBES: Final = 64


@dataclass(frozen=True, slots=True)
class Registration:
    """UCX's handle of registered memory, and what a peer needs to reach it."""

    memh: int
    packed: bytes


class Core:
    """Made by the transport, and closed by it.

    Raises:
        TransportError: UCX cannot be used, or has no device for these lanes.
    """

    def __init__(self, lanes: Lanes, device: str) -> None:
        if lanes is Lanes.RDMA and not rdma_ports():
            raise TransportError(NO_PORT)
        library = load_library()
        self.lanes = lanes
        self.variables = variables(lanes, library.version, device)
        self.context = Context(library, self.variables)
        self.table = RegionTable("ucx", on_revoked=self._recall)
        self._registrations: dict[int, Registration] = {}
        self._guard = threading.Lock()  # of UCX's context, which must not be closed under a registration
        self._closed = False
        self._probe = (ctypes.c_uint8 * PROBE_NBYTES)(*secrets.token_bytes(PROBE_NBYTES))
        self._landing = (ctypes.c_char * (PROBE_NBYTES * _MAX_PROBES))()
        self._probe_region, self._landing_region = (
            self.register(Memory(ctypes.addressof(buffer), ctypes.sizeof(buffer), keepalive=buffer))
            for buffer in (self._probe, self._landing)
        )
        self._landing_places: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(_MAX_PROBES):
            self._landing_places.put(i * PROBE_NBYTES)
        self._endpoints: dict[UcxEndpoint, ControlStream] = {}
        self._active: set[UcxEndpoint] = set()
        self._unconnected: set[Worker] = set()
        self.loop = IoLoop("kvrdma-ucx")
        self.loop.poll_with(self._poll)

    # -- registrations, on any thread

    def register(self, memory: Memory) -> MemoryRegion:
        """Register memory; raises `TransportError` where the host refuses."""
        with self._guard:
            check_open(self._closed, "ucx transport")
            memh = self.context.register(memory)
            try:
                registration = Registration(memh, self.context.pack(memh))
            except BaseException:
                self.context.deregister(memh)
                raise
            region = self.table.register(memory)
            self._registrations[region.handle] = registration
        return region

    def deregister(self, region: MemoryRegion) -> None:
        """Revoke every export, wait until peers have let go of them, and undo `register`."""
        self.table.deregister(region)
        with self._guard:
            registration = self._registrations.pop(region.handle, None)
            if registration is not None:
                self.context.deregister(registration.memh)

    def registration(self, region: MemoryRegion) -> Registration:
        """UCX's side of a region; raises `ClosedError` once the transport is closed."""
        found = self._registrations.get(region.handle)
        if found is None:
            raise ClosedError("ucx transport: closed")
        return found

    def _recall(self, number: int) -> None:
        """Have every peer let go of an export, or end its connection; on the loop's own thread without waiting."""
        waits: list[threading.Event] = []

        def ask() -> None:
            waits.extend(over for endpoint in list(self._endpoints) if (over := endpoint.recall(number)) is not None)

        self.loop.run(ask)
        if not self.loop.inside():
            for over in waits:
                over.wait()

    # -- connections

    def make_worker(self) -> Worker:
        """A worker for a connection to come; raises `ClosedError` once the transport is closed."""
        made: list[Worker] = []

        def make() -> None:
            if not self._closed:
                made.append(Worker(self.context))
                self._unconnected.add(made[0])

        self.loop.run(make)
        if not made:
            raise ClosedError("ucx transport: closed")
        return made[0]

    def give_up(self, worker: Worker) -> None:
        """Give back a worker that did not come to a connection."""

        def destroy() -> None:
            if worker in self._unconnected:
                self._unconnected.discard(worker)
                worker.destroy()

        self.loop.run(destroy)

    def hello(self, worker: Worker) -> Hello:
        """What a peer needs to connect to a worker of ours, and to try it."""
        region = self._probe_region
        return Hello(worker.address(), region.memory.address, self.registration(region).packed, bytes(self._probe))

    @contextmanager
    def landing_place(self) -> Iterator[Landing]:
        """Where a peer's probe is read into; nothing may be under way to it at the end. Raises `CapacityError`."""
        try:
            offset = self._landing_places.get_nowait()
        except queue.Empty:
            raise CapacityError(f"ucx: {_MAX_PROBES} connections are being made already") from None
        try:
            region = self._landing_region
            yield Landing(region.memory.address + offset, self.registration(region).memh)
        finally:
            self._landing_places.put(offset)

    # -- endpoints, on the loop's thread

    def adopt(self, worker: Worker, theirs: Hello, sock: socket.socket, *, peer: str, ticket: bytes) -> UcxEndpoint:
        """Connect a worker and serve its endpoint.

        Raises:
            TransportError: UCX cannot connect to what the peer said.
            ClosedError: the transport is closed.
        """
        if worker not in self._unconnected:
            raise ClosedError("ucx transport: closed")
        worker.connect(theirs.worker)
        self._unconnected.discard(worker)
        endpoint = UcxEndpoint(self, worker, peer=peer, ticket=ticket)
        stream = ControlStream(sock, self.loop, on_frame=endpoint.on_frame, on_broken=endpoint.on_broken)
        self._endpoints[endpoint] = stream
        endpoint.watch()
        self.wake(endpoint)
        return endpoint

    def drop(self, endpoint: UcxEndpoint) -> None:
        """Serve it no longer."""
        self._active.discard(endpoint)
        stream = self._endpoints.pop(endpoint, None)
        if stream is not None:
            stream.close()

    def send(self, endpoint: UcxEndpoint, frame: Frame) -> None:
        """Say something to an endpoint's peer."""
        stream = self._endpoints.get(endpoint)
        if stream is not None:
            stream.send(frame)

    def wake(self, endpoint: UcxEndpoint) -> None:
        """Give an endpoint turns until it has nothing to do."""
        if endpoint in self._endpoints:
            self._active.add(endpoint)

    def _poll(self) -> bool:
        for endpoint in list(self._active):
            if not endpoint.turn():
                self._active.discard(endpoint)
        return bool(self._active)

    def close(self) -> None:
        """End the endpoints and the loop, and give everything back to UCX."""

        def end() -> None:
            self._closed = True
            for endpoint in list(self._endpoints):
                endpoint.tear_down(ClosedError("ucx transport: closed"))
            for worker in self._unconnected:
                worker.destroy()
            self._unconnected.clear()

        self.loop.run(end)
        self.loop.close()
        with self._guard:
            for registration in self._registrations.values():
                self.context.deregister(registration.memh)
            self._registrations.clear()
            self.context.close()
