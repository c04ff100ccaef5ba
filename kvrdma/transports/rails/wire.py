"""What rails say to each other inside addresses, tickets and keys; sans-I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import msgpack

from kvrdma.errors import ConfigError, RegionError

GROUP_NBYTES: Final = 16
MAX_TICKET: Final = 32
_MAGIC: Final = b"rail"
_SUM_NBYTES: Final = 8
MAX_RAILS: Final = 64


def encode_address(addresses: Mapping[str, str]) -> str:
    """One address of all rails: name=address|name=address."""
    return "|".join(f"{name}={address}" for name, address in addresses.items())


def decode_address(text: str) -> dict[str, str]:
    """The address of each rail by name; raises `ConfigError`."""
    addresses: dict[str, str] = {}
    for part in text.split("|"):
        name, equals, address = part.partition("=")
        if not name or not equals or name in addresses:
            raise ConfigError(f"rails: {text!r} is no address; name=address|name=address is expected")
        addresses[name] = address
    return addresses


@dataclass(frozen=True, slots=True)
class RailTicket:
    """The ticket of one rail: which connection it belongs to, whether that may be a new one, and whose it is."""

    group: bytes
    first: bool
    ticket: bytes

    def encode(self) -> bytes:
        """At most 53 bytes."""
        return _MAGIC + bytes([self.first]) + self.group + self.ticket

    @classmethod
    def decode(cls, raw: bytes) -> Self | None:
        """Read a rail's ticket; None where it is that of a peer that uses one transport by itself."""
        head = len(_MAGIC) + 1 + GROUP_NBYTES
        if len(raw) < head or not raw.startswith(_MAGIC) or raw[len(_MAGIC)] > 1:
            return None
        return cls(raw[len(_MAGIC) + 1 : head], raw[len(_MAGIC)] == 1, raw[head:])


def encode_token(tokens: Mapping[str, bytes]) -> bytes:
    """The keys of one region, a rail each. A sum tells what was altered from what a rail merely cannot use."""
    body: bytes = msgpack.packb(dict(tokens), use_bin_type=True)
    return _sum(body) + body


def decode_token(raw: bytes) -> dict[str, bytes]:
    """The keys by rail; raises `RegionError`."""
    body = raw[_SUM_NBYTES:]
    if raw[:_SUM_NBYTES] != _sum(body):
        raise RegionError("rails: the remote key is none, or was altered")
    try:
        tokens = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RegionError(f"rails: the remote key is none: {error}") from None
    if (
        not isinstance(tokens, dict)
        or len(tokens) > MAX_RAILS
        or not all(isinstance(name, str) and isinstance(token, bytes) for name, token in tokens.items())
    ):
        raise RegionError("rails: the remote key is none")
    return tokens


def _sum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_SUM_NBYTES).digest()


def check_ticket(ticket: bytes) -> None:
    """Raise `ConfigError` where a ticket is too long."""
    if len(ticket) > MAX_TICKET:
        raise ConfigError(f"rails: a ticket has at most {MAX_TICKET} bytes, not {len(ticket)}")
