"""The breaker on a clock of the test's own, around a store that fails when it is told to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from kvrdma.backends import GetStatus, GetTransfer, Lookup, PutStatus, PutTransfer, StorageBackend
from kvrdma.backends.breaker import FIRST_PAUSE_S, FORGET_S, LONGEST_PAUSE_S, BreakerBackend, BreakerState
from kvrdma.errors import BackendError, DeadlineError, KVRDMAError, TransportError
from kvrdma.keys import KeyBatch, KeySpace
from kvrdma.layout import Checksums, Shard
from kvrdma.memory import Lease, Memory, PinnedPool, Spans

SHARD = Shard(0, 0, 1, 0, 1)
KEYS = np.zeros((3, 16), dtype=np.uint8)
CHECKSUMS = np.zeros(3, dtype=np.uint64)
SLOTS = np.arange(3, dtype=np.int64)


class Store(StorageBackend):
    """Has everything; raises `fault` where there is one; its transfers end when the test ends them."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.calls: list[str] = []
        self.transfers: list[GetTransfer | PutTransfer] = []

    def _called(self, what: str) -> None:
        self.calls.append(what)
        if self.fault is not None:
            raise self.fault

    def register(self, memory: Memory) -> None:
        self._called("register")

    def use_keyspace(self, keyspace: KeySpace) -> None:
        self._called("use_keyspace")

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        self._called("lookup")
        return Lookup(np.ones(len(keys), dtype=np.bool_))

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        self._called("get_into")
        transfer = GetTransfer(len(keys), hold=hold)
        self.transfers.append(transfer)
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
        self._called("put")
        transfer = PutTransfer(len(keys), hold=hold)
        self.transfers.append(transfer)
        return transfer

    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        self._called("delete")
        return len(keys)

    def stats(self, *, timeout: float) -> dict[str, Any]:
        self._called("stats")
        return {"blocks": 1}

    def close(self) -> None:
        self._called("close")


class Bench:
    def __init__(self) -> None:
        self.now = 0.0
        self.store = Store()
        self.breaker = BreakerBackend(self.store, clock=lambda: self.now)
        self.pool = PinnedPool(64, 3)

    def lookup(self) -> Lookup:
        return self.breaker.lookup(KEYS, [SHARD], timeout=1.0)

    def get(self) -> GetTransfer:
        with self.pool.lease(SLOTS) as lease:
            return self.breaker.get_into(KEYS, SHARD, self.pool.spans(SLOTS), hold=lease, timeout=1.0)

    def put(self) -> PutTransfer:
        with self.pool.lease(SLOTS) as lease:
            return self.breaker.put(KEYS, SHARD, self.pool.spans(SLOTS), CHECKSUMS, hold=lease, timeout=1.0)

    def fail(self, error: Exception | None = None) -> None:
        """One failure."""
        self.store.fault = error or TransportError("no")
        self.lookup()
        self.store.fault = None


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_while_nothing_fails_everything_is_passed_on(bench: Bench) -> None:
    assert bench.lookup().present.all()
    get, put = bench.get(), bench.put()
    assert (get, put) == tuple(bench.store.transfers)
    for transfer in (get, put):
        transfer.status[:] = 0
        transfer.conclude()
    assert bench.breaker.delete(KEYS, timeout=1.0) == 3
    assert bench.breaker.stats(timeout=1.0) == {"blocks": 1}
    bench.breaker.close()
    assert bench.store.calls == ["lookup", "get_into", "put", "delete", "stats", "close"]
    assert bench.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("error", [TransportError("no"), DeadlineError("no"), BackendError("no"), ValueError("no")])
def test_a_failure_is_a_miss_and_the_store_is_left_alone(bench: Bench, error: Exception) -> None:
    bench.store.fault = error
    found = bench.lookup()
    assert found.down
    assert not found.present.any()
    bench.store.fault = None
    calls = len(bench.store.calls)
    assert bench.lookup().down
    get, put = bench.get(), bench.put()
    assert get.status.tolist() == [GetStatus.FAILED] * 3
    assert put.status.tolist() == [PutStatus.FAILED] * 3
    for transfer in (get, put):
        assert transfer.done()
        assert not transfer.ok.any()
        assert transfer.error is not None
    assert len(bench.store.calls) == calls
    assert bench.pool.n_leases == 0
    assert bench.breaker.failures == 1


