"""A store whose transfers end when the test says so: what is slow, late or never comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvrdma.backends import GetStatus, GetTransfer, Lookup, PutStatus, PutTransfer, StorageBackend
from kvrdma.errors import BackendError
from kvrdma.keys import KeyBatch, KeySpace, unpack_keys
from kvrdma.layout import Checksums, Shard, checksum
from kvrdma.memory import Lease, Memory, Spans

PATIENCE_S = 30.0


class HoldingBackend(StorageBackend):
    """Has every block of `blocks`, by key; a get or put is under way until `land` or `fail`."""

    def __init__(self, blocks: dict[bytes, bytes] | None = None) -> None:
        self.blocks = {} if blocks is None else blocks
        self.deleted: list[bytes] = []
        self._started = threading.Condition()
        self._held: list[tuple[GetTransfer | PutTransfer, Callable[[], None]]] = []

    def land(self, *, whole: bool = True) -> None:
        """Let the oldest transfer move its bytes; with `whole=False` these come, and it does not end."""
        transfer, work = self._oldest()
        work()
        if whole:
            self._end(transfer, None)

    def fail(self, error: BackendError) -> None:
        """End the oldest transfer without its bytes."""
        self._end(self._oldest()[0], error)

    def _oldest(self) -> tuple[GetTransfer | PutTransfer, Callable[[], None]]:
        with self._started:
            assert self._started.wait_for(lambda: self._held, PATIENCE_S)
            return self._held[0]

    def _end(self, transfer: GetTransfer | PutTransfer, error: BackendError | None) -> None:
        self._held.pop(0)
        if error is not None:
            transfer.status[:] = GetStatus.FAILED
        transfer.conclude(error)

    def _hold(self, transfer: GetTransfer | PutTransfer, work: Callable[[], None]) -> None:
        with self._started:
            self._held.append((transfer, work))
            self._started.notify_all()

    # -- the interface

    def register(self, memory: Memory) -> None:
        pass

    def use_keyspace(self, keyspace: KeySpace) -> None:
        pass

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        return Lookup(np.array([key in self.blocks for key in unpack_keys(keys)], dtype=np.bool_))

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        transfer = GetTransfer(len(keys), hold=hold)

        def work() -> None:
            for i, key in enumerate(unpack_keys(keys)):
                (part,) = target.parts(i)
                part[:] = np.frombuffer(self.blocks[key], dtype=np.uint8)
                transfer.checksums[i] = checksum(key, shard.encode(), [part])
                transfer.status[i] = GetStatus.OK

        self._hold(transfer, work)
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
        transfer = PutTransfer(len(keys), hold=hold)

        def work() -> None:
            for i, key in enumerate(unpack_keys(keys)):
                self.blocks[key] = bytes(source.parts(i)[0])
                transfer.status[i] = PutStatus.STORED

        self._hold(transfer, work)
        return transfer

    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        self.deleted += unpack_keys(keys)
        return sum(self.blocks.pop(key, None) is not None for key in unpack_keys(keys))

    def stats(self, *, timeout: float) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        while self._held:
            self.fail(BackendError("closed"))
