"""`kvrdma stats` and the metrics port of a real server."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from serving import PATIENCE_S, SPACE, Client, Program, RawClient, Server, eventually, get_request

from kvrdma import protocol
from kvrdma.server.exporter import MAX_REQUESTS
from kvrdma.transports.tcp import TcpTransport


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvrdma", *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def metrics(port: int) -> dict[str, float]:
    """Each sample by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_stats_as_one_object_and_as_tables(server: Server, client: Client) -> None:
    assert client.found() == [False] * 8
    assert client.put().result().all()
    assert client.put().result().all()
    assert client.get().result().all()
    ended = run("stats", server.url, "--json")
    assert ended.returncode == 0
    stats = json.loads(ended.stdout)
    assert (stats["blocks"], stats["stored_blocks"], stats["existing_blocks"], stats["get_hits"]) == (8, 8, 8, 8)
    assert stats["by_size"] == [{"nbytes": 64 << 10, "slabs": 1, "blocks": 8, "pinned": 0}]
    assert stats["misses"] == {"not_there": 8}
    taken = {name: sum(seconds["counts"]) for name, seconds in stats["seconds"].items()}
    assert taken == {"lookup": 1, "get": 1, "lease": 1, "put": 2}
    shown = run("stats", server.url)
    assert shown.returncode == 0
    assert "stored_blocks" in shown.stdout
    assert "65,536" in shown.stdout
    assert "not_there" in shown.stdout


def test_misses_have_reasons_that_add_up(server: Server) -> None:
    """Not there; evicted; or where another key space has blocks and this one is empty."""
    nbytes = 4 << 20  # the server holds 16 of them
    with Client(server.url, nbytes=nbytes) as client:
        assert client.put(slice(0, 4)).result().all()
        client.found()
        client.get().result()
        with Client(server.url, nbytes=nbytes, space=replace(SPACE, weights="tuned")) as other:
            other.found()
            other.get().result()
        with Client(server.url, n=16, nbytes=nbytes, first=100) as large:
            assert large.put().result().all()
        client.found()
        client.get().result()
    stats = server.stats()
    assert stats["misses"] == {"not_there": 2 * 4 + 2 * 4, "evicted": 2 * 4, "other_keyspace": 2 * 8}
    hits = stats["lookup_hits"] + stats["get_hits"]
    assert stats["lookup_blocks"] + stats["get_blocks"] == hits + sum(stats["misses"].values())


def test_stats_of_nobody() -> None:
    ended = run("stats", "kvrdma://127.0.0.1:1", "--json", "--timeout", "2")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "127.0.0.1:1" in ended.stderr
    wrong = run("stats", "kvrdmaa://127.0.0.1:1")
    assert wrong.returncode == 2
    assert "did you mean 'kvrdma'" in wrong.stderr


def test_stats_want_the_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-for-this-test-0123456789")
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--token-file", str(file))
    with Server(arguments=serve) as server:
        assert run("stats", server.url).returncode == 1
        assert run("stats", server.url, "--token-file", str(file), "--json").returncode == 0


def test_the_metrics_port() -> None:
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--metrics-port", "0")
    with Server(arguments=serve) as server:
        port = int(server.says("metrics on http://127.0.0.1:").split("/")[0])
        with Client(server.url) as client:
            assert client.put().result().all()
            assert client.get().result().all()
            found = metrics(port)
        assert found['kvrdma_pool_put_blocks_total{outcome="stored"}'] == 8
        assert found['kvrdma_pool_bytes_total{direction="out"}'] == 8 * (64 << 10)
        for operation in ("get", "put", "lease"):
            assert found[f'kvrdma_pool_operation_seconds_count{{operation="{operation}"}}'] == 1
        assert found["kvrdma_pool_clients"] == 1
        server.process.terminate()
        assert server.ended() == 0
        assert "Traceback" not in server.text


def test_the_metrics_port_of_an_ipv6_server_is_named_as_a_url() -> None:
    serve = ("-m", "kvrdma", "serve", "--host", "::1", "--port", "0", "--capacity", "16MiB", "--metrics-port", "0")
    with Server(arguments=serve) as server:
        url = "http://" + server.says("metrics on http://")
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            assert b"kvrdma_pool_capacity_bytes" in answer.read()


def test_a_stranger_at_the_metrics_port_is_in_nobodys_way() -> None:
    """More silent connections than it takes: they cost a few descriptors for seconds, and clients are served."""
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--metrics-port", "0")
    with Server(arguments=serve) as server, contextlib.ExitStack() as stack:
        port = int(server.says("metrics on http://127.0.0.1:").split("/")[0])
        process = psutil.Process(server.process.pid)
        descriptors = process.num_fds()
        for _ in range(20 * MAX_REQUESTS):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S))
        eventually(lambda: process.num_fds() <= descriptors + MAX_REQUESTS)
        with Client(server.url) as client:
            assert client.put().result().all()
        eventually(lambda: process.num_fds() <= descriptors)  # each had its five seconds
        assert metrics(port)['kvrdma_pool_put_blocks_total{outcome="stored"}'] == 8
        assert "Traceback" not in server.text


@pytest.mark.parametrize(
    "request_line", [b"POST /metrics HTTP/1.1", b"GET /secrets HTTP/1.1", b"\xff\xfe", b"GET " + b"x" * 20_000]
)
def test_what_the_metrics_port_does_not_serve(request_line: bytes) -> None:
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--metrics-port", "0")
    with Server(arguments=serve) as server:
        port = int(server.says("metrics on http://127.0.0.1:").split("/")[0])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as sock:
            sock.sendall(request_line + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"kvrdma_pool" not in sock.recv(1 << 16)
        assert metrics(port)
        assert "Traceback" not in server.text


def test_blocks_that_are_gone_and_still_read_are_shown(server: Server, client: Client) -> None:
    assert client.put().result().all()
    with RawClient(server.port) as raw, TcpTransport() as transport:
        raw.connect_data(transport)
        raw.call(get_request(raw, raw.open(), 8), protocol.GetReply)
        assert client.backend.delete(client.batch, timeout=PATIENCE_S) == 8
        assert (server.stats()["blocks"], server.stats()["zombie_blocks"]) == (0, 8)
    eventually(lambda: server.stats()["zombie_blocks"] == 0)


@pytest.mark.parametrize("timeout", ["nan", "0", "-1"])
def test_a_timeout_that_cannot_be(timeout: str) -> None:
    ended = run("stats", "kvrdma://127.0.0.1:1", "--timeout", timeout)
    assert ended.returncode == 2
    assert "--timeout" in ended.stderr


def test_a_secret_among_a_urls_options_is_not_shown() -> None:
    ended = run("stats", "kvrdma://127.0.0.1:1?token=hunter2hunter2hunter2")
    assert ended.returncode == 2
    assert "hunter2" not in ended.stderr


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_metrics_port_that_cannot_be(port: str) -> None:
    assert run("serve", "--port", "0", "--metrics-port", port).returncode == 2


def test_a_metrics_port_that_is_taken(server: Server) -> None:
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--metrics-port", str(server.port))
    with Program(*serve) as program:
        assert program.ended() == 1
    assert "cannot listen" in program.text
    assert "Traceback" not in program.text
