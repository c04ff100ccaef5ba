"""The pool's control plane as bytes and messages: a pure object, fed with bytes (sans-I/O, as h11 does it).

A connection opens with a preface of 8 bytes from either side (magic and version). Frames follow: a length as
uint32, big-endian, and that many bytes of msgpack: `[type, seq, field, ...]`. A reply carries its request's
`seq`. Batches travel as packed columns, never as a list of objects.

The first frames are a hello, a challenge, a proof and the hello's reply, which proves the server in turn:
before that no address, ticket, key or byte of a block leaves either side.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

import msgpack
import numpy as np

from kvrdma.errors import ProtocolError
from kvrdma.keys import KEY_NBYTES
from kvrdma.layout import Int64s

VERSION: Final = 2
MAX_FRAME: Final = 16 << 20
MAX_CONTAINERS: Final = 1 << 16  # lists and maps in one message
MAX_DEPTH: Final = 8
MAX_GREETING_FRAME: Final = 4 << 10  # before the proof
PURPOSE: Final = b"pool control"  # of the proofs
STREAMS: Final = b"pool streams"  # of the secret that is derived for the data streams
_MAGIC: Final = b"kvrdma"
_PREFACE = struct.Struct(">6sH")
_LENGTH = struct.Struct(">I")
PREFACE_NBYTES: Final = _PREFACE.size

_MESSAGES: dict[int, type[Message]] = {}


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says to the other; `seq` ties a reply to its request (0: no reply is wanted)."""

    TYPE: ClassVar[int] = -1
    seq: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if cls.TYPE in _MESSAGES and _MESSAGES[cls.TYPE].__name__ != cls.__name__:
            raise TypeError(f"message type {cls.TYPE} is taken")
        _MESSAGES[cls.TYPE] = cls


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The client's first message: who it is, for logs, and its nonce."""

    TYPE: ClassVar[int] = 1
    client: str
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Challenge(Message):
    """The server's nonce, and whether it has a token (1) or serves whoever can reach it (0)."""

    TYPE: ClassVar[int] = 18
    nonce: bytes
    has_token: int


@dataclass(frozen=True, slots=True)
class Proof(Message):
    """The client's proof that it knows the token."""

    TYPE: ClassVar[int] = 19
    proof: bytes


@dataclass(frozen=True, slots=True)
class HelloReply(Message):
    """The server's own proof, a ticket for the data streams, and [scheme, contact address] of each transport."""

    TYPE: ClassVar[int] = 2
    proof: bytes
    server: str
    ticket: bytes
    offers: list[Any]


@dataclass(frozen=True, slots=True)
class OpenKeySpace(Message):
    """All fields of a key space and their digest; again whenever it changes."""

    TYPE: ClassVar[int] = 3
    fields: dict[str, Any]
    digest: bytes


@dataclass(frozen=True, slots=True)
class KeySpaceReply(Message):
    """The number by which the other messages of this connection name the key space."""

    TYPE: ClassVar[int] = 4
    keyspace: int


@dataclass(frozen=True, slots=True)
class LookupRequest(Message):
    """Keys (16 bytes each) and shards: which of the keys are there on all of the shards?"""

    TYPE: ClassVar[int] = 5
    keyspace: int
    keys: bytes
    shards: list[Any]


@dataclass(frozen=True, slots=True)
class LookupReply(Message):
    """A byte a key (1: there on all shards); fields by which the nearest filled key space differs."""

    TYPE: ClassVar[int] = 6
    present: bytes
    differs: list[Any]


@dataclass(frozen=True, slots=True)
class PutRequest(Message):
    """Blocks that the server may read from the client's exported regions.

    `spans` packs four int64 columns: key row, region row, offset, nbytes.
    """

    TYPE: ClassVar[int] = 7
    keyspace: int
    shard: bytes
    keys: bytes
    checksums: bytes
    regions: list[Any]
    spans: bytes
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class PutReply(Message):
    """A byte a key: a `PutStatus`."""

    TYPE: ClassVar[int] = 8
    status: bytes


@dataclass(frozen=True, slots=True)
class GetRequest(Message):
    """Blocks that the client wants to read."""

    TYPE: ClassVar[int] = 9
    keyspace: int
    shard: bytes
    keys: bytes


@dataclass(frozen=True, slots=True)
class GetReply(Message):
    """A lease on the blocks that are there, and where they lie.

    `present` has a byte a key; the columns have an int64 for each key that is there: region row, offset,
    nbytes, generation; `checksums` an uint64.
    """

    TYPE: ClassVar[int] = 10
    lease: int
    ttl_ms: int
    present: bytes
    regions: list[Any]
    columns: bytes
    checksums: bytes


@dataclass(frozen=True, slots=True)
class Release(Message):
    """The client has read what it leased; `bad` packs the generations (int64) it found wrong."""

    TYPE: ClassVar[int] = 11
    lease: int
    bad: bytes


@dataclass(frozen=True, slots=True)
class DeleteRequest(Message):
    """Drop every shard of these keys."""

    TYPE: ClassVar[int] = 12
    keyspace: int
    keys: bytes


@dataclass(frozen=True, slots=True)
class DeleteReply(Message):
    """How many objects were dropped."""

    TYPE: ClassVar[int] = 13
    count: int


@dataclass(frozen=True, slots=True)
class StatsRequest(Message):
    """Ask for the server's counters."""

    TYPE: ClassVar[int] = 14


