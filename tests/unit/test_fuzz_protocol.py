"""The control plane's bytes, almost right: one kind of error comes out, and what is read reads the same again."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import Any

import numpy as np
import pytest
from fuzzing import Fuzzer, Fuzzing

from kvrdma import protocol
from kvrdma.backends import PutStatus
from kvrdma.backends.blockstore import BlockStore
from kvrdma.backends.pool import read_region
from kvrdma.backends.pool.client import read_get_reply
from kvrdma.errors import ConfigError, ProtocolError
from kvrdma.keys import KEY_NBYTES, KeySpace
from kvrdma.layout import Shard, checksum
from kvrdma.memory import Memory, Spans
from kvrdma.policies import policies
from kvrdma.protocol import FrameDecoder, Message, decode, encode, preface
from kvrdma.server.session import ClientSession, Slabs
from kvrdma.transports import RemoteRegion, Rights
from kvrdma.transports.inproc import InprocTransport

SPACE = KeySpace("m", "w", "c", "bfloat16", "a", head_size=64, layers=2, block_tokens=4)
SHARDS = [Shard(0, 0, 2, 0, 1), Shard(0, 0, 2, 1, 2)]
KEYS = [bytes([i]) * KEY_NBYTES for i in range(6)]
NBYTES = 64


def test_bodies(fuzzing: Fuzzing) -> None:
    before = b""
    for draw in fuzzing.inputs(2500, 300_000):
        body = draw.body(draw.message())
        match draw.randrange(5):
            case 0 | 1:
                body = draw.mutated(body)
            case 2:
                body = draw.spliced(body, before)
            case 3:
                body = draw.randbytes(draw.randrange(64))
        before = body
        try:
            message = decode(body)
        except ProtocolError:
            continue
        again = decode(encode(message)[4:])
        assert repr(again) == repr(message), body  # not ==: no NaN equals itself


def test_streams_of_frames(fuzzing: Fuzzing) -> None:
    for draw in fuzzing.inputs(500, 100_000):
        raw = preface() + b"".join(draw.frame(draw.body(draw.message())) for _ in range(draw.randrange(4)))
        if draw.chance(0.5):
            raw = draw.mutated(raw)
        most = draw.choice((16, 256, protocol.MAX_FRAME))
        decoder = FrameDecoder(peer="peer", max_frame=most)
        try:
            for portion in draw.portions(raw):
                for message in decoder.feed(portion):
                    assert isinstance(message, Message)
                assert len(decoder._buffer) < 4 + most
        except ProtocolError:
            continue


def test_key_spaces_shards_and_regions(fuzzing: Fuzzing) -> None:
    for draw in fuzzing.inputs(500, 100_000):
        named: dict[Any, Any] = dict(SPACE.to_fields())
        for _ in range(draw.randrange(3)):
            named[draw.choice(list(named)) if draw.chance(0.9) else draw.text()] = draw.value()
        if draw.chance(0.1):
            del named[draw.choice(list(named))]
        try:
            space = KeySpace.from_fields(named)
        except ConfigError:
            pass
        else:
            assert KeySpace.from_fields(space.to_fields()) == space
            assert len(space.digest) == 32
        raw = draw.mutated(SHARDS[0].encode())
        with suppress(ProtocolError):
            assert Shard.decode(raw).encode() == raw
        part = draw.rearranged(["tcp", 4096, bytes(20)]) if draw.chance(0.8) else draw.value()
        with suppress(ProtocolError):
            assert 1 <= read_region(part).nbytes < 1 << 63


def test_columns(fuzzing: Fuzzing) -> None:
    for draw in fuzzing.inputs(250, 50_000):
        raw, width = draw.columns(1, draw.randrange(9))[draw.randrange(3) :], draw.randrange(1, 5)
        try:
            assert protocol.unpack_columns(raw, width, what="columns").tobytes() == raw
            assert protocol.count_keys(raw, what="keys") * KEY_NBYTES == len(raw)
        except ProtocolError:
            assert len(raw) % (8 * width) or len(raw) % KEY_NBYTES


def test_what_a_server_says_of_leased_blocks(fuzzing: Fuzzing) -> None:
    """Whatever it says, no more is read than there is room for, and only from regions that it named."""
    memory = Memory.of(bytearray(4 * NBYTES))
    rows = np.arange(4, dtype=np.int64)
    target = Spans((memory,), 4, rows, np.zeros_like(rows), rows * NBYTES, np.full_like(rows, NBYTES))
    for draw in fuzzing.inputs(750, 150_000):
        n = draw.randrange(5)
        offsets = np.array([draw.int64() if draw.chance(0.1) else i * NBYTES for i in range(n)], dtype=np.int64)
        sizes = np.array([draw.int64() if draw.chance(0.1) else NBYTES for _ in range(n)], dtype=np.int64)
        columns = protocol.pack_columns(np.zeros(n, dtype=np.int64), offsets, sizes, np.arange(n, dtype=np.int64))
        present = bytes(draw.sample([1] * n + [0] * (4 - n), 4))
        reply: Any = protocol.GetReply(1, 1, 1, present, [["tcp", 1 << 20, bytes(20)]], columns, bytes(8 * n))
        for _ in range(draw.randrange(3)):
            reply = draw.altered(reply)
        try:
            there, found, checksums, regions = read_get_reply(reply, target)
        except ProtocolError:
            continue
        assert there.shape == (4,)
        assert found.shape == (4, there.sum())
        assert checksums.shape == (there.sum(),)
        assert (found[2] == NBYTES).all()
        assert ((found[0] >= 0) & (found[0] < len(regions)) & (found[1] >= 0)).all()


# -- what a session of the server makes of messages


def request(draw: Fuzzer, exported: RemoteRegion, content: np.ndarray, leases: list[int]) -> Message:
    """A request that makes sense, of few keys, so that they meet."""
    seq, keyspace, shard = draw.randrange(100), 0, draw.choice(SHARDS).encode()
    rows = [draw.randrange(len(KEYS)) for _ in range(draw.randrange(1, 5))]
    keys = b"".join(KEYS[row] for row in rows)
    match draw.randrange(8):
        case 0:
            return protocol.OpenKeySpace(seq, SPACE.to_fields(), SPACE.digest)
        case 1:
            return protocol.LookupRequest(seq, keyspace, keys, [s.encode() for s in SHARDS[: draw.randrange(1, 3)]])
        case 2 | 3:
            return protocol.GetRequest(seq, keyspace, shard, keys)
        case 4:
            lease = draw.choice(leases) if leases else 1
            return protocol.Release(0, lease, np.arange(draw.randrange(3), dtype="<i8").tobytes())
        case 5 if draw.chance(0.3):
            return protocol.DeleteRequest(seq, keyspace, keys)
    nbytes = draw.choice((NBYTES, NBYTES, 2 * NBYTES))
    checksums = [checksum(KEYS[row], shard, [content[:nbytes]]) ^ draw.chance(0.1) for row in rows]
    order = np.arange(len(rows), dtype=np.int64)
    columns = (order, np.zeros_like(order), np.zeros_like(order), np.full_like(order, nbytes))
    return protocol.PutRequest(
        seq,
        keyspace,
        shard,
        keys,
        np.array(checksums, dtype="<u8").tobytes(),
        [[exported.scheme, exported.nbytes, exported.token]],
        protocol.pack_columns(*columns),
        draw.choice((0, 1, 1000, draw.number())),
    )


def test_a_session_of_the_server(fuzzing: Fuzzing, caplog: pytest.LogCaptureFixture) -> None:
    """Requests and nonsense in any order: answers and `ProtocolError`, and nothing held when the client is gone."""
    content = np.frombuffer(bytearray(fuzzing.draw.randbytes(2 * NBYTES)), dtype=np.uint8)

    async def converse(draws: Iterable[Fuzzer], store: BlockStore, ours: InprocTransport, slabs: Slabs) -> None:
        said: list[Message] = []
        leases: list[int] = []
        session = ClientSession("peer", b"t", store, lambda _: slabs, said.append, lease_s=30.0)
        with InprocTransport() as theirs, closing(ours.listen("")) as listener:
            exported = theirs.export(theirs.register(Memory.of(content)), Rights.READ)
            if fuzzing.draw.chance(0.9):
                theirs.connect(listener.contact_address, timeout=5)
                session.attach(listener.accept(timeout=5))
            session.handle(protocol.OpenKeySpace(1, SPACE.to_fields(), SPACE.digest))
            with suppress(ProtocolError):
                for draw in draws:
                    message = draw.message() if draw.chance(0.02) else request(draw, exported, content, leases)
                    if draw.chance(0.15):
                        message = draw.altered(message)
                    session.handle(decode(encode(message)[4:]))
                    if draw.chance(0.2):
                        await asyncio.sleep(0)
                    leases += [reply.lease for reply in said if isinstance(reply, protocol.GetReply)]
                    for reply in said:
                        assert len(encode(reply)) < 1 << 20
                        if isinstance(reply, protocol.PutReply):
                            assert set(reply.status) <= set(PutStatus)
                    said.clear()
            await session.end()
        stats = store.stats()
        assert (stats["pinned_blocks"], stats["reserved_blocks"]) == (0, 0)

    async def scenario() -> None:
        store = BlockStore(8 << 20, policies.get("lru"))
        with InprocTransport() as ours:
            slabs = Slabs({}, {})
            for memory in store.reserve_of_slabs.slabs:
                slabs.regions[id(memory)] = ours.register(memory)
                slabs.exports[id(memory)] = ours.export(slabs.regions[id(memory)], Rights.READ)
            inputs = fuzzing.inputs(1000, 150_000)
            for draw in inputs:
                await converse(itertools.chain([draw], itertools.islice(inputs, 39)), store, ours, slabs)
        assert store.counts["stored_blocks"]
        assert store.counts["get_hits"]
        store.close()

    asyncio.run(scenario())
    assert [record.message for record in caplog.records if record.exc_info] == []
