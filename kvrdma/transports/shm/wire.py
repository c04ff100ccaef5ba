"""The messages of the shm transport, as bytes and back; sans-I/O. One message is one packet of the socket.

It opens with a greeting, the listener's challenge, and a proof from either side, the connecting one first.
Then either side asks for the memory behind a key, and is answered with descriptors beside the packet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Self

from kvrdma.auth import NONCE_NBYTES, PROOF_NBYTES, Role, check_proof, make_nonce, prove
from kvrdma.errors import ProtocolError
from kvrdma.transports.base import Rights
from kvrdma.transports.regions import TOKEN_NBYTES, RangeStatus

VERSION: Final = 1
MAX_TICKET: Final = 64
MAX_PACKET: Final = 192
MAX_FDS: Final = 2

_MAGIC: Final = b"kvrshm"
_PURPOSE: Final = b"shm"
_GREETING = struct.Struct(f"<6sHH{MAX_TICKET}s{NONCE_NBYTES}s")
_CHALLENGE = struct.Struct(f"<6sH{NONCE_NBYTES}s")
_ASK = struct.Struct(f"<B{TOKEN_NBYTES}s")
_ANSWER = struct.Struct(f"<B{TOKEN_NBYTES}sBBIIQ")
_ALL_RIGHTS: Final = Rights.READ | Rights.WRITE
NO_RIGHTS: Final = Rights(0)


@dataclass(frozen=True, slots=True)
class Greeting:
    """What the end that connects says first."""

    ticket: bytes
    nonce: bytes = field(default_factory=make_nonce)

    def encode(self) -> bytes:
        """The first packet."""
        return _GREETING.pack(_MAGIC, VERSION, len(self.ticket), self.ticket, self.nonce)

    @classmethod
    def decode(cls, packet: bytes) -> Self:
        """Read a greeting; raises `ProtocolError`."""
        magic, version, length, ticket, nonce = _unpack(_GREETING, packet, "a greeting")
        _check(magic, version)
        if length > MAX_TICKET:
            raise ProtocolError(f"shm: a ticket has at most {MAX_TICKET} bytes, not {length}")
        return cls(ticket[:length], nonce)

    def prove(self, role: Role, secret: bytes, challenge: bytes) -> bytes:
        """The proof of one end for this connection, whose greeting it covers."""
        return prove(secret, role, _PURPOSE, self.encode(), challenge)

    def check(self, proof: bytes, role: Role, secret: bytes, challenge: bytes) -> bool:
        """Whether an end's proof holds."""
        return len(proof) == PROOF_NBYTES and check_proof(proof, secret, role, _PURPOSE, self.encode(), challenge)


def encode_challenge(nonce: bytes) -> bytes:
    """The packet that answers a greeting."""
    return _CHALLENGE.pack(_MAGIC, VERSION, nonce)


def decode_challenge(packet: bytes) -> bytes:
    """The listener's nonce; raises `ProtocolError` where it speaks another version, or something else."""
    magic, version, nonce = _unpack(_CHALLENGE, packet, "a challenge")
    _check(magic, version)
    return bytes(nonce)


def _check(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise ProtocolError(f"shm: the peer does not speak kvrdma's shm transport (it began with {magic!r})")
    if version != VERSION:
        raise ProtocolError(f"shm: the peer speaks version {version}, this side {VERSION}")


class Packet(IntEnum):
    """What a packet after the proofs is."""

    ASK = 1
    ANSWER = 2


@dataclass(frozen=True, slots=True)
class Ask:
    """Which memory is behind this key?"""

    token: bytes

    def encode(self) -> bytes:
        """One packet."""
        return _ASK.pack(Packet.ASK, self.token)


@dataclass(frozen=True, slots=True)
class Answer:
    """Memory of `nbytes` bytes, whose descriptor comes along, and behind it that of the page of live keys.

    The key lives as long as the word `slot` of that page is `number`. Without memory, `status` says why.
    """

    token: bytes
    status: RangeStatus
    rights: Rights = NO_RIGHTS
    slot: int = 0
    number: int = 0
    nbytes: int = 0

    def encode(self) -> bytes:
        """One packet."""
        return _ANSWER.pack(
            Packet.ANSWER, self.token, self.status, self.rights.value, self.slot, self.number, self.nbytes
        )


def decode(packet: bytes) -> Ask | Answer:
    """Read a packet; raises `ProtocolError`."""
    if packet[:1] == bytes([Packet.ASK]):
        return Ask(bytes(_unpack(_ASK, packet, "a question")[1]))
    if packet[:1] != bytes([Packet.ANSWER]):
        raise ProtocolError(f"shm: unknown packet {packet[:1]!r}")
    _, token, status, rights, slot, number, nbytes = _unpack(_ANSWER, packet, "an answer")
    try:
        answer = Answer(token, RangeStatus(status), Rights(rights), slot, number, nbytes)
    except ValueError as error:
        raise ProtocolError(f"shm: an answer that makes no sense: {error}") from None
    if answer.rights & ~_ALL_RIGHTS or (answer.status is RangeStatus.OK and not (answer.rights and number and nbytes)):
        raise ProtocolError("shm: an answer that makes no sense: memory without size, key or rights")
    return answer


def _unpack(layout: struct.Struct, packet: bytes, what: str) -> tuple[Any, ...]:
    if len(packet) != layout.size:
        raise ProtocolError(f"shm: {what} has {layout.size} bytes, not {len(packet)}")
    return layout.unpack(packet)
