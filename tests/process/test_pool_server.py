"""A real pool server in a process of its own, with clients that behave, that die, and that do not behave."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import (
    PATIENCE_S,
    SHARD,
    SPACE,
    Client,
    Program,
    RawClient,
    Server,
    eventually,
    get_request,
    lookup_request,
    packed_keys,
    put_request,
)

from kvrdma import protocol
from kvrdma.backends import GetStatus, PutStatus, open_backend
from kvrdma.errors import ConfigError, KVRDMAError, ProtocolError, TransportError
from kvrdma.memory import Memory
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.settings import Settings
from kvrdma.transports import RemoteRegion, Rights
from kvrdma.transports.tcp import TcpTransport, wire

BIG = {"n": 48, "nbytes": 1 << 20}
NOWHERE = RemoteRegion("tcp", 1 << 20, bytes(20))
A_PUT = np.zeros((4, 4096), dtype=np.uint8)
PRELUDE = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serving import *
from kvrdma.transports.tcp import TcpTransport
def say(*words): print(*words, file=sys.stderr, flush=True)
"""
SHORT_LEASES = """
import asyncio
from kvrdma.cli.serve import _serve
from kvrdma.server import PoolServer, ServerSettings
asyncio.run(_serve(PoolServer(ServerSettings(port=0, capacity=16 << 20, lease_s=0.2))))
"""


@contextmanager
def data_connection(raw: RawClient) -> Iterator[TcpTransport]:
    """The data connection of a client by hand."""
    with TcpTransport() as transport:
        raw.connect_data(transport)
        yield transport


def reserved(server: Server) -> int:
    return int(server.stats()["reserved_blocks"])


def pinned(server: Server) -> int:
    return int(server.stats()["pinned_blocks"])


# -- put, get, lookup


def test_blocks_of_one_process_come_back_in_another(server: Server, client: Client) -> None:
    writer = PRELUDE + f"with Client({server.url!r}) as client: say('stored', client.put().result().sum())"
    with Program("-c", writer) as other:
        assert other.says("stored ") == "8"
        assert other.ended() == 0
    assert client.found() == [True] * 8
    assert client.get().result().all()
    assert all(client.came(row) for row in range(8))


def test_what_is_there_already_is_not_moved_again(client: Client) -> None:
    assert client.put(slice(0, 4)).result().all()
    put = client.put()
    assert put.result().all()
    assert put.status.tolist() == [PutStatus.EXISTS] * 4 + [PutStatus.STORED] * 4


def test_a_miss_is_a_miss_in_its_place(client: Client) -> None:
    assert client.put(slice(0, 2)).result().all()
    assert client.put(slice(5, 8)).result().all()
    get = client.get()
    assert get.result().tolist() == [True] * 2 + [False] * 3 + [True] * 3
    assert get.error is None
    assert get.status.tolist() == [GetStatus.OK] * 2 + [GetStatus.MISSING] * 3 + [GetStatus.OK] * 3
    assert [client.came(row) for row in range(8)] == get.ok.tolist()


def test_bytes_that_are_not_those_of_the_checksum_are_not_stored(server: Server, client: Client) -> None:
    client.pool.view(3)[100] ^= 1
    put = client.put()
    assert put.result().tolist() == [row != 3 for row in range(8)]
    assert put.status[3] == PutStatus.FAILED
    assert client.found() == [row != 3 for row in range(8)]
    stats = server.stats()
    assert (stats["put_checksum_failures"], stats["reserved_blocks"]) == (1, 0)


def test_deleted_blocks_are_gone_on_every_shard(client: Client) -> None:
    assert client.put().result().all()
    assert client.backend.delete(client.batch[:3], timeout=PATIENCE_S) == 3
    assert client.found() == [False] * 3 + [True] * 5


