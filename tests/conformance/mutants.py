"""Parts with one fault each. `test_mutants.py` runs the suites on them, and each must fail the test it names."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from kvrdma.backends import GetTransfer, PutTransfer, StorageBackend
from kvrdma.backends.memory import MemoryBackend
from kvrdma.errors import DeadlineError, KVRDMAError
from kvrdma.keys import KeyBatch
from kvrdma.layout import Shard
from kvrdma.memory import Spans
from kvrdma.policies import EvictionPolicy
from kvrdma.policies.lru import LruPolicy
from kvrdma.settings import Settings, Url
from kvrdma.testing import EvictionPolicySuite, StorageBackendSuite, TransportSuite
from kvrdma.testing import transports as testing
from kvrdma.transports import Opcode, Transfer, TransferBatch, Transport, inproc
from kvrdma.transports.inproc import InprocEndpoint, InprocTransport

testing.PATIENCE_S = 2.0  # type: ignore[misc]  # one of them keeps whoever waits for it


def poke(address: int) -> None:
    """Change one byte."""
    byte = ctypes.c_uint8.from_address(address)
    byte.value += 1


# -- transports


class MutantSuite(TransportSuite):
    """The transport within one process, with another kind of endpoint."""

    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = "nobody"
    endpoint: ClassVar[type[InprocEndpoint]]
    must_fail: ClassVar[str]

    @pytest.fixture(autouse=True)
    def _mutant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inproc, "InprocEndpoint", self.endpoint)

    def make_transport(self) -> Transport:
        return InprocTransport()


class Scribbler(InprocEndpoint):
    """Writes one byte too many where a range ends with its region."""

    def _execute(self, batch: TransferBatch, transfer: Transfer) -> None:
        for row, offset, nbytes in zip(batch.local_rows, batch.local_offsets, batch.nbytes, strict=True):
            region = batch.local[row]
            if batch.opcode is Opcode.READ and offset + nbytes == region.nbytes:
                poke(region.memory.address + region.nbytes)
        super()._execute(batch, transfer)


class TestScribbler(MutantSuite):
    endpoint = Scribbler
    must_fail = "test_close_drains"


class ScribblesLater(InprocEndpoint):
    """Goes on writing into the memory of a transfer that it has given up."""

    late: TransferBatch | None = None

    def post(self, batch: TransferBatch, **how: Any) -> Transfer:
        transfer = super().post(batch, **how)

        def note(done: Transfer) -> None:
            if done.error is not None:
                self.late = batch

        transfer.add_done_callback(note)
        return transfer

    def close(self, *, timeout: float = 5.0) -> None:
        super().close(timeout=timeout)
        if self.late is not None:
            poke(self.late.local[0].memory.address)


class TestScribblesLater(MutantSuite):
    endpoint = ScribblesLater
    must_fail = "test_a_time_out_leaves_nothing_behind"


class LeaksTimeouts(InprocEndpoint):
    """Keeps what a transfer held that it has given up."""

    def post(self, batch: TransferBatch, **how: Any) -> Transfer:
        hold, timeout = how.get("hold"), how.get("timeout")
        transfer = super().post(batch, **how)
        if hold is not None and timeout is not None:
            hold.retain()
            transfer.add_done_callback(lambda done: None if done.error else hold.release())
        return transfer


class TestLeaksTimeouts(MutantSuite):
    endpoint = LeaksTimeouts
    must_fail = "test_a_time_out_leaves_nothing_behind"


class ForgetsTimeouts(InprocEndpoint):
    """Tells nobody of what it has given up."""

    def _finish(self, transfer: Transfer, ok: np.ndarray | None, error: KVRDMAError | None) -> None:
        if not isinstance(error, DeadlineError):
            super()._finish(transfer, ok, error)


class TestForgetsTimeouts(MutantSuite):
    endpoint = ForgetsTimeouts
    must_fail = "test_a_time_out_leaves_nothing_behind"


# -- stores


class MutantStoreSuite(StorageBackendSuite):
    needs_registration: ClassVar[bool] = False
    capacity: ClassVar[int | None] = 64 << 20
    store: ClassVar[type[MemoryBackend]]
    must_fail: ClassVar[str]

    def make_backend(self) -> StorageBackend:
        return self.store(Url.parse("memory://?capacity=64MiB"), Settings())


class ScribblingStore(MemoryBackend):
    """Copies whole words, so that the byte behind a target changes, too."""

    def get_into(self, keys: KeyBatch, shard: Shard, target: Spans, **how: Any) -> GetTransfer:
        transfer = super().get_into(keys, shard, target, **how)
        transfer.result()
        for memory_row, offset, nbytes in zip(target.memory_row, target.offset, target.nbytes, strict=True):
            memory = target.memories[memory_row]
            if offset + nbytes < memory.nbytes and nbytes < 4096:
                poke(memory.address + int(offset + nbytes))
        return transfer


class TestScribblingStore(MutantStoreSuite):
    store = ScribblingStore
    must_fail = "test_no_byte_beside_its_spans_is_touched"


class ScribblesOverMisses(MemoryBackend):
    """Clears the targets of a get before it looks for the blocks."""

    def get_into(self, keys: KeyBatch, shard: Shard, target: Spans, **how: Any) -> GetTransfer:
        for row in range(len(keys)):
            for part in target.parts(row):
                part[:] = 0
        return super().get_into(keys, shard, target, **how)


class TestScribblesOverMisses(MutantStoreSuite):
    store = ScribblesOverMisses
    must_fail = "test_no_byte_beside_its_spans_is_touched"


class StoreLeaksTimeouts(MemoryBackend):
    """Keeps the hold of a call that came too late."""

    def get_into(self, keys: KeyBatch, shard: Shard, target: Spans, **how: Any) -> GetTransfer:
        if how["timeout"] < 0.1 and how["hold"] is not None:
            how["hold"].retain()
        return super().get_into(keys, shard, target, **how)


class TestStoreLeaksTimeouts(MutantStoreSuite):
    store = StoreLeaksTimeouts
    must_fail = "test_a_time_out_leaves_nothing_behind"


class DropOverCapacity(MemoryBackend):
    """Says that it stored what it had no room for."""

    stored = 0

    def put(self, keys: KeyBatch, shard: Shard, source: Spans, checksums: Any, **how: Any) -> PutTransfer:
        transfer = super().put(keys, shard, source, checksums, **how)
        transfer.result()
        self.stored += int(source.nbytes.sum())
        if self.stored > 64 << 20:
            self.delete(keys, timeout=how["timeout"])
        return transfer


class TestDropOverCapacity(MutantStoreSuite):
    store = DropOverCapacity
    must_fail = "test_a_full_store_says_what_it_does_not_store"


# -- policies


class DroppingPolicy(LruPolicy):
    """Makes room by itself: the block stays in the cache, and nobody evicts it any more."""

    def insert(self, key: bytes, *, parent: bytes | None = None, cost: float = 1.0) -> None:
        super().insert(key, parent=parent, cost=cost)
        if len(self) > self.capacity:
            self.evict(next(iter(self._touched)))


class TestDroppingPolicy(EvictionPolicySuite):
    policy: ClassVar[type[EvictionPolicy]] = DroppingPolicy
    must_fail: ClassVar[str] = "test_nothing_goes_by_itself"


def mutants() -> Iterator[tuple[str, str]]:
    """Each class of tests, and the test that must fail."""
    for name, suite in globals().items():
        if name.startswith("Test") and hasattr(suite, "must_fail"):
            yield name, suite.must_fail
