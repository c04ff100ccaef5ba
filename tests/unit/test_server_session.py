"""What a session of the server makes of messages, without a connection: its bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from kvrdma import protocol
from kvrdma.backends.blockstore import BlockStore
from kvrdma.errors import ProtocolError
from kvrdma.keys import KEY_NBYTES, KeySpace
from kvrdma.layout import Shard
from kvrdma.policies import policies
from kvrdma.protocol import Message
from kvrdma.server import session
from kvrdma.server.session import MAX_KEYSPACES, MAX_SHARDS, ClientSession, Slabs
from kvrdma.transports import Endpoint

SPACE = KeySpace("m", "w", "c", "bfloat16", "a", head_size=64, layers=2, block_tokens=4)
SHARD = Shard(0, 0, 2, 0, 1).encode()


def with_session(talk: Callable[[Callable[[Message], Message]], None]) -> None:
    """Have a conversation with a session, whose answers come at once."""

    async def scenario() -> None:
        said: list[Message] = []
        store = BlockStore(8 << 20, policies.get("lru"))
        client = ClientSession("peer", b"t", store, lambda _: Slabs({}, {}), said.append, lease_s=30)

        def ask(message: Message) -> Message:
            client.handle(message)
            return said.pop()

        talk(ask)
        await client.end()
        store.close()

    asyncio.run(scenario())


def opening(space: KeySpace) -> Message:
    return protocol.OpenKeySpace(1, space.to_fields(), space.digest)


def test_an_engine_may_update_its_weights_as_often_as_it_likes() -> None:
    """Each time it opens one more key space on the same connection; the oldest are closed."""

    def talk(ask: Callable[[Message], Message]) -> None:
        numbers = []
        for i in range(1, MAX_KEYSPACES + 5):
            reply = ask(opening(replace(SPACE, epoch=f"{i:032x}")))
            assert isinstance(reply, protocol.KeySpaceReply), reply
            numbers.append(reply.keyspace)
            assert isinstance(ask(opening(SPACE)), protocol.KeySpaceReply)  # still in use: not the oldest
        assert isinstance(ask(protocol.LookupRequest(1, numbers[-1], bytes(16), [SHARD])), protocol.LookupReply)
        with pytest.raises(ProtocolError, match="not opened"):
            ask(protocol.LookupRequest(1, numbers[0], bytes(16), [SHARD]))

    with_session(talk)


def test_a_key_space_is_small() -> None:
    def talk(ask: Callable[[Message], Message]) -> None:
        for fields in ({**SPACE.to_fields(), "model": "m" * (1 << 20)}, {"x" * (1 << 20): 1}):
            reply = ask(protocol.OpenKeySpace(1, fields, bytes(32)))
            assert isinstance(reply, protocol.ErrorReply)
            assert "at most" in reply.text
            assert len(reply.text) < 200

    with_session(talk)


def test_a_lookup_of_too_many_shards_is_refused() -> None:
    """Keys times shards is what it costs, on the loop that serves everybody."""

    def talk(ask: Callable[[Message], Message]) -> None:
        ask(opening(SPACE))
        assert isinstance(ask(protocol.LookupRequest(1, 0, bytes(16), [SHARD] * MAX_SHARDS)), protocol.LookupReply)
        with pytest.raises(ProtocolError, match=str(MAX_SHARDS)):
            ask(protocol.LookupRequest(1, 0, bytes(16), [SHARD] * (MAX_SHARDS + 1)))

    with_session(talk)


def test_what_waits_for_a_data_connection_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its size, not only by its number: a frame may be large, and a session holds it until it is done."""
    n = 8
    assert session.MAX_GET_KEYS * (4 * 8 + 8 + 1) < protocol.MAX_FRAME - 4096  # what the reply says of each
    monkeypatch.setattr(session, "MAX_GET_KEYS", n)
    monkeypatch.setattr(session, "MAX_LEASED_KEYS", 4 * n)
    monkeypatch.setattr(session, "MAX_PUT_NBYTES", 4 * n * (16 + 8 + 4 * 8))

    async def scenario() -> None:
        said: list[Message] = []
        store = BlockStore(8 << 20, policies.get("lru"))
        client = ClientSession("peer", b"t", store, lambda _: Slabs({}, {}), said.append, lease_s=30)
        client.handle(opening(SPACE))
        for _ in range(5):
            client.handle(protocol.GetRequest(2, 0, SHARD, bytes(KEY_NBYTES * n)))
        client.handle(protocol.GetRequest(3, 0, SHARD, bytes(KEY_NBYTES * (n + 1))))
        rows, zeros = np.arange(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        spans = protocol.pack_columns(rows, zeros, zeros, zeros + 1)
        put = protocol.PutRequest(4, 0, SHARD, bytes(16 * n), bytes(8 * n), [["tcp", 1, bytes(20)]], spans, 100_000)
        for _ in range(5):
            client.handle(put)
        refused = [(reply.seq, reply.text) for reply in said if isinstance(reply, protocol.ErrorReply)]
        assert [seq for seq, _ in refused] == [2, 3, 4]
        assert all("at most" in text for _, text in refused)
        await client.end()
        store.close()

    asyncio.run(scenario())


class Here:
    """A data connection that is only there: what is asked of it in these tests moves no byte."""

    scheme = "tcp"

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("connected", [False, True])
def test_there_are_only_so_many_leases(monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    """Those that are held, and gets that wait for the data connection and will hold one."""
    monkeypatch.setattr(session, "MAX_LEASES", 4)

    async def scenario() -> None:
        said: list[Message] = []
        store = BlockStore(8 << 20, policies.get("lru"))
        client = ClientSession("peer", b"t", store, lambda _: Slabs({}, {}), said.append, lease_s=30)
        client.handle(opening(SPACE))
        if connected:
            client.attach(cast("Endpoint", Here()))
        for number in range(10, 16):
            client.handle(protocol.GetRequest(number, 0, SHARD, bytes(KEY_NBYTES)))
        refused = [(reply.seq, reply.text) for reply in said if isinstance(reply, protocol.ErrorReply)]
        assert refused == [(number, "a connection holds at most 4 leases") for number in (14, 15)]
        if connected:
            assert client.n_leases == 4
            held = [reply.lease for reply in said if isinstance(reply, protocol.GetReply)]
            client.handle(protocol.Release(0, held[0], b""))
            client.handle(protocol.GetRequest(16, 0, SHARD, bytes(KEY_NBYTES)))
            assert isinstance(said[-1], protocol.GetReply)
        await client.end()
        store.close()

    asyncio.run(scenario())


def test_there_are_only_so_many_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_PUTS", 4)

    async def scenario() -> None:
        said: list[Message] = []
        store = BlockStore(8 << 20, policies.get("lru"))
        client = ClientSession("peer", b"t", store, lambda _: Slabs({}, {}), said.append, lease_s=30)
        client.handle(opening(SPACE))
        zero = np.zeros(1, dtype=np.int64)
        spans = protocol.pack_columns(zero, zero, zero, zero + 1)
        for number in range(10, 16):
            key = bytes([number]) * KEY_NBYTES
            client.handle(protocol.PutRequest(number, 0, SHARD, key, bytes(8), [["tcp", 1, b""]], spans, 100_000))
        refused = [(reply.seq, reply.text) for reply in said if isinstance(reply, protocol.ErrorReply)]
        assert refused == [(number, "a connection has at most 4 puts under way") for number in (14, 15)]
        await client.end()
        store.close()

    asyncio.run(scenario())
