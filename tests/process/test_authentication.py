"""A pool server with a token: who gets in, what leaves before, and what an open door would look like."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import PATIENCE_S, Client, Program, RawClient, Server, eventually, get_request

from kvrdma import protocol
from kvrdma.auth import Role, make_nonce, prove
from kvrdma.backends import open_backend
from kvrdma.errors import AuthenticationError, KVRDMAError, TransportError
from kvrdma.logs import LINES
from kvrdma.protocol import FrameDecoder
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.server.app import MAX_STRANGERS
from kvrdma.settings import Settings
from kvrdma.transports.tcp import TcpTransport
from kvrdma.transports.tcp.wire import GREETING_NBYTES

TOKEN = "a-token-for-these-tests-0123456789"
OTHER = "a-token-of-somebody-else-01234567"


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return str(file)


@pytest.fixture
def guarded(token_file: str) -> Iterator[Server]:
    """A pool server with a token."""
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--token-file", token_file)
    with Server(arguments=serve, token_file=token_file) as server:
        yield server


def stats(url: str, **settings: str) -> dict[str, object]:
    with open_backend(url, Settings.read(settings)) as backend:
        return backend.stats(timeout=PATIENCE_S)


def test_who_has_the_token_is_served(guarded: Server, token_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stats(guarded.url, token_file=token_file)["clients"] == 1
    assert stats(f"{guarded.url}?token_file={token_file}")["clients"] == 1
    monkeypatch.setenv("KVRDMA_TOKEN", TOKEN)
    with Client(guarded.url) as client:
        assert client.put().result().all()
        assert client.get().result().all()
        assert all(client.came(row) for row in range(8))
    assert TOKEN not in guarded.text


def test_who_has_none_or_another_is_told_so(guarded: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(OTHER)
    with pytest.raises(AuthenticationError, match="wants a token"):
        stats(guarded.url)
    with pytest.raises(AuthenticationError, match="another token"):
        stats(guarded.url, token_file=str(other))
    assert guarded.stats()["refused_proofs"] == 1
    assert OTHER not in guarded.text


def test_a_client_with_a_token_does_not_trust_a_server_without(server: Server, token_file: str) -> None:
    with pytest.raises(AuthenticationError, match="it has no token"):
        stats(server.url, token_file=token_file)


def test_a_server_that_only_claims_to_have_the_token_is_refused(token_file: str) -> None:
    """It sends the client's own proof back, and gets nothing but a goodbye."""
    said: list[protocol.Message] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def lie() -> None:
            sock, _ = listener.accept()
            decoder = FrameDecoder(peer="client")

            def receive() -> protocol.Message | None:
                while data := sock.recv(1 << 16):
                    for message in decoder.feed(data):
                        return message
                return None

            with sock:
                sock.sendall(protocol.preface())
                hello = receive()
                assert isinstance(hello, protocol.Hello)
                sock.sendall(protocol.encode(protocol.Challenge(hello.seq, bytes(16), 1)))
                proof = receive()
                assert isinstance(proof, protocol.Proof)
                offers = [["tcp", "127.0.0.1:1"]]
                sock.sendall(protocol.encode(protocol.HelloReply(proof.seq, proof.proof, "liar", bytes(16), offers)))
                while (message := receive()) is not None:
                    said.append(message)

        liar = threading.Thread(target=lie)
        liar.start()
        with pytest.raises(AuthenticationError, match="does not know the token"):
            stats(f"kvrdma://127.0.0.1:{listener.getsockname()[1]}", token_file=token_file)
        liar.join(PATIENCE_S)
    assert all(isinstance(message, protocol.Goodbye) for message in said)


def test_nothing_but_a_nonce_leaves_before_the_proof(guarded: Server) -> None:
    with RawClient(guarded.port, hello=False) as raw:
        raw.sock.sendall(protocol.preface())
        challenge = raw.call(protocol.Hello(1, "stranger", make_nonce()), protocol.Challenge)
        assert (len(challenge.nonce), challenge.has_token) == (16, 1)
        raw.send(protocol.Proof(2, bytes(32)))
        answer = raw.receive()
        assert isinstance(answer, protocol.ErrorReply)
        assert raw.at_end()


