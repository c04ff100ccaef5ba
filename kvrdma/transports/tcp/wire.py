"""The frames of the tcp transport, as bytes and back; sans-I/O. All integers are little-endian.

A stream opens with four pieces of fixed size: a greeting, the listener's challenge, and a proof from either
side, the connecting one first. Frames follow: a header of fixed size, a body whose size the header gives, and
a payload. Requests name regions by tokens and ranges by int64 columns.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma.auth import NONCE_NBYTES, Role, check_proof, make_nonce, prove
from kvrdma.errors import ProtocolError
from kvrdma.layout import Int64s
from kvrdma.transports.regions import TOKEN_NBYTES

VERSION: Final = 3
MAX_RANGES: Final = 1 << 16
MAX_REGIONS: Final = 1 << 12
MAX_PAYLOAD: Final = 64 << 20
MAX_TICKET: Final = 64
MAX_STREAMS: Final = 64
MAX_DEPTH: Final = 8  # requests that may wait for their reply on one stream
SESSION_NBYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Dialect:
    """What streams say first, so that no transport takes another's for its own. `magic` has 6 bytes."""

    name: str
    magic: bytes
    version: int

    @property
    def purpose(self) -> bytes:
        """What a proof on such a stream is good for."""
        return f"{self.name} stream".encode()

    def check(self, magic: bytes, version: int) -> None:
        """Raise `ProtocolError` where a peer's stream is of another kind or version."""
        if magic != self.magic:
            raise ProtocolError(
                f"{self.name}: the peer does not speak kvrdma's {self.name} transport (it began with {magic!r})"
            )
        if version != self.version:
            raise ProtocolError(f"{self.name}: the peer speaks version {version}, this side {self.version}")


TCP: Final = Dialect("tcp", b"kvrtcp", VERSION)
_GREETING = struct.Struct(f"<6sH{SESSION_NBYTES}sHHH{MAX_TICKET}s{NONCE_NBYTES}s")
_CHALLENGE = struct.Struct(f"<6sH{NONCE_NBYTES}s")
_HEADER = struct.Struct("<BBHIQQ")
_ROW_NBYTES: Final = 24
GREETING_NBYTES: Final = _GREETING.size
CHALLENGE_NBYTES: Final = _CHALLENGE.size
HEADER_NBYTES: Final = _HEADER.size


class Frame(IntEnum):
    """What a frame is."""

    READ_REQUEST = 1
    READ_REPLY = 2
    WRITE_REQUEST = 3
    WRITE_REPLY = 4
    CANCEL = 5
    GOODBYE = 6


@dataclass(frozen=True, slots=True)
class Greeting:
    """Which of how many streams of which session this is."""

    session: bytes
    index: int
    count: int
    ticket: bytes
    nonce: bytes = field(default_factory=make_nonce)
    dialect: Dialect = TCP

    def encode(self) -> bytes:
        """The bytes that open a stream."""
        said = self.dialect
        return _GREETING.pack(
            said.magic, said.version, self.session, self.index, self.count, len(self.ticket), self.ticket, self.nonce
        )

    @classmethod
    def decode(cls, raw: bytes, dialect: Dialect = TCP) -> Self:
        """Read a greeting; raises `ProtocolError`."""
        magic, version, session, index, count, length, ticket, nonce = _GREETING.unpack(raw)
        dialect.check(magic, version)
        if not (index < count <= MAX_STREAMS) or length > MAX_TICKET:
            raise ProtocolError(
                f"{dialect.name}: greeting of stream {index} of {count} with a ticket of {length} bytes"
            )
        return cls(session, index, count, ticket[:length], nonce, dialect)

    def prove(self, role: Role, secret: bytes, challenge: bytes) -> bytes:
        """The proof of one end for this stream, whose greeting it covers."""
        return prove(secret, role, self.dialect.purpose, self.encode(), challenge)

    def check(self, proof: bytes, role: Role, secret: bytes, challenge: bytes) -> bool:
        """Whether an end's proof holds."""
        return check_proof(proof, secret, role, self.dialect.purpose, self.encode(), challenge)


