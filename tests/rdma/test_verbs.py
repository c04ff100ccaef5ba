"""The verbs transport passes the suite on soft-RoCE, and keeps what RDMA alone has to promise."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from kvrdma.auth import PROOF_NBYTES, Role, make_nonce
from kvrdma.errors import DeadlineError
from kvrdma.memory import Memory
from kvrdma.testing.transports import PATIENCE_S, HeldLease, TransportSuite, column, make_batch
from kvrdma.transports import Opcode, Rights, Transport
from kvrdma.transports.regions import RangeStatus
from kvrdma.transports.tcp import wire
from kvrdma.transports.verbs import VerbsTransport, exchange
from kvrdma.transports.verbs.binding import PairAddress
from kvrdma.transports.verbs.endpoint import VerbsEndpoint
from kvrdma.transports.verbs.exchange import VERBS, Frame
from kvrdma.transports.verbs.rail import counts


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert {kind: n for kind, n in counts.items() if n} == {}


class TestVerbs(TransportSuite):
    nbytes = 1 << 18

    def make_transport(self) -> Transport:
        return VerbsTransport(device="rxe0")

    @contextlib.contextmanager
    def silent_peer(self) -> Iterator[str]:
        """Connects to a queue pair that is not there, grants whatever is asked for, and answers nothing."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            socks: list[socket.socket] = []
            threads: list[threading.Thread] = []

            def serve(sock: socket.socket) -> None:
                with contextlib.suppress(OSError):
                    greeting = wire.Greeting.decode(sock.recv(wire.GREETING_NBYTES, socket.MSG_WAITALL), VERBS)
                    challenge = make_nonce()
                    sock.sendall(wire.encode_challenge(challenge, VERBS))
                    sock.recv(PROOF_NBYTES, socket.MSG_WAITALL)
                    sock.sendall(greeting.prove(Role.SERVER, b"", challenge))
                    decoder = exchange.Decoder()
                    while data := sock.recv(4096):
                        for frame, body in decoder.feed(data):
                            if frame is Frame.PAIR:
                                there = exchange.decode_pair(body)
                                nobody = PairAddress(
                                    0xFFFFF0, 1, 0, there.gid, there.mtu, there.max_message_nbytes, there.max_reads
                                )
                                sock.sendall(exchange.encode_pair(nobody) + exchange.encode_note(Frame.READY))
                            elif frame is Frame.ASK:
                                grant = exchange.Grant(body, RangeStatus.OK, Rights.READ, 1 << 20, 1 << 20, 77)
                                sock.sendall(grant.encode())

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        sock, _ = server.accept()
                        socks.append(sock)
                        threads.append(threading.Thread(target=serve, args=(sock,)))
                        threads[-1].start()

            thread = threading.Thread(target=accept)
            thread.start()
            try:
                yield f"127.0.0.1:{server.getsockname()[1]}"
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                for each in threads:
                    each.join()
                for sock in socks:
                    sock.close()

    def test_cancel_without_an_answer_keeps_the_hold(self) -> None:
        """As in the suite, once the device has the request: what it has not got yet ends at once."""
        with self.silent_peer() as address, self.make_transport() as transport:
            endpoint = transport.connect(address, timeout=PATIENCE_S)
            assert isinstance(endpoint, VerbsEndpoint)
            region = transport.register(Memory.of(np.zeros(4096, dtype=np.uint8)))
            remote = transport.export(region, Rights.READ)
            held = HeldLease()
            batch = make_batch(Opcode.READ, region, remote, column(0), column(0), column(4096))
            transfer = endpoint.post(batch, hold=held.lease)
            held.lease.release()
            deadline = time.monotonic() + PATIENCE_S
            while not endpoint._lane.in_flight:
                assert time.monotonic() < deadline
            transfer.cancel()
            with pytest.raises(DeadlineError):
                transfer.result(0.05)
            assert held.ends == 0
            endpoint.abort()
            assert transfer.done()
            assert not transfer.ok.any()
            assert transfer.error is not None
            assert held.ends == 1