@pytest.mark.parametrize(
    "message",
    [
        lambda raw: protocol.StatsRequest(1),
        lambda raw: get_request(raw, 0, 1),
        lambda raw: protocol.HelloReply(1, bytes(32), "me", bytes(16), []),
        lambda raw: protocol.Proof(1, bytes(32)),
    ],
    ids=["stats", "get", "a reply", "a proof before the challenge"],
)
def test_no_request_is_answered_before_the_proof(guarded: Server, message: object) -> None:
    with RawClient(guarded.port, hello=False) as raw:
        raw.sock.sendall(protocol.preface())
        raw.send(message(raw))  # type: ignore[operator]
        assert isinstance(raw.receive(), protocol.Goodbye)
        assert raw.at_end()
    with RawClient(guarded.port, hello=False) as raw:
        raw.sock.sendall(protocol.preface())
        raw.call(protocol.Hello(1, "stranger", make_nonce()), protocol.Challenge)
        raw.send(message(raw))  # type: ignore[operator]
        assert isinstance(raw.receive(), protocol.Goodbye | protocol.ErrorReply)
        assert raw.at_end()


def test_requests_sent_behind_the_hello_are_not_kept_for_later(guarded: Server) -> None:
    with RawClient(guarded.port, hello=False) as raw:
        hello = protocol.encode(protocol.Hello(1, "eager", make_nonce()))
        raw.sock.sendall(protocol.preface() + hello + protocol.encode(protocol.StatsRequest(2)))
        assert isinstance(raw.receive(), protocol.Goodbye)
        assert raw.at_end()


def test_a_proof_that_was_overheard_is_of_no_use(guarded: Server) -> None:
    token, nonce = TOKEN.encode(), make_nonce()
    with RawClient(guarded.port, hello=False) as raw:
        raw.sock.sendall(protocol.preface())
        challenge = raw.call(protocol.Hello(1, "honest", nonce), protocol.Challenge)
        overheard = prove(token, Role.CLIENT, protocol.PURPOSE, nonce, challenge.nonce)
        reply = raw.call(protocol.Proof(2, overheard), protocol.HelloReply)
    with RawClient(guarded.port, hello=False) as thief:
        thief.sock.sendall(protocol.preface())
        fresh = thief.call(protocol.Hello(1, "honest", nonce), protocol.Challenge)
        assert fresh.nonce != challenge.nonce
        thief.send(protocol.Proof(2, overheard))
        assert isinstance(thief.receive(), protocol.ErrorReply)
        assert thief.at_end()
    with RawClient(guarded.port, hello=False) as thief:  # reflected: the server's own proof
        thief.sock.sendall(protocol.preface())
        thief.call(protocol.Hello(1, "honest", challenge.nonce), protocol.Challenge)
        thief.send(protocol.Proof(2, reply.proof))
        assert isinstance(thief.receive(), protocol.ErrorReply)


def test_a_nonce_of_another_length_is_refused(guarded: Server) -> None:
    for nonce in (b"", b"n" * 15, b"n" * 17):
        with RawClient(guarded.port, hello=False) as raw:
            raw.sock.sendall(protocol.preface() + protocol.encode(protocol.Hello(1, "me", nonce)))
            assert isinstance(raw.receive(), protocol.Goodbye)


def test_a_frame_before_the_proof_is_small(guarded: Server) -> None:
    with RawClient(guarded.port, hello=False) as raw:
        raw.sock.sendall(protocol.preface() + (5000).to_bytes(4, "big"))
        assert "5000 bytes" in raw.receive().text  # type: ignore[attr-defined]
        assert raw.at_end()


def test_the_data_connection_wants_its_own_proof(guarded: Server) -> None:
    """The ticket alone, the token itself, or another session's secret do not open it."""
    with RawClient(guarded.port, hello=False) as raw, RawClient(guarded.port, hello=False) as other:
        raw.greet(TOKEN.encode())
        other.greet(TOKEN.encode())
        with TcpTransport() as transport:
            for secret in (b"", TOKEN.encode(), other.stream_secret):
                with pytest.raises(TransportError):
                    raw.connect_data(transport, secret=secret)
            assert not raw.connect_data(transport).closed()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_any_bind_but_loopback_wants_a_token(host: str) -> None:
    with Program("-m", "kvrdma", "serve", "--host", host, "--port", "0") as program:
        assert program.ended() == 2
    assert "without a token only loopback" in program.text
    ServerSettings(host=host, token=b"t" * 16)