def test_two_key_spaces_with_blocks_of_unequal_size_in_one_server(server: Server, client: Client) -> None:
    other_space = replace(SPACE, model="other")
    with Client(server.url, nbytes=100_000, space=other_space) as other:
        assert other.backend.lookup(other.batch, [SHARD], timeout=PATIENCE_S).differs == ()
        assert client.put().result().all()
        found = other.backend.lookup(other.batch, [SHARD], timeout=PATIENCE_S)
        assert (found.run, found.differs) == (0, ("model",))
        assert other.put().result().all()
        for one in (client, other):
            assert one.get().result().all()
            assert all(one.came(row) for row in range(8))
    stats = server.stats()
    assert (stats["keyspaces"], stats["size_classes"], stats["blocks"]) == (2, 2, 16)


def test_a_block_of_another_size_is_a_miss(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with Client(server.url, nbytes=4096) as other:
        get = other.get()
        assert not get.result().any()
        assert get.status.tolist() == [GetStatus.MISSING] * 8
    eventually(lambda: pinned(server) == 0)


def test_under_pressure_the_oldest_blocks_make_room_and_no_wrong_byte_comes() -> None:
    with Server(capacity="16MiB") as server, Client(server.url, n=24, nbytes=1 << 20) as client:
        for first in range(0, 24, 4):
            assert client.put(slice(first, first + 4)).result().all()
        present = client.found()
        assert present == [False] * 8 + [True] * 16
        get = client.get()
        assert get.result().tolist() == present
        assert all(client.came(row) for row in range(8, 24))
        stats = server.stats()
        assert (stats["evicted_blocks"], stats["blocks"]) == (8, 16)


# -- the server dies, or ends


def stop_in_the_middle_of_a_get(server: Server, client: Client) -> Any:
    """A get of which some bytes have come when the server is stopped."""
    for _ in range(50):
        client.clear()
        get = client.get()
        eventually(lambda get=get: client.pool.view(client.n)[:64].any() or get.done())
        server.signal(signal.SIGSTOP)
        if not get.done():
            return get
        server.signal(signal.SIGCONT)
    pytest.fail("every get was over before the server could be stopped")


def stop_in_the_middle_of_a_put(server: Server, client: Client) -> Any:
    """A put that is under way when the server is stopped."""
    with Client(server.url, n=1) as watcher:
        for _ in range(50):
            client.backend.delete(client.batch, timeout=PATIENCE_S)
            put = client.put()
            eventually(lambda put=put: watcher.backend.stats(timeout=PATIENCE_S)["reserved_blocks"] or put.done())
            server.signal(signal.SIGSTOP)
            if not put.done():
                return put
            server.signal(signal.SIGCONT)
    pytest.fail("every put was over before the server could be stopped")


def test_a_server_killed_in_the_middle_of_a_get() -> None:
    with Server(capacity="64MiB") as server, Client(server.tcp_url, **BIG) as client:
        assert client.put().result().all()
        get = stop_in_the_middle_of_a_get(server, client)
        server.signal(signal.SIGKILL)
        get.result(PATIENCE_S)
        assert get.error is not None
        assert not get.ok.all()
        assert all(client.came(row) for row in np.flatnonzero(get.ok))
        assert client.pool.n_leases == 0
        server.ended()
        with Server(port=server.port):
            eventually(client.usable)
            again = client.get()
            assert not again.result(PATIENCE_S).any()
            assert again.error is None
            assert client.put().result(PATIENCE_S).all()
            client.clear()
            assert client.get().result(PATIENCE_S).all()
            assert all(client.came(row) for row in range(client.n))


def test_a_server_killed_in_the_middle_of_a_put() -> None:
    with Server(capacity="64MiB") as server, Client(server.tcp_url, **BIG) as client:
        put = stop_in_the_middle_of_a_put(server, client)
        server.signal(signal.SIGKILL)
        put.result(PATIENCE_S)
        assert put.error is not None
        assert put.status.tolist() == [PutStatus.FAILED] * client.n
        assert client.pool.n_leases == 0
        server.ended()
        with Server(port=server.port):
            eventually(client.usable)
            assert client.put().result(PATIENCE_S).all()


def test_transfers_end_though_the_server_is_stopped_and_never_comes_back() -> None:
    with Server(capacity="64MiB") as server, Client(server.tcp_url, **BIG) as client:
        assert client.put(slice(0, 24)).result().all()
        server.signal(signal.SIGSTOP)
        get, put = client.get(slice(0, 24), timeout=0.5), client.put(slice(24, 48), timeout=0.5)
        assert not get.result(PATIENCE_S).any()
        assert not put.result(PATIENCE_S).any()
        assert client.pool.n_leases == 0
        with pytest.raises(KVRDMAError):
            client.backend.lookup(client.batch, [SHARD], timeout=0.2)


def test_a_server_that_was_stopped_for_a_while_serves_on() -> None:
    with Server(capacity="64MiB") as server, Client(server.tcp_url, **BIG) as client:
        assert client.put().result().all()
        get = stop_in_the_middle_of_a_get(server, client)
        server.signal(signal.SIGCONT)
        assert get.result(PATIENCE_S).all()
        assert all(client.came(row) for row in range(client.n))


def test_sigterm_ends_it_with_status_0_and_clients_learn_why(server: Server, client: Client) -> None:
    assert client.put().result().all()
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
    get = client.get()
    assert not get.result(PATIENCE_S).any()
    assert "Traceback" not in server.text


def test_sigterm_lets_a_put_under_way_end(server: Server) -> None:
    content = np.random.default_rng(0).integers(0, 256, (4, 4096), dtype=np.uint8)
    with RawClient(server.port) as raw, TcpTransport() as transport:
        keyspace = raw.open()
        region = transport.export(transport.register(Memory.of(content)), Rights.READ)
        raw.send(put_request(raw, keyspace, content, region))
        eventually(lambda: reserved(server) == 4)  # it waits for this client's data connection
        server.signal(signal.SIGTERM)
        eventually(lambda: not listens(server.port))
        raw.connect_data(transport)
        reply = raw.receive()
        assert isinstance(reply, protocol.PutReply)
        assert list(reply.status) == [PutStatus.STORED] * 4
        assert isinstance(raw.receive(), protocol.Goodbye)
        assert server.ended() == 0
    assert "Traceback" not in server.text


def test_sigterm_gives_up_a_put_that_does_not_end(server: Server) -> None:
    with RawClient(server.port) as raw:
        raw.send(put_request(raw, raw.open(), A_PUT, NOWHERE))
        eventually(lambda: reserved(server) == 4)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert "Traceback" not in server.text


def test_sigterm_ends_it_though_a_client_reads_nothing(server: Server) -> None:
    with RawClient(server.port) as raw:
        raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        keyspace = raw.open()
        # More answers than the sockets hold; the server has made all of them once it has made the last one.
        raw.sock.sendall(protocol.encode(protocol.StatsRequest(1)) * 30_000)
        raw.send(lookup_request(raw, keyspace, 7))
        eventually(lambda: server.stats().get("lookup_blocks") == 7)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert "Traceback" not in server.text


def test_sigterm_ends_it_though_a_client_holds_a_lease_and_takes_no_byte(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with RawClient(server.port) as raw, socket.socket() as data:
        reads_without_end(raw, data)
        eventually(lambda: pinned(server) == 1)
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert "Traceback" not in server.text


def test_a_stop_in_the_middle_of_a_sessions_end_waits_for_it() -> None:
    """In this process: the thread that aborts data connections is kept busy until the stop has begun."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        server = PoolServer(ServerSettings(port=0, capacity=16 << 20))
        await server.start()
        with ThreadPoolExecutor(1) as elsewhere, socket.socket() as data:

            def begin_a_put_that_stalls() -> RawClient:
                raw = RawClient(server.address[1])
                raw.join_data(data)  # and its READs are never answered
                raw.send(put_request(raw, raw.open(), A_PUT, NOWHERE))
                return raw

            raw = await loop.run_in_executor(elsewhere, begin_a_put_that_stalls)
            await until(lambda: server.stats()["reserved_blocks"] == 4)
            aborts = threading.Event()
            loop.run_in_executor(None, aborts.wait)
            raw.close()
            await until(lambda: server.stats()["clients"] == 0)
            stop = loop.create_task(server.stop())
            for _ in range(10):
                await asyncio.sleep(0)
            aborts.set()
            await stop
            assert server.stats()["reserved_blocks"] == 0

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.005)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
    except OSError:
        return False
    return True


# -- a client dies, or is stopped

HOLDS_LEASE_AND_PUT = (
    PRELUDE
    + """
port = int(sys.argv[1])
with RawClient(port) as reader, RawClient(port) as writer, TcpTransport() as transport:
    reader.connect_data(transport)
    reader.call(get_request(reader, reader.open(), 8), protocol.GetReply)
    nowhere = RemoteRegion("tcp", 1 << 20, bytes(20))
    writer.send(put_request(writer, writer.open(SPACE), np.zeros((12, 4096), dtype=np.uint8), nowhere))
    say("ready")
    sys.stdin.read()
"""
)
PUTS_FOR_EVER = (
    PRELUDE
    + """
with Client(sys.argv[1], n=48, nbytes=1 << 20) as client:
    client.usable()
    say("ready")
    while True:
        put = client.put(timeout=float(sys.argv[2]))
        ok = put.result()
        if not ok.all():
            say("failed", client.pool.n_leases)
            break
        client.backend.delete(client.batch, timeout=30)
"""
)


def test_a_client_killed_while_it_holds_leases_and_puts(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with Program("-c", HOLDS_LEASE_AND_PUT, str(server.port)) as other:
        other.says("ready")
        # Of the twelve blocks of its put eight are there already.
        eventually(lambda: (pinned(server), reserved(server)) == (8, 4))
        other.signal(signal.SIGKILL)
        eventually(lambda: (pinned(server), reserved(server)) == (0, 0))
    assert client.get().result().all()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_killed_or_stopped_in_the_middle_of_a_put(how: signal.Signals) -> None:
    timeout = "1" if how is signal.SIGSTOP else "30"
    with (
        Server(capacity="64MiB") as server,
        Client(server.url, n=1) as watcher,
        Program("-c", PUTS_FOR_EVER, server.tcp_url, timeout) as other,
    ):
        other.says("ready")
        eventually(lambda: watcher.backend.stats(timeout=PATIENCE_S)["reserved_blocks"])
        other.signal(how)
        # Of a stopped client the server gives up the put once its time-out is over, twice.
        eventually(lambda: reserved(server) == 0)
        if how is signal.SIGSTOP:
            other.signal(signal.SIGCONT)
            assert other.says("failed ") == "0"
            assert other.ended() == 0
        with Client(server.url, **BIG) as client:  # all the room there is can be had again
            assert client.put().result(PATIENCE_S).all()
            assert client.get().result(PATIENCE_S).all()


def test_a_lease_that_is_not_released_expires() -> None:
    with Server(arguments=("-c", SHORT_LEASES)) as server, Client(server.url) as client:
        assert client.put().result().all()
        with RawClient(server.port) as raw, data_connection(raw):
            keyspace = raw.open()
            reply = raw.call(get_request(raw, keyspace, 8), protocol.GetReply)
            eventually(lambda: server.stats().get("expired_leases") == 1)
            assert pinned(server) == 0
            raw.send(protocol.Release(0, reply.lease, b""))  # too late: nothing to release, no harm done
            assert len(raw.call(lookup_request(raw, keyspace, 8), protocol.LookupReply).present) == 8


def test_a_client_that_goes_in_the_middle_of_a_read_leaves_nothing(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with RawClient(server.port) as raw, socket.socket() as data:
        reads_without_end(raw, data)
        eventually(lambda: pinned(server) == 1)
    eventually(lambda: pinned(server) == 0)
    assert client.get().result().all()


def reads_without_end(raw: RawClient, data: socket.socket) -> None:
    """Lease a block and ask for it many times over, on a data connection that is never read."""
    data.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.join_data(data)
    reply = raw.call(get_request(raw, raw.open(), 1), protocol.GetReply)
    offsets = protocol.unpack_columns(reply.columns, 4, what="reply")[1].repeat(256)
    sizes, rows = np.full(256, 64 << 10, dtype=np.int64), np.zeros(256, dtype=np.int64)
    tokens = [reply.regions[0][2]]
    for number in range(8):
        data.sendall(wire.encode_request(wire.Frame.READ_REQUEST, number, 0, tokens, rows, offsets, sizes, 0))


def test_no_wrong_byte_comes_though_leases_expire_and_blocks_are_evicted_meanwhile(thorough: bool) -> None:
    """Clients that share keys, with time-outs that pass in the middle of everything."""

    def work(seed: int) -> list[int]:
        draw = random.Random(seed)
        came = []
        with Client(server.url, n=12, nbytes=1 << 20) as client:
            for _ in range(2000 if thorough else 60):
                first = draw.randrange(12)
                rows = range(first, min(12, first + draw.randrange(1, 7)))
                chosen, timeout = slice(rows.start, rows.stop), draw.choice([0.005, 0.05, PATIENCE_S])
                if draw.random() < 0.4:
                    client.put(chosen, timeout=timeout).result(PATIENCE_S)
                else:
                    client.clear()
                    ok = client.get(chosen, timeout=timeout).result(PATIENCE_S)
                    came += [row for row, is_ok in zip(rows, ok, strict=True) if is_ok]
                    assert all(client.came(row) for row, is_ok in zip(rows, ok, strict=True) if is_ok)
                assert client.pool.n_leases == 0
        return came

    with Server(arguments=("-c", SHORT_LEASES.replace("16 << 20", "8 << 20").replace("0.2", "0.005"))) as server:
        with ThreadPoolExecutor(4) as clients:
            came = list(clients.map(work, range(4)))
        assert all(came)
        eventually(lambda: (pinned(server), reserved(server)) == (0, 0))
        assert server.stats()["evicted_blocks"]
        assert "Traceback" not in server.text


# -- clients that do not behave


def test_a_get_may_come_before_the_data_connection_is_known(server: Server, client: Client) -> None:
    """The server hears of the two connections on two threads: the order in which it does is not the client's."""
    assert client.put().result().all()
    with RawClient(server.port) as raw:
        raw.send(get_request(raw, raw.open(), 8))
        with data_connection(raw):
            reply = raw.receive()
            assert isinstance(reply, protocol.GetReply)
            assert reply.present == b"\1" * 8


def test_a_lookup_that_would_hold_everybody_up_is_refused(server: Server, client: Client) -> None:
    """A million pairs of key and shard are a fifth of a second of the server's only loop."""
    assert client.put().result().all()
    with RawClient(server.port) as raw:
        keyspace = raw.open()
        keys = packed_keys(1) * 30_000
        raw.send(protocol.LookupRequest(raw.number(), keyspace, keys, [SHARD.encode()] * 1024))
        assert isinstance(raw.receive(), protocol.ErrorReply)
        assert client.found() == [True] * 8


def test_a_ticket_that_is_not_the_servers_gets_no_data_connection(server: Server, client: Client) -> None:
    with RawClient(server.port) as raw, TcpTransport() as transport:
        for wrong in ({"ticket": b"not a ticket"}, {"secret": bytes(32)}, {"secret": b""}):
            with pytest.raises(TransportError):
                raw.connect_data(transport, **wrong)
    assert client.put().result().all()


def test_a_second_data_connection_with_one_ticket_is_turned_away(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with RawClient(server.port) as raw, data_connection(raw) as transport:
        second = raw.connect_data(transport)
        eventually(second.closed)
        raw.call(get_request(raw, raw.open(), 8), protocol.GetReply)


def test_a_client_of_another_version_is_told_both(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with RawClient(server.port, hello=False) as raw:
        raw.sock.sendall(struct.pack(">6sH", b"kvrdma", 7))
        goodbye = raw.receive()
        assert isinstance(goodbye, protocol.Goodbye)
        assert "version 7" in goodbye.text
        assert f"this side {protocol.VERSION}" in goodbye.text
        assert raw.at_end()
    version = protocol.VERSION
    monkeypatch.setattr(protocol, "VERSION", 7)
    with Client(server.url) as client, pytest.raises(ProtocolError, match=f"version {version} .* this side 7"):
        client.backend.stats(timeout=PATIENCE_S)


@pytest.mark.parametrize("seed", range(4))
def test_garbage_on_the_control_port(server: Server, client: Client, seed: int) -> None:
    garbage = random.Random(seed).randbytes(5000)
    for prefix in (b"", protocol.preface(), protocol.preface() + struct.pack(">I", 100)):
        with RawClient(server.port, hello=False) as raw:
            raw.sock.sendall(prefix + garbage)
            assert raw.at_end()
    assert server.stats()["protocol_errors"] == 3
    assert client.put().result().all()


@pytest.mark.parametrize("seed", range(2))
def test_garbage_on_the_data_port(server: Server, client: Client, seed: int) -> None:
    garbage = random.Random(seed).randbytes(5000)
    with RawClient(server.port) as raw:
        host, port = raw.data_address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as data:
            data.sendall(garbage)
            try:
                while data.recv(4096):
                    pass
            except ConnectionResetError:
                pass
    assert client.put().result().all()


def test_half_a_hello(server: Server, client: Client) -> None:
    whole = protocol.preface() + protocol.encode(protocol.Hello(1, "half", bytes(16)))
    for n in range(0, len(whole), 5):
        with RawClient(server.port, hello=False) as raw:
            raw.sock.sendall(whole[:n])
    eventually(lambda: server.stats()["clients"] == 1)  # the one that asks
    assert client.put().result().all()


MISFITS = {
    "another message first": lambda raw, keyspace: protocol.Hello(raw.number(), "again", bytes(16)),
    "a reply": lambda raw, keyspace: protocol.PutReply(raw.number(), b""),
    "a key space that it did not open": lambda raw, keyspace: lookup_request(raw, keyspace + 1, 1),
    "keys that are not whole": lambda raw, keyspace: replace(lookup_request(raw, keyspace, 2), keys=bytes(17)),
    "no keys": lambda raw, keyspace: replace(get_request(raw, keyspace, 1), keys=b""),
    "a shard of the wrong size": lambda raw, keyspace: replace(lookup_request(raw, keyspace, 1), shards=[b"x"]),
    "no shard": lambda raw, keyspace: replace(lookup_request(raw, keyspace, 1), shards=[]),
    "an empty shard": lambda raw, keyspace: replace(get_request(raw, keyspace, 1), shard=bytes(10)),
    "too few checksums": lambda raw, keyspace: replace(put_request(raw, keyspace, A_PUT, NOWHERE), checksums=bytes(8)),
    "no spans": lambda raw, keyspace: replace(put_request(raw, keyspace, A_PUT, NOWHERE), spans=b""),
    "spans outside the region": lambda raw, keyspace: put_request(raw, keyspace, A_PUT, replace(NOWHERE, nbytes=4096)),
    "a region of no size": lambda raw, keyspace: put_request(raw, keyspace, A_PUT, replace(NOWHERE, nbytes=0)),
    "a region that is none": lambda raw, keyspace: replace(put_request(raw, keyspace, A_PUT, NOWHERE), regions=[1]),
    "a region beyond any memory": lambda raw, keyspace: put_request(
        raw, keyspace, A_PUT, replace(NOWHERE, nbytes=1 << 63)
    ),
    "a release that is not whole": lambda raw, keyspace: protocol.Release(0, 1, b"xyz"),
}


def test_what_the_protocol_does_not_allow_ends_that_connection_only(server: Server, client: Client) -> None:
    assert client.put().result().all()
    for what, make in MISFITS.items():
        with RawClient(server.port) as raw:
            raw.send(make(raw, raw.open()))
            answer = raw.receive()
            assert isinstance(answer, protocol.Goodbye), what
            assert answer.text, what
            assert raw.at_end(), what
    assert client.get().result().all()
    assert (pinned(server), reserved(server)) == (0, 0)
    assert "Traceback" not in server.text


@pytest.mark.parametrize(
    "region",
    [
        NOWHERE,
        replace(NOWHERE, token=b"short"),
        replace(NOWHERE, token=bytes(4096)),
        replace(NOWHERE, scheme="verbs"),
        replace(NOWHERE, nbytes=1 << 62),
    ],
)
def test_a_put_from_memory_that_cannot_be_read_fails_and_leaves_nothing(server: Server, region: RemoteRegion) -> None:
    with RawClient(server.port) as raw, data_connection(raw):
        reply = raw.call(put_request(raw, raw.open(), A_PUT, region), protocol.PutReply)
        assert list(reply.status) == [PutStatus.FAILED] * 4
    stats = server.stats()
    assert (stats["blocks"], stats["reserved_blocks"]) == (0, 0)
    assert "Traceback" not in server.text


def test_a_key_space_whose_digest_lies_is_refused(server: Server) -> None:
    with RawClient(server.port) as raw:
        other = replace(SPACE, weights="other")
        lie = protocol.OpenKeySpace(raw.number(), other.to_fields(), SPACE.digest)
        assert "digest" in raw.call(lie, protocol.ErrorReply).text
        nonsense = protocol.OpenKeySpace(raw.number(), {"model": 1}, SPACE.digest)
        assert "fields missing" in raw.call(nonsense, protocol.ErrorReply).text
        raw.open()  # the connection lives on
    assert server.stats()["keyspaces"] == 1


def test_one_name_put_with_two_sizes_at_once_is_stored_once(server: Server) -> None:
    small, large = np.zeros((4, 4096), dtype=np.uint8), np.zeros((4, 8192), dtype=np.uint8)
    memory = np.zeros(1 << 16, dtype=np.uint8)
    with RawClient(server.port) as raw, TcpTransport() as transport:
        keyspace = raw.open()
        region = transport.export(transport.register(Memory.of(memory)), Rights.READ)
        raw.send(put_request(raw, keyspace, small, region))
        raw.send(put_request(raw, keyspace, large, region))
        eventually(lambda: server.stats()["put_blocks"] == 8)  # both wait for the data connection
        raw.connect_data(transport)
        replies = [raw.receive() for _ in range(2)]
        statuses = sorted(status for reply in replies for status in reply.status)
        assert statuses == [PutStatus.STORED] * 4 + [PutStatus.DECLINED] * 4
        delete = protocol.DeleteRequest(raw.number(), keyspace, lookup_request(raw, keyspace, 4).keys)
        assert raw.call(delete, protocol.DeleteReply).count == 4
    stats = server.stats()
    assert (stats["blocks"], stats["bytes"]) == (0, 0)


# -- what cannot be meant


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, ["0.0.0.0", "loopback"]),
        (["--host", "example.org"], 2, ["example.org", "loopback"]),
        (["--capacity", "1000TiB"], 1, ["capacity", "the host has"]),
        (["--capacity", "much"], 2, ["--capacity 'much'", "64KiB"]),
        (["--capacity", "1KiB"], 2, ["capacity of 1024 bytes", "at least"]),
        (["--policy", "lruu"], 2, ["lruu", "did you mean 'lru'"]),
        (["--transports", "tpc"], 2, ["tpc", "did you mean 'tcp'"]),
        (["--transports", ","], 2, ["at least one"]),
        (["--port", "70000"], 2, ["0..65535"]),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: list[str], status: int, said: list[str]) -> None:
    with Program("-m", "kvrdma", "serve", "--port", "0", *arguments) as program:
        assert program.ended() == status
        assert all(words in program.text for words in said), program.text
        assert "Traceback" not in program.text


def test_a_port_in_use(server: Server) -> None:
    with Program("-m", "kvrdma", "serve", "--port", str(server.port), "--capacity", "16MiB") as second:
        assert second.ended() == 1
        assert f"cannot listen on 127.0.0.1:{server.port}" in second.text
        assert "in use" in second.text
        assert "Traceback" not in second.text


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("kvrdma://h?streems=2", "did you mean 'streams'"),
        ("kvrdma://h?transports=tpc", "did you mean 'tcp'"),
        ("kvrdma://h?streams=no", "a whole number"),
        ("kvrdma://h1,h2", "exactly one host"),
        ("kvrdam://h", "did you mean 'kvrdma'"),
    ],
)
def test_urls_that_cannot_be_meant(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_backend(url, Settings())
