"""What a session of the server makes of messages, without a connection: its bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvrdma import protocol
from kvrdma.backends.blockstore import BlockStore
from kvrdma.errors import ProtocolError
from kvrdma.keys import KeySpace
from kvrdma.layout import Shard
from kvrdma.policies import policies
from kvrdma.protocol import Message
from kvrdma.server.session import MAX_KEYSPACES, MAX_SHARDS, ClientSession, Slabs

SPACE = KeySpace("m", "w", "c", "bfloat16", "a", head_size=64, layers=2, block_tokens=4)
SHARD = Shard(0, 0, 2, 0, 1).encode()


def with_session(talk: Callable[[Callable[[Message], Message]], None]) -> None:
    """Have a conversation with a session, whose answers come at once."""

    async def scenario() -> None:
        said: list[Message] = []
        store = BlockStore(8 << 20, policies.get("lru"))
        session = ClientSession("peer", b"t", store, lambda _: Slabs({}, {}), said.append, lease_s=30)

        def ask(message: Message) -> Message:
            session.handle(message)
            return said.pop()

        talk(ask)
        await session.end()
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
