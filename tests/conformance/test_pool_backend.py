"""The client of the pool server passes the suite, against a server in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvrdma.backends import StorageBackend, open_backend
from kvrdma.memory import PinnedPool
from kvrdma.settings import Settings
from kvrdma.testing.backends import PATIENCE_S, Bench, StorageBackendSuite


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


class TestPoolBackend(StorageBackendSuite):
    options = ""

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


class TestPoolBackendOnFourStreams(TestPoolBackend):
    options = "?streams=4&transports=tcp"
