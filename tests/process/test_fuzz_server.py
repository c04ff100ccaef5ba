"""A real server fed with inputs that are almost right: it lives on, stays small, and serves others right bytes."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from fuzzing import Fuzzer, Fuzzing
from serving import (
    PATIENCE_S,
    Client,
    RawClient,
    Server,
    eventually,
    get_request,
    lookup_request,
    put_request,
)

from kvrdma import protocol
from kvrdma.errors import KVRDMAError
from kvrdma.transports import RemoteRegion
from kvrdma.transports.tcp import wire
from kvrdma.transports.tcp.session import parse_address
from kvrdma.transports.tcp.wire import Frame

NOWHERE = RemoteRegion("tcp", 1 << 20, bytes(20))
CONTENT = np.zeros((4, 4096), dtype=np.uint8)
TOKEN = b"a token that only these tests know"
IN_A_ROW = 16  # inputs of one connection; few of them end it, so that most are looked at


class Served:
    """A server with a token or without, and whoever knows it."""

    def __init__(self, server: Server, token: bytes) -> None:
        self.server = server
        self.token = token
        self.url = f"{server.url}?token_file={server.token_file}" if token else server.url

    def raw(self) -> RawClient:
        """A client by hand that has proved itself."""
        raw = RawClient(self.server.port, hello=False)
        raw.greet(self.token)
        return raw


@pytest.fixture(params=[b"", TOKEN], ids=["without a token", "with a token"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    arguments, token_file = ["-m", "kvrdma", "serve", "--port", "0", "--capacity", "64MiB"], ""
    if request.param:
        (tmp_path / "token").write_bytes(request.param)
        token_file = str(tmp_path / "token")
        arguments += ["--token-file", token_file]
    with Server(arguments=arguments, token_file=token_file) as server:
        yield Served(server, request.param)


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """A client of it with eight blocks of 64 KiB."""
    with Client(served.url) as client:
        yield client


class Neighbour:
    """A client that behaves, beside the one that does not: every block that it gets is right."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.rounds = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        with Client(self.url, first=1000) as client:
            while not self._stop.is_set():
                try:
                    self._round(client)
                except KVRDMAError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.rounds += 1
                self._stop.wait(0.02)

    def _round(self, client: Client) -> None:
        if not client.put().result(PATIENCE_S).all():
            self.failures.append("a put failed")
        client.clear()
        get = client.get()
        if not get.result(PATIENCE_S).all() or not all(client.came(row) for row in range(client.n)):
            self.failures.append(f"a get failed: {get.status.tolist()} {get.error}")
        client.backend.delete(client.batch, timeout=PATIENCE_S)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def besieged(served: Served) -> Iterator[None]:
    """Around the attack: what must hold of the server when it is over."""
    server = served.server
    process, clients = psutil.Process(server.process.pid), server.stats()["clients"]
    neighbour = Neighbour(served.url)
    eventually(lambda: neighbour.rounds >= 2)
    descriptors, memory, before = process.num_fds(), process.memory_info().rss, neighbour.rounds
    try:
        yield
        eventually(lambda: neighbour.rounds >= before + 2)
    finally:
        neighbour.close()
    assert neighbour.failures == []
    eventually(lambda: server.stats()["clients"] == clients)
    eventually(lambda: process.num_fds() <= descriptors)
    assert process.memory_info().rss < memory + (256 << 20)
    eventually(lambda: (server.stats()["pinned_blocks"], server.stats()["reserved_blocks"]) == (0, 0))
    for word in ("Traceback", "Unhandled", "never retrieved", "failed unexpectedly", "RuntimeWarning"):
        assert word not in server.text, server.text[-4000:]


def spill(sock: socket.socket, *parts: bytes) -> int:
    """Send, whether or not the other side still wants it; how many parts went out whole."""
    raw, n_sent = b"".join(parts), 0
    with contextlib.suppress(OSError):
        while n_sent < len(raw):
            n_sent += sock.send(raw[n_sent:])
    return sum(end <= n_sent for end in itertools.accumulate(map(len, parts)))


def leave(draw: Fuzzer, sock: socket.socket) -> None:
    """Close: at once with a reset, or in order after a while of reading."""
    with contextlib.suppress(OSError):
        match draw.randrange(4):
            case 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case 1:
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(0.05)
                while sock.recv(1 << 16):
                    pass
    sock.close()


def test_before_authentication(served: Served, fuzzing: Fuzzing) -> None:
    """One connection an input; some of them get as far as a challenge, none any further."""
    inside = served.server.stats()
    with besieged(served):
        for draw in fuzzing.inputs(150, 10_000):
            sock = socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE_S)
            hello = protocol.preface() + protocol.encode(protocol.Hello(1, "almost", draw.randbytes(16)))
            proof = protocol.encode(protocol.Proof(2, draw.randbytes(32)))
            match draw.randrange(7):
                case 0:
                    spill(sock, draw.randbytes(draw.randrange(200)))
                case 1:
                    spill(sock, protocol.preface() + draw.frame(draw.body(draw.message())))
                case 2:
                    spill(sock, hello[: draw.randrange(len(hello))])
                case 3:
                    spill(sock, draw.mutated(hello))
                case 4:
                    spill(sock, hello + draw.mutated(proof))
                case _:
                    spill(sock, hello)
                    with contextlib.suppress(OSError):
                        sock.recv(1 << 16)  # the challenge, or its beginning
                    spill(sock, draw.choice((proof, draw.mutated(proof), draw.frame(draw.body(draw.message())))))
            leave(draw, sock)
    assert served.server.stats()["keyspaces"] <= inside["keyspaces"] + 1  # the neighbour's


