"""Mutual proof that both ends know one secret, without sending it: HMAC-SHA256 over both ends' nonces.

Whoever connects proves first, so that nobody gets a value to guess a token by from a listener. Each proof
names who gives it and what for, and covers both nonces: one that was overheard is of no use elsewhere, in
the other direction, or again. What follows the proof is neither encrypted nor signed (docs/security.md).
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum
from typing import Final

NONCE_NBYTES: Final = 16
PROOF_NBYTES: Final = 32
_DOMAIN: Final = b"kvrdma proof 1"


class Role(Enum):
    """Who gives a proof."""

    CLIENT = b"client"
    SERVER = b"server"


def make_nonce() -> bytes:
    """16 bytes that were never used before."""
    return secrets.token_bytes(NONCE_NBYTES)


def prove(secret: bytes, role: Role, purpose: bytes, *said: bytes) -> bytes:
    """The proof (32 bytes) of knowing `secret`; `said` is what both ends have said so far, nonces included."""
    return _mac(secret, _DOMAIN, role.value, purpose, *said)


def check_proof(proof: bytes, secret: bytes, role: Role, purpose: bytes, *said: bytes) -> bool:
    """Whether a proof holds; takes as long for any that does not."""
    return hmac.compare_digest(proof, prove(secret, role, purpose, *said))


def derive_secret(secret: bytes, purpose: bytes, *said: bytes) -> bytes:
    """A secret (32 bytes) of its own for what belongs to one conversation, such as its data streams."""
    return _mac(secret, b"kvrdma secret 1", purpose, *said)


def _mac(secret: bytes, *parts: bytes) -> bytes:
    # With its length before each part no two sequences of parts are the same bytes.
    text = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret or b"\0", text, "sha256")