@dataclass(frozen=True, slots=True)
class StatsReply(Message):
    """The server's counters by name."""

    TYPE: ClassVar[int] = 15
    stats: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ErrorReply(Message):
    """A request that the server refused, and why."""

    TYPE: ClassVar[int] = 16
    text: str


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """This side ends the connection on purpose."""

    TYPE: ClassVar[int] = 17
    text: str


_PYTHON_TYPES: Final = {
    "int": int,
    "str": str,
    "bytes": bytes,
    "list[Any]": list,
    "dict[str, Any]": dict,
}


def preface() -> bytes:
    """The bytes that open a connection on either side."""
    return _PREFACE.pack(_MAGIC, VERSION)


def check_preface(raw: bytes, *, peer: str) -> None:
    """Raise `ProtocolError` where a peer is not kvrdma, or speaks another version."""
    magic, version = _PREFACE.unpack(raw)
    if magic != _MAGIC:
        raise ProtocolError(f"{peer} does not speak kvrdma's pool protocol (it began with {raw!r})")
    if version != VERSION:
        raise ProtocolError(f"{peer} speaks version {version} of the pool protocol, this side {VERSION}")


def encode(message: Message) -> bytes:
    """One frame."""
    values = [getattr(message, field.name) for field in fields(message)]
    body: bytes = msgpack.packb([message.TYPE, *values], use_bin_type=True)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"{type(message).__name__} of {len(body)} bytes: a frame holds {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message in one frame's body; raises `ProtocolError` on anything that is not exactly one."""
    n_containers = 0

    def count(container: Any) -> Any:
        """Refuse early what costs many times its own bytes in memory."""
        nonlocal n_containers
        n_containers += 1
        if n_containers > MAX_CONTAINERS:
            raise ValueError(f"more than {MAX_CONTAINERS} lists and maps")
        return container

    try:
        values = msgpack.unpackb(
            body, raw=False, strict_map_key=True, use_list=True, list_hook=count, object_hook=count
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if not isinstance(values, list) or not values or type(values[0]) is not int:
        raise ProtocolError("not a message: a list that begins with its type is expected")
    cls = _MESSAGES.get(values[0])
    if cls is None or cls is Message:
        raise ProtocolError(f"unknown message type {values[0]}")
    declared = fields(cls)
    if len(values) != len(declared) + 1:
        raise ProtocolError(f"{cls.__name__}: {len(declared)} fields expected, got {len(values) - 1}")
    for field, value in zip(declared, values[1:], strict=True):
        if type(value) is not _PYTHON_TYPES[str(field.type)]:
            raise ProtocolError(f"{cls.__name__}.{field.name}: {field.type} expected")
        if isinstance(value, int) and value < 0:
            raise ProtocolError(f"{cls.__name__}.{field.name}: must not be negative")
        if isinstance(value, list | dict) and not _is_shallow(value, MAX_DEPTH):
            raise ProtocolError(f"{cls.__name__}.{field.name}: nested more than {MAX_DEPTH} deep")
    return cls(*values[1:])


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether lists and maps are nested at most so deep: what is deeper, nobody could print."""
    if not isinstance(value, list | dict):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(part, depth - 1) for part in parts)


class FrameDecoder:
    """Bytes in, messages out. After a `ProtocolError` the connection is not to be used again."""

    def __init__(self, *, peer: str, max_frame: int = MAX_FRAME) -> None:
        self.max_frame = max_frame
        self._peer = peer
        self._buffer = bytearray()
        self._greeted = False

    @property
    def partial(self) -> bool:
        """Whether a frame has begun that is not whole yet."""
        return bool(self._buffer)

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """Take bytes as they came; give every message that is whole."""
        self._buffer += data  # here, and not when somebody asks for the first message
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        buffer = self._buffer
        if not self._greeted:
            if len(buffer) < PREFACE_NBYTES:
                return
            check_preface(bytes(buffer[:PREFACE_NBYTES]), peer=self._peer)
            del buffer[:PREFACE_NBYTES]
            self._greeted = True
        while len(buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer)
            if length > self.max_frame:
                raise ProtocolError(f"{self._peer}: a frame of {length} bytes; {self.max_frame} are allowed")
            if len(buffer) < _LENGTH.size + length:
                return
            body = bytes(buffer[_LENGTH.size : _LENGTH.size + length])
            del buffer[: _LENGTH.size + length]
            yield decode(body)


def pack_columns(*columns: Int64s) -> bytes:
    """Lay int64 columns of one length behind one another."""
    return np.stack(columns).astype("<i8").tobytes() if columns[0].size else b""


def unpack_columns(raw: bytes, n_columns: int, *, what: str) -> Int64s:
    """Read int64[n_columns, n]; raises `ProtocolError` where the length does not fit."""
    width = 8 * n_columns
    if len(raw) % width:
        raise ProtocolError(f"{what}: {len(raw)} bytes are not a whole number of {width}-byte rows")
    return np.frombuffer(raw, dtype="<i8").reshape(n_columns, -1)


def count_keys(raw: bytes, *, what: str) -> int:
    """How many keys a packed batch holds; raises `ProtocolError` where it is not a whole number."""
    if len(raw) % KEY_NBYTES:
        raise ProtocolError(f"{what}: {len(raw)} bytes are not a whole number of {KEY_NBYTES}-byte keys")
    return len(raw) // KEY_NBYTES
