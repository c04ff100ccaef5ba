"""What two ends of the ucx transport say over their control socket, as bytes and back; sans-I/O, little-endian.

A connection opens with pieces of fixed size: a greeting, the listener's challenge, and a proof from either side,
the connecting one first. Frames follow: the two workers' addresses, then questions after keys, recalls of them,
and a goodbye. READY says that a side is: the listener, that its end was handed over; the other, that
the first bytes have come over the lanes. The bytes of transfers never come this way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Self

from kvrdma.auth import NONCE_NBYTES, Role, check_proof, make_nonce, prove
from kvrdma.errors import ProtocolError
from kvrdma.transports.base import Rights

VERSION: Final = 1
MAX_TICKET: Final = 32
MAX_BODY: Final = 16 << 10
PROBE_NBYTES: Final = 64

_MAGIC: Final = b"kvrucx"
_GREETING = struct.Struct(f"<6sHH{MAX_TICKET}s{NONCE_NBYTES}s")
_CHALLENGE = struct.Struct(f"<6sH{NONCE_NBYTES}s")
_HEADER = struct.Struct("<BxxxIQ")
_HELLO = struct.Struct(f"<IIQ{PROBE_NBYTES}s")
_GRANT = struct.Struct("<QQQB")
GREETING_NBYTES: Final = _GREETING.size
CHALLENGE_NBYTES: Final = _CHALLENGE.size
HEADER_NBYTES: Final = _HEADER.size


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    READY = 2
    ASK = 3
    GRANT = 4
    RECALL = 5
    RECALLED = 6
    GOODBYE = 7


@dataclass(frozen=True, slots=True)
class Frame:
    """`number` is the question's in ASK and GRANT, the export's in RECALL and RECALLED."""

    kind: Kind
    number: int = 0
    body: bytes = b""

    def encode(self) -> bytes:
        """Header and body."""
        return _HEADER.pack(self.kind, len(self.body), self.number) + self.body


def decode_header(raw: bytes) -> tuple[Kind, int, int]:
    """Kind, number, and the size of the body; raises `ProtocolError`."""
    kind, nbytes, number = _HEADER.unpack(raw)
    if nbytes > MAX_BODY:
        raise ProtocolError(f"ucx: a frame of {nbytes} bytes; at most {MAX_BODY} are allowed")
    try:
        return Kind(kind), number, nbytes
    except ValueError:
        raise ProtocolError(f"ucx: unknown frame {kind}") from None


class FrameReader:
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes and give the frames that are whole; raises `ProtocolError`."""
        self._buffer += data
        while len(self._buffer) >= HEADER_NBYTES:
            kind, number, nbytes = decode_header(bytes(self._buffer[:HEADER_NBYTES]))
            end = HEADER_NBYTES + nbytes
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[HEADER_NBYTES:end])
            del self._buffer[:end]
            yield Frame(kind, number, body)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the end that connects says first."""

    ticket: bytes
    nonce: bytes = field(default_factory=make_nonce)

    def encode(self) -> bytes:
        """The bytes that open a connection."""
        return _GREETING.pack(_MAGIC, VERSION, len(self.ticket), self.ticket, self.nonce)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a greeting; raises `ProtocolError`."""
        magic, version, length, ticket, nonce = _GREETING.unpack(raw)
        _check(magic, version)
        if length > MAX_TICKET:
            raise ProtocolError(f"ucx: a greeting with a ticket of {length} bytes")
        return cls(ticket[:length], nonce)

    def prove(self, role: Role, secret: bytes, challenge: bytes) -> bytes:
        """The proof of one end for this connection, whose greeting it covers."""
        return prove(secret, role, b"ucx control", self.encode(), challenge)

    def check(self, proof: bytes, role: Role, secret: bytes, challenge: bytes) -> bool:
        """Whether an end's proof holds."""
        return check_proof(proof, secret, role, b"ucx control", self.encode(), challenge)


def encode_challenge(nonce: bytes) -> bytes:
    """The bytes that answer a greeting."""
    return _CHALLENGE.pack(_MAGIC, VERSION, nonce)


def decode_challenge(raw: bytes) -> bytes:
    """The listener's nonce; raises `ProtocolError` where it speaks another version, or something else."""
    magic, version, nonce = _CHALLENGE.unpack(raw)
    _check(magic, version)
    return bytes(nonce)


@dataclass(frozen=True, slots=True)
class Hello:
    """Where an end's worker is reached, and a few bytes of its memory by which the other end tries its lanes."""

    worker: bytes
    probe_address: int
    probe_key: bytes
    probe: bytes

    def encode(self) -> bytes:
        """The body of a HELLO."""
        head = _HELLO.pack(len(self.worker), len(self.probe_key), self.probe_address, self.probe)
        return head + self.worker + self.probe_key

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Read it; raises `ProtocolError`."""
        if len(body) < _HELLO.size:
            raise ProtocolError(f"ucx: a hello of {len(body)} bytes")
        n_worker, n_key, address, probe = _HELLO.unpack_from(body)
        worker, key = body[_HELLO.size : _HELLO.size + n_worker], body[_HELLO.size + n_worker :]
        if not n_worker or not n_key or len(worker) != n_worker or len(key) != n_key:
            raise ProtocolError(f"ucx: a hello with a worker of {n_worker} bytes and a key of {n_key} in {len(body)}")
        return cls(worker, address, key, probe)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token stands for."""

    export: int
    address: int
    nbytes: int
    rights: Rights
    packed: bytes

    def encode(self) -> bytes:
        """The body of a GRANT; that of a refusal is empty."""
        return _GRANT.pack(self.export, self.address, self.nbytes, self.rights.value) + self.packed

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Read it; raises `ProtocolError`."""
        if len(body) <= _GRANT.size:
            raise ProtocolError(f"ucx: a grant of {len(body)} bytes")
        export, address, nbytes, rights = _GRANT.unpack_from(body)
        if rights > (Rights.READ | Rights.WRITE).value or address + nbytes > 1 << 63:
            raise ProtocolError(f"ucx: a grant of rights {rights} to bytes {address}..{address + nbytes}")
        return cls(export, address, nbytes, Rights(rights), body[_GRANT.size :])


def _check(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise ProtocolError(f"ucx: the peer does not speak kvrdma's ucx transport (it began with {magic!r})")
    if version != VERSION:
        raise ProtocolError(f"ucx: the peer speaks version {version}, this side {VERSION}")