def requests(draw: Fuzzer, raw: RawClient, keyspace: int) -> protocol.Message:
    """What a client asks for."""
    makers: list[Callable[[], protocol.Message]] = [
        lambda: lookup_request(raw, keyspace, draw.randrange(1, 9)),
        lambda: get_request(raw, keyspace, draw.randrange(1, 9)),
        lambda: put_request(raw, keyspace, CONTENT, NOWHERE, timeout=draw.choice((0.001, 1.0))),
        lambda: protocol.Release(0, draw.randrange(20), struct.pack("<q", draw.randrange(20))),
        lambda: protocol.DeleteRequest(raw.number(), keyspace, draw.randbytes(32)),
        lambda: protocol.StatsRequest(raw.number()),
        lambda: protocol.OpenKeySpace(raw.number(), {"model": draw.value()}, draw.randbytes(32)),
    ]
    return draw.choice(makers)()


def test_after_authentication(served: Served, client: Client, fuzzing: Fuzzing) -> None:
    """Inputs in a row, of which few end the connection; with a data connection and without."""
    assert client.put().result().all()
    with besieged(served):
        for draw in fuzzing.rows(800, 100_000):
            raw = served.raw()
            with contextlib.ExitStack() as stack:
                if draw.chance(0.5):
                    stack.enter_context(data_stream(raw))
                keyspace, out = raw.open(), []
                for _ in range(IN_A_ROW):
                    message = requests(draw, raw, keyspace)
                    if draw.chance(0.1):
                        message = draw.altered(message)
                    body = draw.body(message) if draw.chance(0.02) else protocol.encode(message)[4:]
                    frame = struct.pack(">I", len(body)) + body
                    out.append(draw.frame(draw.mutated(body)) if draw.chance(0.02) else frame)
                fuzzing.count += spill(raw.sock, *out)
                leave(draw, raw.sock)
    client.clear()
    assert all(client.came(row) for row in np.flatnonzero(client.get().result()))


@contextlib.contextmanager
def data_stream(raw: RawClient) -> Iterator[socket.socket]:
    """The data connection of a client by hand, as a bare socket."""
    with socket.socket() as sock:
        sock.settimeout(PATIENCE_S)
        raw.join_data(sock)
        yield sock


def test_the_data_port_before_authentication(served: Served, fuzzing: Fuzzing) -> None:
    with served.raw() as raw, besieged(served):
        address = parse_address(raw.data_address)
        for draw in fuzzing.inputs(150, 10_000):
            ticket = raw.hello.ticket if draw.chance(0.7) else draw.randbytes(16)
            count = draw.choice((1, 1, 2, 64, 65))
            greeting = wire.Greeting(draw.randbytes(16), draw.randrange(count), count, ticket).encode()
            sock = socket.create_connection(address, timeout=PATIENCE_S)
            match draw.randrange(5):
                case 0:
                    spill(sock, draw.randbytes(draw.randrange(200)))
                case 1:
                    spill(sock, draw.mutated(greeting))
                case 2:
                    spill(sock, greeting + draw.randbytes(draw.randrange(100)))
                case 3:
                    spill(sock, greeting)
                    with contextlib.suppress(OSError):
                        sock.recv(wire.CHALLENGE_NBYTES)
                    spill(sock, draw.randbytes(draw.choice((1, 32, 100))))
                case 4:
                    spill(sock, greeting[: draw.randrange(len(greeting))])
            leave(draw, sock)
        with data_stream(raw):  # none of them took this session's place
            assert isinstance(raw.call(get_request(raw, raw.open(), 1), protocol.GetReply), protocol.GetReply)


def test_the_data_port_after_authentication(served: Served, client: Client, fuzzing: Fuzzing) -> None:
    """Frames in a row on the stream of a client that holds a lease: it reads nothing but what was exported."""
    assert client.put().result().all()
    with besieged(served):
        for draw in fuzzing.rows(300, 40_000):
            with served.raw() as raw, data_stream(raw) as sock:
                reply = raw.call(get_request(raw, raw.open(), client.n), protocol.GetReply)
                token = reply.regions[0][2]
                out = []
                for op in range(IN_A_ROW // 2):
                    rows, offsets, sizes = (
                        np.array([draw.int64() if draw.chance(0.01) else draw.randrange(most) for _ in range(3)])
                        for most in (1, 1 << 20, 1 << 16)
                    )
                    tokens = [token if draw.chance(0.9) else draw.randbytes(20)]
                    if draw.chance(0.2):
                        payload = bytes(int(np.clip(sizes, 0, 1 << 16).sum()))
                        frame = wire.encode_request(
                            Frame.WRITE_REQUEST, op, 0, tokens, rows, offsets, sizes, len(payload)
                        )
                        out.append(frame + payload)
                    else:
                        frame = wire.encode_request(Frame.READ_REQUEST, op, 0, tokens, rows, offsets, sizes, 0)
                        out.append(draw.mutated(frame) if draw.chance(0.05) else frame)
                fuzzing.count += spill(sock, *out)
                leave(draw, sock)
    client.clear()
    assert client.get().result().all()  # nobody could write to the pool
    assert all(client.came(row) for row in range(client.n))
