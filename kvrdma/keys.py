"""Which blocks are interchangeable (`KeySpace`) and what each is called (`BlockKey`).

A key is BLAKE2b (RFC 7693), keyed by the key space, over the parent's key, the block's tokens as little-endian
int32, and extras. It is cryptographic because pools are shared and a key must not be forged, and equal in
every process and on every machine: nothing of Python's or the engine's own hashing takes part.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import ConfigError

KEY_NBYTES: Final = 16
DIGEST_NBYTES: Final = 32
LAYOUT_VERSION: Final = 1
EPOCH_NBYTES: Final = 16

KeyBatch = NDArray[np.uint8]
"""uint8[n, 16]: the keys of n blocks. Never numpy's S16, which strips trailing zeros."""

_ROOT = bytes(KEY_NBYTES)
_PERSON_BLOCK = b"kvrdma-block"
_PERSON_EXTERNAL = b"kvrdma-external"
_HASH_SLICE = 64


class BlockKey(bytes):
    """16 bytes that name one block of one key space, whatever the tensor-parallel rank."""

    __slots__ = ()

    @classmethod
    def external(cls, keyspace: KeySpace, engine: str, opaque: bytes, *, parent: bytes | None = None) -> BlockKey:
        """Name a block by an engine's own hash, for engines that give no tokens.

        The domain is apart from that of token hashes: no choice of `opaque` meets one of them. Raises
        `ConfigError` where `parent` is no key.
        """
        if parent is not None and len(parent) != KEY_NBYTES:
            raise ConfigError(f"external key: the parent must be a key of {KEY_NBYTES} bytes, not {len(parent)}")
        name = engine.encode()
        message = b"".join(
            (
                len(name).to_bytes(4, "little"),
                name,
                parent or _ROOT,
                len(opaque).to_bytes(4, "little"),
                opaque,
            )
        )
        digest = hashlib.blake2b(message, digest_size=KEY_NBYTES, key=keyspace.digest, person=_PERSON_EXTERNAL)
        return cls(digest.digest())


@dataclass(frozen=True, slots=True)
class KeySpace:
    """All that must be equal for two blocks to be interchangeable.

    `weights` is a fingerprint of the weights' content, not of their names. `kv_dtype` is resolved, never
    "auto". `epoch` is 32 hex digits: zeros at the start, so that engines which loaded the same files share,
    and random after every update of the weights in place.
    """

    model: str
    weights: str
    config: str
    kv_dtype: str
    attention: str
    head_size: int
    layers: int
    block_tokens: int
    namespace: str = ""
    epoch: str = "0" * 2 * EPOCH_NBYTES
    layout_version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted: type = int if field.type == "int" else str
            if type(value) is not wanted:
                raise ConfigError(f"key space: {field.name} must be {wanted.__name__}, not {value!r}")
        if self.kv_dtype == "auto":
            raise ConfigError("key space: kv_dtype must be the resolved type (such as bfloat16), not 'auto'")
        if self.block_tokens < 1:
            raise ConfigError(f"key space: block_tokens must be at least 1, not {self.block_tokens}")
        if len(self.epoch) != 2 * EPOCH_NBYTES or set(self.epoch) - set("0123456789abcdef"):
            raise ConfigError(f"key space: epoch must be {2 * EPOCH_NBYTES} hex digits, not {self.epoch!r}")

    @property
    def digest(self) -> bytes:
        """32 bytes over every field and its name."""
        return _digest(self)

    def to_fields(self) -> dict[str, str | int]:
        """Name every field, as the pool protocol sends it."""
        return asdict(self)

    @classmethod
    def from_fields(cls, named: Mapping[str, object]) -> Self:
        """Read what `to_fields` wrote; raises `ConfigError` on anything else."""
        known = {field.name for field in fields(cls)}
        if unknown := set(named) ^ known:
            raise ConfigError(f"key space: fields missing or unknown: {', '.join(sorted(map(str, unknown)))}")
        return cls(**named)  # type: ignore[arg-type]  # __post_init__ checks every type

    def differs(self, other: KeySpace) -> list[str]:
        """Name the fields in which two key spaces differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@lru_cache(maxsize=64)
def _digest(keyspace: KeySpace) -> bytes:
    """Remembered: every prompt's keys begin with it, and it takes as long as several of them."""
    hasher = hashlib.blake2b(digest_size=DIGEST_NBYTES, person=b"kvrdma-space")
    for field in fields(keyspace):
        for part in (field.name, str(getattr(keyspace, field.name))):
            raw = part.encode()
            hasher.update(len(raw).to_bytes(4, "little"))
            hasher.update(raw)
    return hasher.digest()


class KeyChain:
    """The keys of one sequence of tokens, each hashed once, in slices that a scheduler's step can afford.

    `extras(block)` gives what else tells the block of that number from others with the same tokens (LoRA,
    multimodal content, prompt embeddings, cache salt), empty where nothing does.
    """

    def __init__(self, keyspace: KeySpace, *, extras: Callable[[int], bytes] | None = None) -> None:
        self._digest = keyspace.digest
        self._block_tokens = keyspace.block_tokens
        self._extras = extras
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> Sequence[bytes]:
        """The keys hashed so far, first block first. Not to be changed by the caller."""
        return self._keys

    def advance(self, tokens: Sequence[int] | NDArray[np.int32], *, budget_s: float | None = None) -> bool:
        """Hash the full blocks of `tokens` that are not hashed yet; True once all are.

        `tokens` is the whole sequence, which may have grown since the last call. With `budget_s` the call
        returns after about that time; call it again to go on.
        """
        n_blocks = len(tokens) // self._block_tokens
        deadline = None if budget_s is None else time.perf_counter() + budget_s
        keys, extras, key, width = self._keys, self._extras, self._digest, 4 * self._block_tokens
        parent = keys[-1] if keys else _ROOT
        blake2b, join, person, size = hashlib.blake2b, keys.append, _PERSON_BLOCK, KEY_NBYTES
        while len(keys) < n_blocks:
            if deadline is not None and time.perf_counter() >= deadline:
                return False
            first = len(keys)
            last = min(first + _HASH_SLICE, n_blocks)
            part = tokens[first * self._block_tokens : last * self._block_tokens]
            raw = np.asarray(part, dtype="<i4").tobytes()
            for block, start in enumerate(range(0, len(raw), width), first):
                message = parent + raw[start : start + width]
                if extras is not None:
                    message += extras(block)
                parent = blake2b(message, digest_size=size, key=key, person=person).digest()
                join(parent)
        return True


def block_keys(
    keyspace: KeySpace,
    tokens: Sequence[int] | NDArray[np.int32],
    *,
    extras: Callable[[int], bytes] | None = None,
) -> list[bytes]:
    """Hash the keys of all full blocks of `tokens`."""
    chain = KeyChain(keyspace, extras=extras)
    chain.advance(tokens)
    return list(chain.keys)


def pack_keys(keys: Iterable[bytes]) -> KeyBatch:
    """Lay keys side by side: uint8[n, 16]."""
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_NBYTES)


def unpack_keys(batch: KeyBatch) -> list[bytes]:
    """Split a batch into keys that hash and compare as bytes do."""
    raw = batch.tobytes()
    return [raw[i : i + KEY_NBYTES] for i in range(0, len(raw), KEY_NBYTES)]
