"""The prober: lookups go on beside the index, in order, whatever the store does."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from holding import PATIENCE_S, HoldingBackend

from kvrdma.backends import Lookup
from kvrdma.cache import Probe, Prober
from kvrdma.errors import BackendError
from kvrdma.keys import KeyBatch, pack_keys
from kvrdma.layout import Shard

KEYS = [bytes([i]) * 16 for i in range(3)]


class SlowBackend(HoldingBackend):
    """A lookup waits until it may go on, and then does what it was told."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(KEYS, b""))
        self.asked: list[int] = []
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.failures: list[Exception] = []

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        self.asked.append(len(keys))
        self.begun.release()
        assert self.go_on.acquire(timeout=PATIENCE_S)
        if self.failures:
            raise self.failures.pop()
        return super().lookup(keys, shards, timeout=timeout)

    def stats(self, *, timeout: float) -> dict[str, Any]:
        raise BackendError("not there yet")


def probes(n: int) -> list[Probe]:
    return [Probe(number, pack_keys(KEYS[: number + 1])) for number in range(n)]


@pytest.mark.parametrize("failure", [BackendError("down"), RuntimeError("a bug")])
def test_every_probe_is_answered_in_order_also_one_that_fails(failure: Exception) -> None:
    backend, told = SlowBackend(), threading.Semaphore(0)
    backend.failures = [failure]
    prober = Prober(backend, [Shard(0, 0, 1, 0, 1)], timeout=PATIENCE_S, on_answer=told.release)
    prober.submit(probes(3))
    for _ in range(3):
        backend.go_on.release()
        assert told.acquire(timeout=PATIENCE_S)
    answers = prober.poll()
    assert [(answer.number, answer.down, answer.present.tolist()) for answer in answers] == [
        (0, True, [False]),
        (1, False, [True] * 2),
        (2, False, [True] * 3),
    ]
    assert [answer.seconds is None for answer in answers] == [True, False, False]
    assert prober.poll() == []
    prober.close()


def test_what_nobody_waits_for_any_more_is_not_asked() -> None:
    """Behind one slow lookup: L2 has its time for those that somebody still waits for."""
    backend, told = SlowBackend(), threading.Semaphore(0)
    prober = Prober(backend, [Shard(0, 0, 1, 0, 1)], timeout=0.2, on_answer=told.release)
    prober.submit(probes(3))
    assert backend.begun.acquire(timeout=PATIENCE_S)
    time.sleep(0.25)
    for _ in range(4):
        backend.go_on.release()
    for _ in range(3):
        assert told.acquire(timeout=PATIENCE_S)
    assert backend.asked == [1]
    assert [answer.down for answer in prober.poll()] == [False, True, True]
    prober.submit(probes(1))
    assert told.acquire(timeout=PATIENCE_S)
    assert [answer.down for answer in prober.poll()] == [False]
    prober.close()


def test_a_close_waits_for_the_probe_under_way_and_no_other() -> None:
    backend = SlowBackend()
    prober = Prober(backend, [Shard(0, 0, 1, 0, 1)], timeout=PATIENCE_S)
    prober.submit(probes(3))
    assert backend.begun.acquire(timeout=PATIENCE_S)
    closing = threading.Thread(target=prober.close)
    closing.start()
    deadline = time.monotonic() + PATIENCE_S
    while not prober._closed and time.monotonic() < deadline:
        time.sleep(0.001)
    for _ in range(3):
        backend.go_on.release()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert backend.asked == [1]
