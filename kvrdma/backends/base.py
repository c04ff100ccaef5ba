"""L2: what a store below the pinned cache promises. Bytes go straight from and into registered memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import BackendError, KVRDMAError
from kvrdma.keys import KeyBatch, KeySpace, unpack_keys
from kvrdma.layout import Bitmap, Checksums, Shard, checksum
from kvrdma.memory import Lease, Memory, Spans
from kvrdma.transports import Transfer


class GetStatus(IntEnum):
    """What became of one key of a get."""

    OK = 0
    MISSING = 1
    CHECKSUM = 2
    FAILED = 3


class PutStatus(IntEnum):
    """What became of one key of a put."""

    STORED = 0
    EXISTS = 1
    DECLINED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a store has. `present[i]`: key i is there on every shard that was named.

    `down` means that the store could not say. `differs` names the fields in which the nearest key space that
    is not empty differs from this one, where this one is empty: why nothing is there.
    """

    present: Bitmap
    down: bool = False
    differs: tuple[str, ...] = ()

    @property
    def run(self) -> int:
        """How many leading keys are there."""
        missing = np.flatnonzero(~self.present)
        return int(missing[0]) if missing.size else len(self.present)

    @classmethod
    def unavailable(cls, n: int) -> Self:
        """The answer of a store that could not say."""
        return cls(np.zeros(n, dtype=np.bool_), down=True)


class GetTransfer(Transfer):
    """A get under way: `status` (a `GetStatus` a key) and the verified `checksums`, valid once terminal."""

    def __init__(self, n: int, *, hold: Lease | None = None) -> None:
        super().__init__(n, hold=hold)
        self.status: NDArray[np.uint8] = np.full(n, GetStatus.FAILED, dtype=np.uint8)
        self.checksums: Checksums = np.zeros(n, dtype=np.uint64)

    def conclude(self, error: KVRDMAError | None = None) -> None:
        """Make it terminal as `status` says."""
        self.finish(self.status == GetStatus.OK, error)


class PutTransfer(Transfer):
    """A put under way: `status` (a `PutStatus` a key), valid once terminal; `ok` where the key is there."""

    def __init__(self, n: int, *, hold: Lease | None = None) -> None:
        super().__init__(n, hold=hold)
        self.status: NDArray[np.uint8] = np.full(n, PutStatus.FAILED, dtype=np.uint8)

    def conclude(self, error: KVRDMAError | None = None) -> None:
        """Make it terminal as `status` says."""
        self.finish(self.status <= PutStatus.EXISTS, error)


class StorageBackend(ABC):
    """A store of blocks by key and shard. Thread-safe.

    `hold` keeps the memory from being used again; the backend retains it until the transfer is terminal. With
    `hold=None` (memory that is not ours) nothing keeps it but the caller.
    """

    @abstractmethod
    def register(self, memory: Memory) -> None:
        """Make memory usable for gets and puts; once for each slab, never in the data path."""

    @abstractmethod
    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Say which key space the keys of the calls that follow belong to. No I/O."""

    @abstractmethod
    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        """Say what is there; raises `KVRDMAError` where the store cannot say within `timeout` seconds."""

    @abstractmethod
    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        """Fetch blocks into the target; a miss is False in its place, never a shift. Bytes are verified."""

    @abstractmethod
    def put(
        self,
        keys: KeyBatch,
        shard: Shard,
        source: Spans,
        checksums: Checksums,
        *,
        hold: Lease | None,
        timeout: float,
    ) -> PutTransfer:
        """Store blocks that are not there yet."""

    @abstractmethod
    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        """Drop every shard of the keys; how many objects went. Raises `KVRDMAError`."""

    @abstractmethod
    def stats(self, *, timeout: float) -> dict[str, Any]:
        """The store's counters. Raises `KVRDMAError`."""

    @abstractmethod
    def close(self) -> None:
        """End what is under way and let go of connections. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_batch(keys: KeyBatch, spans: Spans, checksums: Checksums | None = None) -> None:
    """Raise `BackendError` where keys, spans and checksums are not of one batch."""
    if keys.ndim != 2 or keys.shape[1] != 16 or keys.dtype != np.uint8:
        raise BackendError(f"keys: uint8[n, 16] is needed, got {keys.dtype}{list(keys.shape)}")
    if spans.n_keys != len(keys) or (checksums is not None and len(checksums) != len(keys)):
        raise BackendError(f"{len(keys)} keys, but spans or checksums of another number")
    if len(keys) and (spans.key_nbytes() == 0).any():
        raise BackendError("a key without any span")


def verify(keys: KeyBatch, shard: Shard, spans: Spans, checksums: Checksums, ok: Bitmap) -> Bitmap:
    """Of the keys that arrived (`ok`), those whose bytes have their checksum: bool[n]."""
    good = ok.copy()
    name = shard.encode()
    names = unpack_keys(keys)
    for i in np.flatnonzero(ok):
        good[i] = checksum(names[i], name, spans.parts(int(i))) == int(checksums[i])
    return good
