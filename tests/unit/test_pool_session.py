"""One connection to a pool server that does not behave: every call ends in its own time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from kvrdma import protocol
from kvrdma.auth import NONCE_NBYTES, Role, prove
from kvrdma.backends.pool.session import Session
from kvrdma.errors import DeadlineError

PATIENCE_S = 30.0
LARGE = bytes(1 << 20)


@contextlib.contextmanager
def deaf_server() -> Iterator[int]:
    """Says hello and then reads nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socks: list[socket.socket] = []

        def serve() -> None:
            sock, _ = server.accept()
            socks.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            decoder = protocol.FrameDecoder(peer="the client")

            def receive() -> protocol.Message:
                while True:
                    for message in decoder.feed(sock.recv(4096)):
                        return message

            hello, nonce = receive(), bytes(NONCE_NBYTES)
            assert isinstance(hello, protocol.Hello)
            sock.sendall(protocol.preface() + protocol.encode(protocol.Challenge(hello.seq, nonce, 0)))
            proof = prove(b"", Role.SERVER, protocol.PURPOSE, hello.nonce, nonce)
            sock.sendall(protocol.encode(protocol.HelloReply(receive().seq, proof, "deaf", b"t" * 16, [])))

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(PATIENCE_S)
        for sock in socks:
            sock.close()


def put(seq: int) -> protocol.Message:
    return protocol.DeleteRequest(seq, 1, LARGE)


def test_a_server_that_reads_nothing_does_not_hold_its_callers() -> None:
    """The kernel's queue is full: sending ends with the call's own time-out, and half a frame ends the session."""
    with deaf_server() as port:
        session = Session("127.0.0.1", port, name="test", token=None, timeout=PATIENCE_S)
        session._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        # Twice what this test may take, where the kernel would give the connection up.
        session._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(2000 * PATIENCE_S))
        raised: list[BaseException] = []

        def call(timeout: float) -> None:
            try:
                session.call(put, protocol.DeleteReply, timeout=timeout)
            except BaseException as error:
                raised.append(error)

        first, behind = (threading.Thread(target=call, args=(timeout,), daemon=True) for timeout in (2.0, 0.2))
        first.start()
        while not session._send_guard.locked():
            time.sleep(0.001)
        behind.start()
        behind.join(PATIENCE_S)
        assert len(raised) == 1  # nothing of it was sent, so the session lives on
        assert not session.broken
        assert len(session._waiting) == 1
        first.join(PATIENCE_S)
        assert session.broken
        assert not session._waiting
        assert [type(error) for error in raised] == [DeadlineError, DeadlineError]
        session.close()


def test_a_server_that_says_no_hello_is_a_deadline() -> None:
    """Not a `TransportError`: there was a connection, and it may be slow only."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(DeadlineError):
        Session("127.0.0.1", server.getsockname()[1], name="test", token=None, timeout=0.2)
