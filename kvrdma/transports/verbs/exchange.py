"""What both ends of an endpoint tell each other over its control socket, as bytes and back; sans-I/O.

Each says how its queue pair is reached, and is ready once it may be written to. A key that a range names is asked
for at its first use, so that remote keys leave only over a socket whose peer has proved itself, and only for a token
that its owner handed out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kvrdma.errors import ProtocolError
from kvrdma.transports.base import Rights
from kvrdma.transports.regions import TOKEN_NBYTES, RangeStatus
from kvrdma.transports.tcp.wire import Dialect
from kvrdma.transports.verbs.binding import PairAddress

VERBS: Final = Dialect("verbs", b"kvrvrb", 1)
_NONE: Final = Rights(0)
_HEADER = struct.Struct("<BxH")
HEADER_NBYTES: Final = _HEADER.size
_PAIR = struct.Struct("<IIHBBII16s")
_GRANT = struct.Struct(f"<{TOKEN_NBYTES}sBBQQI")


class Frame(IntEnum):
    """What a frame is."""

    PAIR = 1
    READY = 2
    ASK = 3
    GRANT = 4
    REVOKED = 5
    GOODBYE = 6


_BODY_NBYTES: Final = {
    Frame.PAIR: _PAIR.size,
    Frame.READY: 0,
    Frame.ASK: TOKEN_NBYTES,
    Frame.GRANT: _GRANT.size,
    Frame.REVOKED: TOKEN_NBYTES,
    Frame.GOODBYE: 0,
}


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a token: where its memory is, and the key for it. `status` says why there is none."""

    token: bytes
    status: RangeStatus
    rights: Rights = _NONE
    address: int = 0
    nbytes: int = 0
    rkey: int = 0

    def encode(self) -> bytes:
        """A frame."""
        return _frame(
            Frame.GRANT,
            _GRANT.pack(self.token, self.status, self.rights.value, self.address, self.nbytes, self.rkey),
        )


Message = tuple[Frame, bytes]


def encode_pair(address: PairAddress) -> bytes:
    """A frame that says how a queue pair is reached."""
    a = address
    return _frame(Frame.PAIR, _PAIR.pack(a.pair, a.psn, a.lid, a.mtu, 0, a.max_reads, a.max_message_nbytes, a.gid))


def decode_pair(body: bytes) -> PairAddress:
    """Read such a frame's body; raises `ProtocolError`."""
    pair, psn, lid, mtu, _, max_reads, max_message_nbytes, gid = _PAIR.unpack(body)
    if not 1 <= mtu <= 5 or pair >= 1 << 24 or psn >= 1 << 24 or max_message_nbytes < 1 or not 1 <= max_reads <= 255:
        raise ProtocolError(
            f"verbs: a queue pair {pair:#x} with MTU {mtu}, PSN {psn:#x}, {max_reads} reads and messages of "
            f"{max_message_nbytes} bytes"
        )
    return PairAddress(pair, psn, lid, gid, mtu, max_message_nbytes, max_reads)


def encode_token(frame: Frame, token: bytes) -> bytes:
    """A frame that names a token."""
    return _frame(frame, token)


def encode_note(frame: Frame) -> bytes:
    """A frame without a body."""
    return _frame(frame, b"")


def decode_grant(body: bytes) -> Grant:
    """Read a grant's body; raises `ProtocolError`."""
    token, status, rights, address, nbytes, rkey = _GRANT.unpack(body)
    try:
        return Grant(token, RangeStatus(status), Rights(rights), address, nbytes, rkey)
    except ValueError:
        raise ProtocolError(f"verbs: a grant with status {status} and rights {rights}") from None


def _frame(frame: Frame, body: bytes) -> bytes:
    return _HEADER.pack(frame, len(body)) + body


class Decoder:
    """Frames out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The frames that are whole now; raises `ProtocolError` where they are none."""
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= HEADER_NBYTES:
            kind, nbytes = _HEADER.unpack_from(self._buffer)
            try:
                frame = Frame(kind)
            except ValueError:
                raise ProtocolError(f"verbs: unknown frame type {kind}") from None
            if nbytes != _BODY_NBYTES[frame]:
                raise ProtocolError(f"verbs: {frame.name} of {nbytes} bytes, where {_BODY_NBYTES[frame]} belong")
            end = HEADER_NBYTES + nbytes
            if len(self._buffer) < end:
                break
            messages.append((frame, bytes(self._buffer[HEADER_NBYTES:end])))
            del self._buffer[:end]
        return messages
