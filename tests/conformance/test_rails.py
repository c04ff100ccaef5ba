"""Rails pass the suite: over one transport, over two of one kind, and over two of different kinds."""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvrdma.memory import MemfdSlabs, Memory
from kvrdma.testing.transports import TransportSuite
from kvrdma.transports import Transport
from kvrdma.transports.rails import RailsTransport
from kvrdma.transports.shm import ShmTransport
from kvrdma.transports.shm.transport import this_host
from kvrdma.transports.tcp import TcpTransport


class TestTwoRails(TransportSuite):
    address: ClassVar[str] = "a=127.0.0.1:0|b=127.0.0.1:0"
    nowhere: ClassVar[str] = "a=127.0.0.1:1|b=127.0.0.1:1"

    def make_transport(self) -> Transport:
        return RailsTransport({"a": TcpTransport(), "b": TcpTransport()}, cool_down=0.2, grace=0.5)


class TestOneRail(TransportSuite):
    address: ClassVar[str] = "a=127.0.0.1:0"
    nowhere: ClassVar[str] = "a=127.0.0.1:1"

    def make_transport(self) -> Transport:
        return RailsTransport({"a": TcpTransport()}, cool_down=0.2, grace=0.5)


class TestSharedMemoryThenTcp(TransportSuite):
    address: ClassVar[str] = "shm=|tcp=127.0.0.1:0"
    nowhere: ClassVar[str] = f"shm={this_host()}/nobody|tcp=127.0.0.1:1"

    def make_transport(self) -> Transport:
        return RailsTransport({"shm": ShmTransport(threads=1), "tcp": TcpTransport()}, cool_down=0.2, grace=0.5)

    def make_array(self, nbytes: int) -> tuple[NDArray[np.uint8], Memory]:
        slab = MemfdSlabs(lock=False, huge=False).allocate(nbytes)
        memory = Memory(slab.address, nbytes, keepalive=slab.keepalive, fd=slab.fd)
        return memory.array(), memory
