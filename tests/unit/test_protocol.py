"""The pool's control plane: every message comes back, however it arrives; nonsense raises one error only."""

import dataclasses
import itertools
import random
import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrdma import protocol
from kvrdma.backends.pool import read_region
from kvrdma.errors import ProtocolError
from kvrdma.protocol import FrameDecoder, Message, decode, encode, preface

MESSAGES = [
    cls for cls in vars(protocol).values() if isinstance(cls, type) and issubclass(cls, Message) and cls is not Message
]
NUMBERS = st.integers(0, (1 << 64) - 1)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.binary(max_size=8)
VALUES = {
    "int": NUMBERS,
    "str": st.text(max_size=20),
    "bytes": st.binary(max_size=60),
    "list[Any]": st.lists(LEAVES | st.lists(LEAVES, max_size=3), max_size=4),
    "dict[str, Any]": st.dictionaries(st.text(max_size=8), LEAVES, max_size=4),
}


def messages() -> st.SearchStrategy[Message]:
    return st.one_of(
        [st.builds(cls, **{f.name: VALUES[str(f.type)] for f in dataclasses.fields(cls)}) for cls in MESSAGES]
    )


def feed(decoder: FrameDecoder, *chunks: bytes) -> list[Message]:
    return [message for chunk in chunks for message in decoder.feed(chunk)]


def test_every_message_has_a_number_of_its_own() -> None:
    assert len(MESSAGES) == 19
    assert sorted(cls.TYPE for cls in MESSAGES) == list(range(1, 20))


def test_a_number_cannot_be_taken_twice() -> None:
    with pytest.raises(TypeError, match="taken"):

        class Impostor(Message):
            TYPE = 1


@given(messages())
def test_a_message_comes_back(message: Message) -> None:
    raw = encode(message)
    assert struct.unpack(">I", raw[:4])[0] == len(raw) - 4
    assert decode(raw[4:]) == message


@given(st.lists(messages(), max_size=6), st.data())
def test_bytes_may_come_in_any_portions(sent: list[Message], data: st.DataObject) -> None:
    raw = preface() + b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    chunks = [raw[a:b] for a, b in itertools.pairwise([0, *cuts, len(raw)])]
    assert feed(FrameDecoder(peer="peer"), *chunks) == sent


def test_byte_by_byte() -> None:
    sent = [protocol.Hello(1, "me", b"n" * 16), protocol.StatsRequest(2), protocol.Goodbye(0, "bye")]
    raw = preface() + b"".join(map(encode, sent))
    assert feed(FrameDecoder(peer="peer"), *(raw[i : i + 1] for i in range(len(raw)))) == sent


def test_what_is_fed_counts_whether_or_not_anybody_looks() -> None:
    """The messages of a portion may be asked for later."""
    decoder = FrameDecoder(peer="peer")
    raw = preface() + encode(protocol.StatsRequest(5))
    decoder.feed(raw[:10])
    assert list(decoder.feed(raw[10:])) == [protocol.StatsRequest(5)]


def test_another_version_is_named_with_ours() -> None:
    with pytest.raises(ProtocolError, match=rf"some peer speaks version 9 .* this side {protocol.VERSION}"):
        feed(FrameDecoder(peer="some peer"), struct.pack(">6sH", b"kvrdma", 9))
    with pytest.raises(ProtocolError, match=r"some peer does not speak.*HTTP"):
        feed(FrameDecoder(peer="some peer"), b"HTTP/1.1 200 OK")


def test_a_frame_may_be_as_large_as_is_allowed() -> None:
    message = protocol.Release(0, 1, bytes(1000))
    raw = encode(message)
    assert feed(FrameDecoder(peer="peer", max_frame=len(raw) - 4), preface(), raw) == [message]
    with pytest.raises(ProtocolError):
        feed(FrameDecoder(peer="peer", max_frame=len(raw) - 5), preface(), raw)


