"""An endpoint of the tcp transport without a thread: its loop is turned by the test, its peer is a socket."""

from __future__ import annotations

import socket
from collections.abc import Callable

import numpy as np

from kvrdma.memory import Memory
from kvrdma.transports import Rights
from kvrdma.transports.loop import READABLE, WRITABLE, Timer
from kvrdma.transports.regions import RegionTable
from kvrdma.transports.tcp.endpoint import TcpEndpoint

GUARD = 4096
NBYTES = 4096


class HandLoop:
    """An `IoLoop` without a thread: calls run at once, sockets are served when the test says so."""

    def __init__(self) -> None:
        self.handlers: dict[int, tuple[int, Callable[[int], None]]] = {}

    def inside(self) -> bool:
        return True

    def call_soon(self, call: Callable[[], None]) -> None:
        call()

    run = call_soon

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        return Timer(call, lambda: None)

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        self.handlers[fd] = (events, handler)

    def forget(self, fd: int) -> None:
        self.handlers.pop(fd, None)

    def turn(self) -> None:
        for events, handler in list(self.handlers.values()):
            handler(events & (READABLE | WRITABLE))


class Bench:
    """An endpoint, the other end of its socket, and memory between two guards that nobody may write."""

    def __init__(self) -> None:
        self.table = RegionTable("tcp")
        self.whole = np.full(2 * GUARD + 2 * NBYTES, 0xEE, dtype=np.uint8)
        self.exported = self.whole[GUARD : GUARD + NBYTES]
        self.target = self.whole[GUARD + NBYTES : GUARD + 2 * NBYTES]
        self.region = self.table.register(Memory.of(self.exported))
        self.local = self.table.register(Memory.of(self.target))
        self.tokens = {
            rights: self.table.export(self.region, rights).token
            for rights in (Rights.READ, Rights.WRITE, Rights.READ | Rights.WRITE)
        }

    def connect(self) -> tuple[TcpEndpoint, HandLoop, socket.socket]:
        here, there = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        loop = HandLoop()
        return TcpEndpoint([here], loop, self.table, peer="peer", ticket=b""), loop, there  # type: ignore[arg-type]

    def guarded(self) -> bool:
        return bool((self.whole[:GUARD] == 0xEE).all() and (self.whole[-GUARD:] == 0xEE).all())
