"""A client of a server that lies: it is told what is almost right, and gets errors and misses, never a wrong block."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import struct
import threading
from typing import Self

import msgpack
import numpy as np
import pytest
from fuzzing import Fuzzer, Fuzzing
from serving import PATIENCE_S, SHARD, Client, Server, eventually

from kvrdma import protocol
from kvrdma.backends.pool import PoolBackend
from kvrdma.errors import KVRDMAError
from kvrdma.settings import Settings, Url

LITTLE_S = 0.1  # what a call may take that nobody answers


class Liar:
    """Stands between clients and a server, and alters what the server says: each alteration is an input."""

    def __init__(self, server: Server, draw: Fuzzer) -> None:
        self.altered = 0
        self.honest = True
        self._draw = draw
        self._server = server
        self._earlier: list[bytes] = []
        self._threads: list[threading.Thread] = []
        self._socks: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"kvrdma://127.0.0.1:{self._listener.getsockname()[1]}"

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._server.port), timeout=PATIENCE_S)
            self._socks = [s for s in self._socks if s.fileno() >= 0] + [client, server]
            self._start(self._requests, client, server)
            self._start(self._replies, client, server)

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)
        end(client, server)

    def _replies(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), server.makefile("rb") as stream:
            opening = stream.read(protocol.PREFACE_NBYTES)
            lies = self._lies(0.02)
            client.sendall(self._draw.mutated(opening) if lies else opening)
            self.altered += lies
            while len(head := stream.read(4)) == 4:
                body = stream.read(struct.unpack(">I", head)[0])
                lies = self._lies(0.4)
                client.sendall(self._answer(head, body) if lies else head + body)
                self.altered += lies
        end(client, server)

    def _lies(self, p: float) -> bool:
        return not self.honest and self._draw.chance(p)

    def _answer(self, head: bytes, body: bytes) -> bytes:
        draw, message = self._draw, protocol.decode(body)
        self._earlier = [*self._earlier[-50:], body]
        match draw.randrange(12):
            case 0:
                body = draw.mutated(body)
            case 1:
                body = draw.body(draw.message())
            case 2 | 3 | 4:  # what was said to somebody else, or to this one of other blocks
                earlier = msgpack.unpackb(draw.choice(self._earlier))
                earlier[1] = message.seq
                body = msgpack.packb(earlier)
            case 5:
                return head + body + head + body
            case 6 if draw.chance(0.2):
                return draw.frame(body)  # which may be waited for in vain
            case 7 if draw.chance(0.2):
                return draw.randbytes(100)
            case 8 if draw.chance(0.2):
                body = protocol.encode(dataclasses.replace(message, seq=draw.number()))[4:]
            case _:
                body = protocol.encode(dataclasses.replace(draw.altered(message), seq=message.seq))[4:]
        return struct.pack(">I", len(body)) + body

    def cut(self) -> None:
        """End every connection, and with it whatever was believed on it."""
        end(*self._socks)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end(*socks: socket.socket) -> None:
    for sock in socks:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def ask(draw: Fuzzer, client: Client) -> int:
    """One call; gives how many blocks came, all of which must be right."""
    first = draw.randrange(client.n)
    rows = slice(first, draw.randrange(first, client.n) + 1)
    try:
        match draw.randrange(8):
            case 0:
                found = client.backend.lookup(client.batch[rows], [SHARD], timeout=LITTLE_S)
                assert found.present.shape == (rows.stop - rows.start,)
            case 1:
                assert isinstance(client.backend.stats(timeout=LITTLE_S), dict)
            case 2 if draw.chance(0.3):
                assert client.backend.delete(client.batch[rows], timeout=LITTLE_S) >= 0
            case 2 | 3:
                put = client.put(rows, timeout=LITTLE_S)
                put.result(PATIENCE_S)
                assert put.error is None or isinstance(put.error, KVRDMAError)
            case _:
                client.clear()
                get = client.get(rows, timeout=LITTLE_S)
                came = np.flatnonzero(get.result(PATIENCE_S)) + rows.start
                assert get.error is None or isinstance(get.error, KVRDMAError)
                assert all(client.came(row) for row in came)
                return len(came)
    except KVRDMAError:
        pass
    return 0


def test_a_client_of_a_server_that_lies(server: Server, fuzzing: Fuzzing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    came = 0
    with Liar(server, fuzzing.draw) as liar, Client(liar.url) as client:
        assert client.put().result(PATIENCE_S).all()
        liar.honest = False
        for draw in fuzzing.inputs(100, 2_000):
            while liar.altered < fuzzing.count:
                came += ask(draw, client)
            assert client.pool.n_leases == 0
        liar.honest = True
        liar.cut()
        eventually(client.usable)
        client.put().result(PATIENCE_S)
        client.clear()
        assert client.get().result(PATIENCE_S).all()
        assert all(client.came(row) for row in range(client.n))
    assert came
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert "Traceback" not in server.text


def test_a_server_that_leaves_while_it_is_answered() -> None:
    """It sends leases that nobody asked for, which the client gives back until the socket breaks under it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        errors: list[KVRDMAError] = []

        def use() -> None:
            with PoolBackend(Url.parse(f"kvrdma://127.0.0.1:{listener.getsockname()[1]}"), Settings()) as backend:
                try:
                    backend.stats(timeout=PATIENCE_S)
                except KVRDMAError as error:
                    errors.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        sock, _ = listener.accept()
        with sock:
            sock.recv(protocol.PREFACE_NBYTES, socket.MSG_WAITALL)
            lease = protocol.encode(protocol.GetReply(0, 1, 1, b"", [], b"", b""))
            sock.sendall(protocol.preface() + lease * 3000)
            while len(sock.recv(1 << 16)) < 200:  # a hello; then what was given back
                pass
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        thread.join(PATIENCE_S)
        assert len(errors) == 1
