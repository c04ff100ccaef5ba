"""What happens when a process, its memory or its peer fails: nothing is lost, nobody waits for ever, no byte is wrong.

docs/reliability.md has the matrix; most of its rows are tested here and in test_pool_server.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import (
    PATIENCE_S,
    Client,
    Program,
    RawClient,
    Server,
    eventually,
    get_request,
    put_request,
)
from slabs import alter

from kvrdma import protocol
from kvrdma.backends import GetStatus, PutStatus
from kvrdma.memory import Memory
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.transports import RemoteRegion, Rights
from kvrdma.transports.tcp import TcpTransport
from kvrdma.transports.tcp.session import parse_address

NOWHERE = RemoteRegion("tcp", 1 << 20, bytes(20))
IMPATIENT = """
import asyncio
from kvrdma.cli.serve import _serve
from kvrdma.server import PoolServer, ServerSettings, app, connection
from kvrdma.transports import listeners
app.HELLO_TIMEOUT_S = connection.FRAME_TIMEOUT_S = listeners.GREETING_TIMEOUT_S = 2.0
asyncio.run(_serve(PoolServer(ServerSettings(port=0, capacity=16 << 20))))
"""
WITHOUT_LOCKED_MEMORY = """
import ctypes, os, resource, sys
ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK: root would not be limited
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
os.execv(sys.executable, [sys.executable, "-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB"])
"""


@pytest.fixture
def impatient() -> Iterator[Server]:
    """A server that waits two seconds for whoever has begun something."""
    with Server(arguments=("-c", IMPATIENT)) as server:
        yield server


def at_end(sock: socket.socket) -> bool:
    """Wait until the other side has closed."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


# -- frames


