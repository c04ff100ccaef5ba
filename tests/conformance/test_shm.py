"""The shm transport passes the suite, with one thread that copies and with three."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvrdma.auth import Role, make_nonce
from kvrdma.memory import MemfdSlabs, Memory
from kvrdma.testing.transports import TransportSuite
from kvrdma.transports import Transport
from kvrdma.transports.shm import ShmTransport, wire
from kvrdma.transports.shm.transport import this_host


class TestShm(TransportSuite):
    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = f"{this_host()}/nobody"

    def make_transport(self) -> Transport:
        return ShmTransport(threads=1)

    def make_array(self, nbytes: int) -> tuple[NDArray[np.uint8], Memory]:
        slab = MemfdSlabs(lock=False, huge=False).allocate(nbytes)
        memory = Memory(slab.address, nbytes, keepalive=slab.keepalive, fd=slab.fd)
        return memory.array(), memory

    @contextlib.contextmanager
    def silent_peer(self) -> Iterator[str]:
        """Greets, reads whatever comes, and answers nothing."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
            server.bind("\0kvrdma-silent")
            server.listen()
            socks: list[socket.socket] = []

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = server.accept()
                        socks.append(sock)
                        greeting = wire.Greeting.decode(sock.recv(wire.MAX_PACKET))
                        challenge = make_nonce()
                        sock.send(wire.encode_challenge(challenge))
                        sock.recv(wire.MAX_PACKET)
                        sock.send(greeting.prove(Role.SERVER, b"", challenge))

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield f"{this_host()}/kvrdma-silent"
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()
                for sock in socks:
                    sock.close()


class TestShmOnThreeThreads(TestShm):
    def make_transport(self) -> Transport:
        return ShmTransport(threads=3)
