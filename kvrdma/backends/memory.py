"""`memory://?capacity=1GiB`: a store in this process, for tests, single-host use and as the smallest backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvrdma.backends.base import (
    GetStatus,
    GetTransfer,
    Lookup,
    PutStatus,
    PutTransfer,
    StorageBackend,
    check_batch,
    verify,
)
from kvrdma.backends.blockstore import BlockStore, check_capacity
from kvrdma.errors import BackendError, ClosedError, ConfigError
from kvrdma.keys import KeyBatch, KeySpace, unpack_keys
from kvrdma.layout import Checksums, Shard
from kvrdma.memory import Lease, Memory, Spans
from kvrdma.policies import open_policy
from kvrdma.settings import Settings, Url, option, parse_size, parse_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """The options of a `memory://` URL."""

    capacity: int = option(1 << 30, parse_size, "bytes the store may hold")
    policy: str = option("lru", parse_text, "eviction policy, by name")


class MemoryBackend(StorageBackend):
    """Copies blocks into slabs of its own and back, on one thread of its own."""

    def __init__(self, url: Url, settings: Settings) -> None:
        if url.hosts or url.path not in {"", "/"}:
            raise ConfigError(f"URL {url.text!r}: memory:// has neither host nor path, only options")
        options = url.read_options(MemoryOptions)
        check_capacity(options.capacity)
        self._store = BlockStore(options.capacity, open_policy(options.policy))
        self._guard = threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvrdma-memory")
        self._keyspace: int | None = None
        self._closed = False

    def register(self, memory: Memory) -> None:
        """Nothing to do: the memory is this process's."""

    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Say which key space the keys that follow belong to."""
        with self._guard:
            self._keyspace = self._store.open_keyspace(keyspace)

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        """Say what is there."""
        suffixes = [shard.encode() for shard in shards]
        with self._guard:
            keyspace = self._ready()
            present = [all(self._store.has(key + suffix) for suffix in suffixes) for key in unpack_keys(keys)]
            differs = () if any(present) else tuple(self._store.nearest_filled(keyspace))
        return Lookup(np.array(present, dtype=np.bool_), differs=differs)

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        """Copy blocks into the target."""
        check_batch(keys, target)
        self._ready()
        transfer = GetTransfer(len(keys), hold=hold)
        self._start(transfer, lambda: self._get(transfer, keys, shard, target))
        return transfer

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
        """Copy blocks that are not there yet."""
        check_batch(keys, source, checksums)
        keyspace = self._ready()
        transfer = PutTransfer(len(keys), hold=hold)
        self._start(transfer, lambda: self._put(transfer, keyspace, keys, shard, source, checksums))
        return transfer

    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        """Drop every shard of the keys."""
        with self._guard:
            self._check_open()
            return self._store.delete(set(unpack_keys(keys)))

    def stats(self, *, timeout: float) -> dict[str, Any]:
        """The store's counters."""
        with self._guard:
            self._check_open()
            return self._store.stats()

    def close(self) -> None:
        """Let the copies under way end, then free the memory."""
        if not self._closed:
            self._closed = True
            self._worker.shutdown()
            self._store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("memory:// backend: closed")

    def _ready(self) -> int:
        self._check_open()
        if self._keyspace is None:
            raise BackendError("memory:// backend: use_keyspace must come before the first call")
        return self._keyspace

    def _start(self, transfer: GetTransfer | PutTransfer, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # a worker's exception would be lost, and the lease with it
                logger.exception("memory:// backend: a transfer failed unexpectedly")
                transfer.conclude(BackendError(f"{type(error).__name__}: {error}"))

        try:
            self._worker.submit(run)
        except RuntimeError:
            transfer.conclude(ClosedError("memory:// backend: closed"))

    def _get(self, transfer: GetTransfer, keys: KeyBatch, shard: Shard, target: Spans) -> None:
        suffix = shard.encode()
        with self._guard:
            entries = self._store.pin(key + suffix for key in unpack_keys(keys))
        sizes = target.key_nbytes()
        transfer.status[:] = GetStatus.MISSING
        for i, entry in enumerate(entries):
            if entry is None or entry.nbytes != sizes[i]:
                continue
            stored, offset = entry.view(), 0
            for part in target.parts(i):
                part[:] = stored[offset : offset + part.nbytes]
                offset += part.nbytes
            transfer.status[i] = GetStatus.OK
            transfer.checksums[i] = entry.checksum
        good = verify(keys, shard, target, transfer.checksums, transfer.status == GetStatus.OK)
        wrong = (transfer.status == GetStatus.OK) & ~good
        transfer.status[wrong] = GetStatus.CHECKSUM
        with self._guard:
            for i in np.flatnonzero(wrong).tolist():
                entry = entries[i]
                if entry is not None:
                    self._store.drop_wrong(entry)
            self._store.unpin(entry for entry in entries if entry is not None)
        transfer.conclude()

    def _put(
        self,
        transfer: PutTransfer,
        keyspace: int,
        keys: KeyBatch,
        shard: Shard,
        source: Spans,
        checksums: Checksums,
    ) -> None:
        suffix = shard.encode()
        names = [key + suffix for key in unpack_keys(keys)]
        with self._guard:
            present = np.array([self._store.has(name) for name in names], dtype=np.bool_)
            entries = self._store.reserve(keyspace, names, source.key_nbytes().tolist())
        transfer.status[:] = np.where(present, PutStatus.EXISTS, PutStatus.DECLINED)
        for i, entry in enumerate(entries):
            if entry is not None:
                np.concatenate(source.parts(i), out=entry.view())
                transfer.status[i] = PutStatus.STORED
        with self._guard:
            for i, entry in enumerate(entries):
                if entry is not None:
                    self._store.commit(entry, int(checksums[i]))
        transfer.conclude()