@pytest.mark.parametrize("length", [protocol.MAX_FRAME + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("hello", [False, True])
def test_a_frame_too_large_is_refused_at_its_length(server: Server, client: Client, hello: bool, length: int) -> None:
    with RawClient(server.port, hello=hello) as raw:
        raw.sock.sendall((b"" if hello else protocol.preface()) + struct.pack(">I", length))
        goodbye = raw.receive()
        assert isinstance(goodbye, protocol.Goodbye)
        assert str(length) in goodbye.text
        assert raw.at_end()
    assert client.put().result().all()


def test_half_a_frame_and_then_silence_ends_that_connection(impatient: Server) -> None:
    with Client(impatient.url) as client, RawClient(impatient.port) as raw:
        eventually(client.usable)
        assert client.put().result().all()
        raw.sock.sendall(protocol.encode(protocol.StatsRequest(1)) + protocol.encode(protocol.StatsRequest(2))[:5])
        assert isinstance(raw.receive(), protocol.StatsReply)
        goodbye = raw.receive()
        assert isinstance(goodbye, protocol.Goodbye)
        assert "whole" in goodbye.text
        assert raw.at_end()
        assert client.get().result().all()  # whoever has begun nothing may be silent for as long as it likes


def test_a_frame_that_dribbles_in_ends_all_the_same(impatient: Server) -> None:
    with RawClient(impatient.port) as raw:
        dribble(raw.sock, protocol.encode(protocol.Goodbye(0, "x" * 10_000)))
        assert raw.at_end()


@pytest.mark.parametrize("whole", [protocol.preface() + bytes(100), protocol.preface() + struct.pack(">I", 100)])
def test_a_hello_that_never_ends(impatient: Server, whole: bytes) -> None:
    with RawClient(impatient.port, hello=False) as raw:
        dribble(raw.sock, whole)
        assert at_end(raw.sock)
    with Client(impatient.url) as client:
        eventually(client.usable)  # two seconds can be short on a busy machine
        assert client.put().result().all()


def test_a_greeting_of_a_data_stream_that_never_ends(impatient: Server) -> None:
    with RawClient(impatient.port) as raw, socket.create_connection(parse_address(raw.data_address)) as sock:
        sock.settimeout(PATIENCE_S)
        sock.sendall(b"kvrtcp")
        assert at_end(sock)


def dribble(sock: socket.socket, raw: bytes) -> None:
    """Send byte by byte, so that there is always something new, until the other side ends it."""
    sent, deadline = 0, time.monotonic() + PATIENCE_S
    with contextlib.suppress(ConnectionError):
        while sent < len(raw) - 1:
            assert time.monotonic() < deadline, "the server waits on"
            sock.sendall(raw[sent : sent + 1])
            sent += 1
            sock.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                if not sock.recv(1, socket.MSG_PEEK):
                    break
                if sent > 200:
                    break  # it has said goodbye
    sock.settimeout(PATIENCE_S)


# -- memory


def test_memory_that_may_not_be_locked_is_used_with_a_warning() -> None:
    with Server(arguments=("-c", WITHOUT_LOCKED_MEMORY)) as server, Client(server.url) as client:
        assert "Max locked memory         0" in Path(f"/proc/{server.process.pid}/limits").read_text()
        assert "not page-locked" in server.text
        assert client.put().result().all()
        assert client.get().result().all()
        assert all(client.came(row) for row in range(client.n))
        server.signal(signal.SIGTERM)
        assert server.ended() == 0


def test_a_store_whose_every_block_is_being_read_declines_puts() -> None:
    with Server(capacity="8MiB") as server, Client(server.url, n=8, nbytes=1 << 20) as client:
        assert client.put().result().all()
        with (
            Client(server.url, n=4, nbytes=1 << 20, first=100) as other,
            RawClient(server.port) as raw,
            data_connection(raw),
        ):
            reply = raw.call(get_request(raw, raw.open(), 8), protocol.GetReply)
            assert reply.present == bytes([1] * 8)
            put = other.put()
            assert not put.result(PATIENCE_S).any()
            assert put.status.tolist() == [PutStatus.DECLINED] * 4
            assert put.error is None
            raw.send(protocol.Release(0, reply.lease, b""))
            eventually(lambda: server.stats()["pinned_blocks"] == 0)
            assert other.put().result(PATIENCE_S).all()
            assert other.get().result(PATIENCE_S).all()
            assert all(other.came(row) for row in range(other.n))
        client.clear()
        get = client.get()
        assert get.result(PATIENCE_S).sum() == 4
        assert all(client.came(row) for row in np.flatnonzero(get.ok))


@contextlib.contextmanager
def data_connection(raw: RawClient) -> Iterator[TcpTransport]:
    with TcpTransport() as transport:
        raw.connect_data(transport)
        yield transport


def test_a_block_that_changed_in_the_pool_is_a_miss_and_stored_again(server: Server, client: Client) -> None:
    assert client.put().result().all()
    alter(server.process.pid, client.content[3].tobytes())
    get = client.get()
    assert get.result().tolist() == [row != 3 for row in range(8)]
    assert get.status[3] == GetStatus.CHECKSUM
    assert all(client.came(row) for row in range(8) if row != 3)
    eventually(lambda: server.stats().get("dropped_wrong") == 1)
    assert client.found() == [row != 3 for row in range(8)]
    put = client.put()
    assert put.result().all()
    assert put.status.tolist() == [PutStatus.STORED if row == 3 else PutStatus.EXISTS for row in range(8)]
    client.clear()
    assert client.get().result().all()
    assert all(client.came(row) for row in range(8))
    assert server.stats()["dropped_wrong"] == 1


# -- clients beside each other


def test_the_same_blocks_put_twice_at_once_are_stored_once(server: Server, client: Client) -> None:
    """By hand, so that they are certain to meet: both are reserved before either can be read."""
    content = client.content[:4]
    with RawClient(server.port) as first, RawClient(server.port) as second, TcpTransport() as transport:
        exported = transport.export(transport.register(Memory.of(np.ascontiguousarray(content))), Rights.READ)
        first.send(put_request(first, first.open(), content, exported))
        eventually(lambda: server.stats()["reserved_blocks"] == 4)
        reply = second.call(put_request(second, second.open(), content, exported), protocol.PutReply)
        assert list(reply.status) == [PutStatus.DECLINED] * 4
        first.connect_data(transport)
        reply = first.receive()
        assert isinstance(reply, protocol.PutReply)
        assert list(reply.status) == [PutStatus.STORED] * 4
    assert client.get(slice(0, 4)).result().all()
    assert all(client.came(row) for row in range(4))
    stats = server.stats()
    assert (stats["blocks"], stats["stored_blocks"], stats["reserved_blocks"]) == (4, 4, 0)


def test_many_clients_put_the_same_blocks_at_once(server: Server, thorough: bool) -> None:
    failures: list[str] = []
    n_rounds = 200 if thorough else 10

    def work(barrier: threading.Barrier) -> None:
        with Client(server.url) as client:
            for _ in range(n_rounds):
                barrier.wait(PATIENCE_S)
                put = client.put()
                put.result(PATIENCE_S)
                if set(put.status) - {PutStatus.STORED, PutStatus.EXISTS, PutStatus.DECLINED} or put.error:
                    failures.append(f"{put.status.tolist()} {put.error}")
                barrier.wait(PATIENCE_S)
                client.clear()
                if not client.get().result(PATIENCE_S).all() or not all(client.came(row) for row in range(client.n)):
                    failures.append("a block was not there, or was wrong")
                if barrier.wait(PATIENCE_S) == 0:
                    client.backend.delete(client.batch, timeout=PATIENCE_S)

    barrier = threading.Barrier(3, timeout=PATIENCE_S)
    threads = [threading.Thread(target=work, args=(barrier,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert server.stats()["stored_blocks"] == 8 * n_rounds


# -- a server that dies with a put half done


def test_a_server_killed_between_reserve_and_commit_has_nothing_of_it_when_it_is_back() -> None:
    with Server() as server, Client(server.url) as client:
        assert client.put(slice(0, 4)).result().all()
        with RawClient(server.port) as raw:
            raw.send(put_request(raw, raw.open(), client.content, NOWHERE))
            eventually(lambda: server.stats()["reserved_blocks"] == 4)  # the other four are there
            server.signal(signal.SIGKILL)
            server.ended()
            assert raw.at_end()
        with Server(port=server.port) as again:
            eventually(client.usable)
            assert client.found() == [False] * 8
            assert client.put().result(PATIENCE_S).all()
            assert client.get().result(PATIENCE_S).all()
            assert all(client.came(row) for row in range(8))
            assert again.stats()["reserved_blocks"] == 0


# -- a client that is stopped

STOPS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serving import *
with Client(sys.argv[1], n=48, nbytes=1 << 20, first=5000) as client:
    client.usable()
    print("ready", file=sys.stderr, flush=True)
    while client.put(timeout=1).result().all():
        client.backend.delete(client.batch, timeout=30)
    print("failed", client.pool.n_leases, file=sys.stderr, flush=True)
"""


def test_others_are_served_while_a_client_is_stopped_in_the_middle_of_a_put(server: Server, client: Client) -> None:
    with Program("-c", STOPS, server.tcp_url) as other:
        other.says("ready")
        eventually(lambda: client.backend.stats(timeout=PATIENCE_S)["reserved_blocks"])
        other.signal(signal.SIGSTOP)
        rounds = 0
        while client.backend.stats(timeout=PATIENCE_S)["reserved_blocks"] or rounds < 3:
            rounds += 1
            assert client.put().result(PATIENCE_S).all()
            client.clear()
            assert client.get().result(PATIENCE_S).all()
            assert all(client.came(row) for row in range(client.n))
            client.backend.delete(client.batch, timeout=PATIENCE_S)
        other.signal(signal.SIGCONT)
        assert other.says("failed ") == "0"
        assert other.ended() == 0
    assert "Traceback" not in server.text


# -- a client that vanishes without a word


@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ECONNRESET])
def test_a_network_that_fails_under_a_client_ends_its_session_quietly(code: int) -> None:
    """In this process, where the kernel's word can be put into the server's mouth."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        unexpected: list[dict[str, object]] = []
        loop.set_exception_handler(lambda _, context: unexpected.append(context))
        readers: list[asyncio.StreamReader] = []
        server = PoolServer(ServerSettings(port=0, capacity=16 << 20))
        await server.start()

        async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            readers.append(reader)
            await server._on_client(reader, writer)

        async with await asyncio.start_server(on_client, "127.0.0.1", 0) as port:
            raw = await loop.run_in_executor(None, RawClient, port.sockets[0].getsockname()[1])
            assert server.stats()["clients"] == 1
            readers[0].set_exception(OSError(code, os.strerror(code)))
            async with asyncio.timeout(PATIENCE_S):
                while server.stats()["clients"]:
                    await asyncio.sleep(0.005)
                await loop.run_in_executor(None, raw.at_end)
            raw.close()
        await server.stop()
        assert "protocol_errors" not in server.stats()
        assert unexpected == []

    asyncio.run(scenario())


def test_a_limit_of_the_process_is_one_line_and_no_traceback() -> None:
    command = f"ulimit -f 1024; exec {sys.executable} -m kvrdma serve --port 0 --capacity 512MiB"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "bytes" in ended.stderr.splitlines()[-1]