def test_a_frame_that_is_too_large_is_refused_before_it_comes() -> None:
    with pytest.raises(ProtocolError, match="frame of 101 bytes; 100"):
        feed(FrameDecoder(peer="peer", max_frame=100), preface() + struct.pack(">I", 101))
    with pytest.raises(ProtocolError, match=str(protocol.MAX_FRAME)):
        feed(FrameDecoder(peer="peer"), preface() + b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError, match="a frame holds"):
        encode(protocol.DeleteRequest(1, 0, bytes(protocol.MAX_FRAME + 1)))


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_raise_only_protocol_errors(seed: int) -> None:
    """1,000 inputs a seed: noise, and messages in which some bytes were changed."""
    rng = random.Random(seed)
    good = [
        encode(protocol.Hello(1, "me", b"n" * 16)),
        encode(protocol.OpenKeySpace(2, {"model": "m", "layers": 3}, bytes(32))),
        encode(protocol.LookupRequest(3, 0, bytes(48), [bytes(10), bytes(10)])),
        encode(protocol.GetReply(4, 1, 30_000, b"\1\0", [["tcp", 4096, bytes(20)]], bytes(32), bytes(8))),
        encode(protocol.PutRequest(5, 0, bytes(10), bytes(16), bytes(8), [["tcp", 1, b""]], bytes(32), 100)),
    ]
    for i in range(1000):
        if i % 2:
            body = rng.randbytes(rng.randrange(40))
            raw = struct.pack(">I", len(body)) + body
        else:
            changed = bytearray(rng.choice(good))
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(4, len(changed))] = rng.randrange(256)
            raw = bytes(changed)
        decoder = FrameDecoder(peer="peer")
        try:
            for message in feed(decoder, preface(), raw):
                assert decode(encode(message)[4:]) == message
        except ProtocolError:
            continue


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_first_bytes(raw: bytes) -> None:
    try:
        assert feed(FrameDecoder(peer="peer"), raw) == []
    except ProtocolError:
        return
    assert len(raw) < len(preface()) or raw.startswith(preface())


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        [None],
        ["1", 0, "me"],
        [True, 0, "me"],
        [1.0, 0, "me"],
        [-1, 0],
        [99, 0],
        [1],
        [1, 0],
        [1, 0, "me", 1],
        [1, "0", "me"],
        [1, True, "me"],
        [1, -1, "me"],
        [1, 0, b"me"],
        [1, 0, None],
        [3, 0, [["model", "m"]], b""],
        [5, 0, 0, "keys", []],
        [15, 0, {1: 2}],
    ],
)
def test_what_is_no_message(value: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(value))


def test_depth_and_length_bombs() -> None:
    for body in (
        b"\x91" * 100_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffx",
        b"\xc1",
        b"\xd6\xff\0\0\0\0",
        b"\xc7\x0c\xff" + b"\xff" * 12,
    ):
        with pytest.raises(ProtocolError):
            decode(body)


def test_a_message_is_not_nested_deeper_than_anybody_could_print() -> None:
    """Errors name the values that are wrong."""

    def body(depth: int) -> bytes:
        return b"\x94\x03\x01\x81\xa5model" + b"\x91" * depth + b"\xc0\xc4\0"

    assert decode(body(protocol.MAX_DEPTH - 1)).seq == 1
    for depth in (protocol.MAX_DEPTH, 1000):
        with pytest.raises(ProtocolError, match=r"OpenKeySpace.fields: nested"):
            decode(body(depth))


def test_a_frame_of_empty_lists_does_not_cost_many_times_its_bytes() -> None:
    n = 4 << 20
    for empty in (b"\x90", b"\x80"):
        body = b"\x95\x05\x01\x00\xc4\0\xdd" + struct.pack(">I", n) + empty * n
        tracemalloc.start()
        with pytest.raises(ProtocolError, match="lists and maps"):
            decode(body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * len(body)


# -- columns


@given(st.lists(st.tuples(*[st.integers(-(1 << 63), (1 << 63) - 1)] * 3), max_size=10))
def test_columns_come_back(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    raw = protocol.pack_columns(*columns)
    assert len(raw) == 24 * len(rows)
    np.testing.assert_array_equal(protocol.unpack_columns(raw, 3, what="test"), columns)


def test_columns_and_keys_that_are_not_whole() -> None:
    with pytest.raises(ProtocolError, match="thing: 25 bytes"):
        protocol.unpack_columns(bytes(25), 3, what="thing")
    with pytest.raises(ProtocolError, match="thing: 17 bytes"):
        protocol.count_keys(bytes(17), what="thing")
    assert protocol.count_keys(bytes(32), what="thing") == 2


def test_columns_are_little_endian() -> None:
    assert protocol.pack_columns(np.array([1, -2])).hex() == "0100000000000000feffffffffffffff"


# -- regions


def test_a_region_comes_back() -> None:
    region = read_region(["tcp", (1 << 63) - 1, b"token"])
    assert (region.scheme, region.nbytes, region.token) == ("tcp", (1 << 63) - 1, b"token")


@pytest.mark.parametrize(
    "part",
    [
        None,
        [],
        "tcp",
        ["tcp", 1],
        ["tcp", 1, b"", b""],
        [1, 1, b""],
        ["tcp", 0, b""],
        ["tcp", -1, b""],
        ["tcp", True, b""],
        ["tcp", 1.0, b""],
        ["tcp", 1 << 63, b""],
        ["tcp", 1, "token"],
    ],
)
def test_what_is_no_region(part: Any) -> None:
    """A size beyond int64 would overflow wherever it is calculated with."""
    with pytest.raises(ProtocolError):
        read_region(part)