def test_a_server_that_listens_everywhere_is_reached_by_the_name_that_was_given(token_file: str) -> None:
    serve = ("-m", "kvrdma", "serve", "--host", "0.0.0.0", "--port", "0", "--capacity", "16MiB")
    with (
        Server(arguments=(*serve, "--token-file", token_file), token_file=token_file) as server,
        Client(f"{server.url}?token_file={token_file}") as client,
    ):
        assert client.put().result().all()


def test_a_server_on_ipv6(token_file: str) -> None:
    serve = ("-m", "kvrdma", "serve", "--host", "::1", "--port", "0", "--capacity", "16MiB")
    with (
        Server(arguments=(*serve, "--token-file", token_file)) as server,
        Client(f"kvrdma://[::1]:{server.port}?token_file={token_file}") as client,
    ):
        assert client.put().result().all()
        assert client.get().result().all()


def test_a_token_that_cannot_be_read_does_not_open_the_door(tmp_path: Path) -> None:
    for arguments in (("--token-file", str(tmp_path / "nothing")), ("--token-file", os.devnull)):
        with Program("-m", "kvrdma", "serve", "--port", "0", *arguments) as program:
            assert program.ended() == 2
        assert "token_file" in program.text


def test_no_repr_shows_a_token() -> None:
    settings = ServerSettings(token=TOKEN.encode())
    assert TOKEN not in repr(settings)
    assert TOKEN not in repr(PoolServer)


def test_strangers_do_not_keep_clients_out(token_file: str) -> None:
    """As many connections as there can be that never prove themselves: others get in once their time is over."""
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--token-file", token_file)
    with Server(arguments=serve, token_file=token_file) as server:
        strangers = [
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) for _ in range(MAX_STRANGERS + 9)
        ]
        try:

            def served() -> bool:
                try:
                    return bool(stats(server.url, token_file=token_file))
                except KVRDMAError:
                    return False

            eventually(served)
            assert int(str(stats(server.url, token_file=token_file)["refused_clients"])) >= 9
        finally:
            for sock in strangers:
                sock.close()


def test_strangers_do_not_fill_the_log(guarded: Server, token_file: str) -> None:
    """Many wrong proofs, and much garbage on the data port: a few lines, and how many more there were."""
    n = 5 * LINES
    for _ in range(n):
        with RawClient(guarded.port, hello=False) as raw, pytest.raises(AssertionError, match="another token"):
            raw.greet(b"a token that is not the one")
    with RawClient(guarded.port, hello=False) as raw:
        raw.greet(TOKEN.encode())
        host, port = raw.data_address.rsplit(":", 1)
        for _ in range(n):
            with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
                sock.sendall(bytes(GREETING_NBYTES))
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):
                        pass
    assert stats(guarded.url, token_file=token_file)["refused_proofs"] == n
    guarded.signal(signal.SIGTERM)
    assert guarded.ended() == 0
    for said in ("its proof does not hold", "tcp listener"):
        assert sum(said in line for line in guarded.lines) == LINES
    assert sum(f"{n - LINES} more warnings" in line for line in guarded.lines) == 2


def test_there_are_only_so_many_clients() -> None:
    serve = ("-m", "kvrdma", "serve", "--port", "0", "--capacity", "16MiB", "--max-clients", "2")
    with Server(arguments=serve) as server:
        here = [RawClient(server.port), RawClient(server.port)]
        with pytest.raises(KVRDMAError, match="2 clients are here"):
            stats(server.url)
        for raw in here:
            raw.close()
        eventually(lambda: stats_or_none(server.url) is not None)


def stats_or_none(url: str) -> dict[str, object] | None:
    try:
        return stats(url)
    except KVRDMAError:
        return None
