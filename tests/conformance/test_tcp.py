"""The tcp transport passes the suite, on one stream and on four."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from kvrdma.testing.transports import TransportSuite
from kvrdma.transports import Transport
from kvrdma.transports.tcp import TcpTransport, wire


class TestTcp(TransportSuite):
    def make_transport(self) -> Transport:
        return TcpTransport()

    @contextlib.contextmanager
    def silent_peer(self) -> Iterator[str]:
        """Greets, reads whatever comes, and answers nothing."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            socks: list[socket.socket] = []

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = server.accept()
                        socks.append(sock)
                        sock.recv(wire.GREETING_NBYTES, socket.MSG_WAITALL)
                        sock.sendall(wire.answer())

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield f"127.0.0.1:{server.getsockname()[1]}"
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()
                for sock in socks:
                    sock.close()


class TestTcpOnFourStreams(TestTcp):
    def make_transport(self) -> Transport:
        return TcpTransport(streams=4)