def encode_challenge(nonce: bytes, dialect: Dialect = TCP) -> bytes:
    """The bytes that answer a greeting."""
    return _CHALLENGE.pack(dialect.magic, dialect.version, nonce)


def decode_challenge(raw: bytes, dialect: Dialect = TCP) -> bytes:
    """The listener's nonce; raises `ProtocolError` where it speaks another version, or something else."""
    magic, version, nonce = _CHALLENGE.unpack(raw)
    dialect.check(magic, version)
    return bytes(nonce)


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of a frame."""

    frame: Frame
    priority: int
    n_regions: int
    n_ranges: int
    op: int
    payload_nbytes: int

    def encode(self) -> bytes:
        """24 bytes."""
        return _HEADER.pack(self.frame, self.priority, self.n_regions, self.n_ranges, self.op, self.payload_nbytes)

    @classmethod
    def decode(cls, raw: bytes | bytearray) -> Self:
        """Read a header; raises `ProtocolError` on a frame that is unknown or too large."""
        kind, priority, n_regions, n_ranges, op, payload = _HEADER.unpack(raw)
        try:
            frame = Frame(kind)
        except ValueError:
            raise ProtocolError(f"tcp: unknown frame type {kind}") from None
        if n_ranges > MAX_RANGES or n_regions > MAX_REGIONS or payload > MAX_PAYLOAD:
            raise ProtocolError(
                f"tcp: {frame.name} with {n_regions} regions, {n_ranges} ranges and {payload} bytes; at most "
                f"{MAX_REGIONS}, {MAX_RANGES} and {MAX_PAYLOAD} are allowed"
            )
        if frame not in _WITH_PAYLOAD and payload:
            raise ProtocolError(f"tcp: {frame.name} has no payload, but {payload} bytes are announced")
        return cls(frame, priority, n_regions, n_ranges, op, payload)

    @property
    def body_nbytes(self) -> int:
        """The size of what stands between header and payload."""
        if self.frame in _REQUESTS:
            return self.n_regions * TOKEN_NBYTES + self.n_ranges * _ROW_NBYTES
        return self.n_ranges if self.frame in _REPLIES else 0


_REQUESTS: Final = (Frame.READ_REQUEST, Frame.WRITE_REQUEST)
_REPLIES: Final = (Frame.READ_REPLY, Frame.WRITE_REPLY)
_WITH_PAYLOAD: Final = (Frame.READ_REPLY, Frame.WRITE_REQUEST)


def encode_request(
    frame: Frame,
    op: int,
    priority: int,
    tokens: Sequence[bytes],
    rows: Int64s,
    offsets: Int64s,
    nbytes: Int64s,
    payload_nbytes: int,
) -> bytes:
    """Header and body of a READ or WRITE request."""
    header = Header(frame, priority, len(tokens), len(rows), op, payload_nbytes)
    ranges = np.empty((3, len(rows)), dtype="<i8")
    ranges[0], ranges[1], ranges[2] = rows, offsets, nbytes
    return b"".join((header.encode(), *tokens, ranges.tobytes()))


def decode_request(header: Header, body: bytes) -> tuple[list[bytes], Int64s, Int64s, Int64s]:
    """Tokens, and the columns row, offset, nbytes of a request's body."""
    end = header.n_regions * TOKEN_NBYTES
    tokens = [body[i : i + TOKEN_NBYTES] for i in range(0, end, TOKEN_NBYTES)]
    rows, offsets, nbytes = np.frombuffer(body, dtype="<i8", offset=end).reshape(3, header.n_ranges)
    return tokens, rows, offsets, nbytes


def encode_reply(frame: Frame, op: int, priority: int, status: NDArray[np.uint8], payload_nbytes: int) -> bytes:
    """Header and body of a reply: a status a range, or none at all where every range is OK."""
    if not status.any():
        return Header(frame, priority, 0, 0, op, payload_nbytes).encode()
    return Header(frame, priority, 0, len(status), op, payload_nbytes).encode() + status.tobytes()


def encode_note(frame: Frame, op: int = 0) -> bytes:
    """A frame that is a header only."""
    return Header(frame, 0, 0, 0, op, 0).encode()
