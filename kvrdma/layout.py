"""Where the bytes of a block lie: in device memory (`BlockLayout`) and in the pool (`Shard`, `Spans`)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvrdma.errors import ConfigError, ProtocolError

Int64s = NDArray[np.int64]
Bitmap = NDArray[np.bool_]
Checksums = NDArray[np.uint64]

_SHARD = struct.Struct("<5H")
SHARD_NBYTES: Final = _SHARD.size


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """The part of a block that is stored as one object: a KV group, a range of layers, a range of KV heads."""

    group: int
    first_layer: int
    last_layer: int
    first_head: int
    last_head: int

    def __post_init__(self) -> None:
        whole = (self.group, self.first_layer, self.last_layer, self.first_head, self.last_head)
        if min(whole) < 0 or max(whole) > 0xFFFF:
            raise ConfigError(f"shard: every number must lie in 0..65535, got {whole}")
        if self.first_layer >= self.last_layer or self.first_head >= self.last_head:
            raise ConfigError(f"shard: ranges must not be empty (the last is excluded), got {whole}")

    def encode(self) -> bytes:
        """10 bytes, equal on every machine."""
        return _SHARD.pack(self.group, self.first_layer, self.last_layer, self.first_head, self.last_head)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read what `encode` wrote; raises `ProtocolError` on anything else."""
        if len(raw) != SHARD_NBYTES:
            raise ProtocolError(f"shard: {SHARD_NBYTES} bytes expected, got {len(raw)}")
        try:
            return cls(*_SHARD.unpack(raw))
        except ConfigError as error:
            raise ProtocolError(str(error)) from error


@dataclass(frozen=True, slots=True)
class ByteRun:
    """One strided run of a block in device memory: usually one layer of it.

    Block b of it is the `nbytes` contiguous bytes at `address + b * block_stride`.
    """

    name: str
    address: int
    block_stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One rank's blocks in device memory: the runs that lie one behind the other in a slot.

    `keepalive` is whatever owns the memory; `device` is "cpu" or as torch prints it.
    """

    n_blocks: int
    runs: tuple[ByteRun, ...]
    device: str = "cpu"
    keepalive: Any = None

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("block layout: no runs; the engine registered no KV cache")
        if self.n_blocks < 1:
            raise ConfigError(f"block layout: at least 1 block is needed, not {self.n_blocks}")
        for run in self.runs:
            if run.nbytes < 1 or run.block_stride < run.nbytes:
                raise ConfigError(
                    f"block layout: {run.name}: {run.nbytes} bytes do not fit a stride of {run.block_stride}"
                )

    @property
    def nbytes(self) -> int:
        """The bytes of one block: what a slot must hold."""
        return sum(run.nbytes for run in self.runs)


def payload_seed(key: bytes, shard: bytes) -> int:
    """What ties a checksum to its key and shard: the seed of the payload's xxh3-64."""
    return xxhash.xxh3_64_intdigest(key + shard)


def checksum(key: bytes, shard: bytes, parts: Sequence[Any]) -> int:
    """xxh3-64 over key, shard and payload; `parts` are the payload's buffers in order."""
    seed = payload_seed(key, shard)
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0], seed=seed)
    hasher = xxhash.xxh3_64(seed=seed)
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()