@pytest.mark.parametrize("error", [TransportError("no"), ValueError("no")])
def test_a_get_or_put_that_cannot_begin_is_failed_not_raised(bench: Bench, error: Exception) -> None:
    bench.store.fault = error
    assert not bench.get().result(0).any()
    assert not bench.put().result(0).any()
    assert bench.breaker.failures == 1
    assert bench.pool.n_leases == 0


def test_lookups_do_not_wait_for_a_put_that_tries(bench: Bench) -> None:
    """A put tries too, since a client may do nothing else; but it may take long."""
    bench.fail()
    bench.now += FIRST_PAUSE_S
    put = bench.put()
    assert not put.done()
    assert bench.breaker.state is BreakerState.TRYING
    refused = bench.put()  # one put tries, not all
    assert refused.done()
    assert not refused.ok.any()
    assert not bench.lookup().down
    assert bench.breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("kind", ["get", "put"])
def test_a_transfer_that_ends_with_an_error_opens_it(bench: Bench, kind: str) -> None:
    transfer = bench.get() if kind == "get" else bench.put()
    assert bench.breaker.state is BreakerState.CLOSED
    transfer.conclude(TransportError("broke"))
    assert bench.breaker.state is BreakerState.OPEN


def test_misses_open_nothing(bench: Bench) -> None:
    get = bench.get()
    get.status[:] = GetStatus.MISSING
    get.conclude()
    put = bench.put()
    put.status[:] = PutStatus.DECLINED
    put.conclude()
    assert bench.breaker.state is BreakerState.CLOSED


def test_after_the_pause_one_call_tries_and_closes_it(bench: Bench) -> None:
    bench.fail()
    bench.now += FIRST_PAUSE_S / 2
    assert bench.lookup().down
    bench.now += FIRST_PAUSE_S / 2
    get = bench.get()
    assert bench.breaker.state is BreakerState.TRYING
    assert bench.lookup().down  # one at a time
    assert bench.store.calls == ["lookup", "get_into"]
    get.status[:] = GetStatus.OK
    get.conclude()
    assert bench.breaker.state is BreakerState.CLOSED
    assert bench.lookup().present.all()


def test_the_pause_doubles_up_to_its_limit_and_starts_over_after_a_success(bench: Bench) -> None:
    pause = FIRST_PAUSE_S
    for _ in range(8):
        bench.fail()
        calls = len(bench.store.calls)
        bench.now += pause * 0.99
        assert bench.lookup().down
        assert len(bench.store.calls) == calls
        bench.now += pause * 0.02
        pause = min(LONGEST_PAUSE_S, 2 * pause)
    get = bench.get()
    get.status[:] = GetStatus.OK
    get.conclude()
    bench.fail()
    bench.now += FIRST_PAUSE_S
    assert bench.lookup().present.all()


def test_a_lookup_that_succeeds_does_not_make_the_pause_short_again(bench: Bench) -> None:
    """Where lookups go through and data does not, the store would be tried twice a second for ever."""
    bench.fail()
    bench.now += FIRST_PAUSE_S
    assert bench.lookup().present.all()
    bench.get().conclude(TransportError("broke"))
    bench.now += FIRST_PAUSE_S * 1.5
    assert bench.lookup().down
    bench.now += FIRST_PAUSE_S
    assert bench.lookup().present.all()
    bench.now += FORGET_S  # so long without a failure: the next one is a new one
    bench.fail()
    bench.now += FIRST_PAUSE_S
    assert bench.lookup().present.all()


@pytest.mark.parametrize("error", [TransportError("no"), ValueError("no")])
def test_a_trial_that_fails_in_any_way_is_not_the_last_one(bench: Bench, error: Exception) -> None:
    bench.fail()
    bench.now += FIRST_PAUSE_S
    bench.fail(error)
    assert bench.breaker.state is BreakerState.OPEN
    bench.now += 2 * FIRST_PAUSE_S
    assert bench.lookup().present.all()
    assert bench.breaker.state is BreakerState.CLOSED


def test_many_failures_of_one_outage_are_one_pause(bench: Bench) -> None:
    transfers = [bench.get() for _ in range(5)]
    for transfer in transfers:
        transfer.conclude(TransportError("broke"))
    assert bench.breaker.failures == 5
    bench.now += FIRST_PAUSE_S
    assert bench.lookup().present.all()


def test_delete_and_stats_tell_what_went_wrong(bench: Bench) -> None:
    bench.store.fault = TransportError("no")
    with pytest.raises(KVRDMAError):
        bench.breaker.delete(KEYS, timeout=1.0)
    with pytest.raises(KVRDMAError):
        bench.breaker.stats(timeout=1.0)
