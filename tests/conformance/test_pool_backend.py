"""The client of the pool server passes the suite, against a server in a process of its own."""

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import ClassVar

import numpy as np
import pytest

from kvrdma.backends import GetStatus, PutStatus, StorageBackend, open_backend
from kvrdma.memory import MemfdSlabs, Memory, PinnedPool, Spans
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.settings import Settings
from kvrdma.testing.backends import PATIENCE_S, SHARD, Bench, StorageBackendSuite


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a pool server."""
    command = [sys.executable, "-m", "kvrdma", "serve", "--port", "0", "--capacity", "64MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = next((line for line in process.stderr if "listening on" in line), "")
            assert line, f"the server ended with {process.wait()}"
            yield line.rsplit(maxsplit=1)[1]
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


@contextlib.contextmanager
def server_here() -> Iterator[PoolServer]:
    """A pool server in this process, whose memory a test can reach."""
    started: Future[PoolServer] = Future()
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = PoolServer(ServerSettings(port=0, capacity=16 << 20))
        await server.start()
        started.set_result(server)
        await server.serve_until(stop)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield started.result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        loop.close()


def test_bytes_that_went_wrong_at_the_server_are_not_served_twice() -> None:
    """Whoever finds them says so, and a good block can take their place."""
    with server_here() as server, PinnedPool(4096, 16) as pool:
        host, port = server.address
        with open_backend(f"kvrdma://{host}:{port}", Settings()) as backend:
            bench = Bench(backend, pool)
            keys, source, target = bench.keys(4), pool.spans(range(4)), pool.spans(range(8, 12))
            assert bench.put(keys, source).ok.all()
            entry = server._store._entries[keys[2].tobytes() + SHARD.encode()]
            entry.view()[100] ^= 1
            got = bench.get(keys, target)
            assert got.status.tolist() == [GetStatus.OK, GetStatus.OK, GetStatus.CHECKSUM, GetStatus.OK]
            assert bench.get(keys, target).status[2] == GetStatus.MISSING
            assert backend.stats(timeout=PATIENCE_S)["dropped_wrong"] == 1
            assert bench.put(keys, source).status.tolist() == [PutStatus.EXISTS] * 2 + [
                PutStatus.STORED,
                PutStatus.EXISTS,
            ]
            assert bench.get(keys, target).ok.all()


@pytest.mark.parametrize("registered", ["before the first use", "afterwards"])
def test_memory_that_cannot_be_shared_goes_over_tcp(registered: str) -> None:
    """An engine's own memory has no descriptor: the pool leaves shared memory for a transport that takes it."""
    with server_here() as server, PinnedPool(4096, 16) as pool:
        host, port = server.address
        memory = Memory.of(bytearray(4096))
        with open_backend(f"kvrdma://{host}:{port}", Settings()) as backend:
            bench = Bench(backend, pool)
            if registered == "before the first use":
                backend.register(memory)
            keys = bench.keys(4)
            assert bench.put(keys, pool.spans(range(4))).ok.all()
            if registered == "afterwards":
                backend.register(memory)
            assert bench.get(keys, pool.spans(range(8, 12))).ok.all()
            assert bench.put(bench.keys(1), Spans((memory,), 1, *np.array([[0], [0], [0], [4096]]))).ok.all()


class TestPoolBackend(StorageBackendSuite):
    options = ""
    capacity: ClassVar[int | None] = 64 << 20

    @pytest.fixture(autouse=True)
    def _at(self, server: str) -> None:
        self.server = server

    def make_backend(self) -> StorageBackend:
        return open_backend(f"kvrdma://{self.server}{self.options}", Settings())

    def test_the_first_get_of_many_clients(self) -> None:
        """The data connection is known to the server before the client can ask for anything."""
        for _ in range(20):
            with PinnedPool(4096, 2) as pool, self.make_backend() as backend:
                bench = Bench(backend, pool)
                got = bench.get(bench.keys(1), pool.spans([0]))
                assert got.error is None


class TestPoolBackendOverSharedMemory(TestPoolBackend):
    options = "?transports=shm"

    def make_memory(self, nbytes: int) -> Memory:
        return MemfdSlabs().allocate(nbytes)

    def test_memory_that_cannot_be_shared_is_refused(self, bench: Bench) -> None:
        """No other transport may take its place here, and the error says what to do."""
        memory = Memory.of(bytearray(4096))
        bench.backend.register(memory)
        spans = Spans((memory,), 1, *np.array([[0], [0], [0], [4096]]))
        put = bench.put(bench.keys(1), spans)
        assert put.status.tolist() == [PutStatus.FAILED]
        assert "no descriptor" in str(put.error)


class TestPoolBackendOnFourStreams(TestPoolBackend):
    options = "?streams=4&transports=tcp"
