"""The tcp transport passes the suite, on one stream and on four."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import numpy as np

from kvrdma.auth import PROOF_NBYTES, Role, make_nonce
from kvrdma.errors import ClosedError
from kvrdma.memory import Memory
from kvrdma.testing.transports import PATIENCE_S, TransportSuite, column, make_batch
from kvrdma.transports import Opcode, Rights, TransferBatch, Transport
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
                        greeting = wire.Greeting.decode(sock.recv(wire.GREETING_NBYTES, socket.MSG_WAITALL))
                        challenge = make_nonce()
                        sock.sendall(wire.encode_challenge(challenge))
                        sock.recv(PROOF_NBYTES, socket.MSG_WAITALL)
                        sock.sendall(greeting.prove(Role.SERVER, b"", challenge))

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield f"127.0.0.1:{server.getsockname()[1]}"
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()
                for sock in socks:
                    sock.close()

    def test_what_was_not_sent_yet_ends_at_once(self) -> None:
        """Cancelled while it waits behind others; those that were sent end when their peer says so, or by abort."""
        n = 4096 * 4 * wire.MAX_DEPTH * 2  # more than four streams take
        zeros = np.zeros(n, dtype=np.int64)
        with self.silent_peer() as address, self.make_transport() as transport:
            endpoint = transport.connect(address, timeout=PATIENCE_S)
            region = transport.register(Memory.of(bytearray(8)))
            remote = transport.export(region, Rights.READ)
            many = TransferBatch(Opcode.READ, [region], [remote], zeros, zeros, zeros, zeros, zeros + 1)
            one = make_batch(Opcode.READ, region, remote, column(0), column(0), column(1))
            first, behind = endpoint.post(many), endpoint.post(one)
            behind.cancel()
            assert not behind.result(PATIENCE_S).any()
            assert isinstance(behind.error, ClosedError)
            first.cancel()
            endpoint.abort()
            assert first.done()
            assert not first.ok.any()


class TestTcpOnFourStreams(TestTcp):
    def make_transport(self) -> Transport:
        return TcpTransport(streams=4)
