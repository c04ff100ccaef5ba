"""A breaker around any backend: a store that fails is left alone for a while, and every failure is a miss."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final

from kvrdma.backends.base import GetTransfer, Lookup, PutTransfer, StorageBackend
from kvrdma.errors import BackendError, KVRDMAError
from kvrdma.keys import KeyBatch, KeySpace
from kvrdma.layout import Checksums, Shard
from kvrdma.memory import Lease, Memory, Spans
from kvrdma.transports import Transfer

logger = logging.getLogger(__name__)

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0
FORGET_S: Final = 60.0


class BreakerState(Enum):
    """Whether calls go through."""

    CLOSED = "closed"  # they do
    OPEN = "open"  # they fail at once, until the pause is over
    TRYING = "trying"  # one call is on its way to find out


class BreakerBackend(StorageBackend):
    """Turns failures of L2 into misses, and after one leaves it alone: 0.5 s at first, up to 15 s.

    One call then tries again. The pause is short again after a transfer that succeeds, or a minute without a
    failure: a lookup alone does not show that bytes come through. Nothing raises but `delete` and `stats`, whose
    callers want to know.
    """

    def __init__(self, inner: StorageBackend, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._clock = clock
        self._guard = threading.Lock()
        self._state = BreakerState.CLOSED
        self._pause_s = FIRST_PAUSE_S
        self._retry_at = 0.0
        self._failed_at = 0.0
        self._trial_is_long = False
        self.failures = 0

    @property
    def state(self) -> BreakerState:
        """Whether calls go through."""
        return self._state

    def register(self, memory: Memory) -> None:
        """Pass on."""
        self._inner.register(memory)

    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Pass on."""
        self._inner.use_keyspace(keyspace)

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        """What is there; `down` where the store cannot say."""
        if not self._admit():
            return Lookup.unavailable(len(keys))
        try:
            answer = self._inner.lookup(keys, shards, timeout=timeout)
        except Exception as error:  # whatever it is: it is a miss, and a trial must not stay open
            self._failed(error)
            return Lookup.unavailable(len(keys))
        self._succeeded(moved_bytes=False)
        return answer

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        """Fetch; every key FAILED where the store is left alone."""
        if self._admit():
            try:
                transfer = self._inner.get_into(keys, shard, target, hold=hold, timeout=timeout)
            except Exception as error:  # whatever it is: it is a miss, and a trial must not stay open
                self._failed(error)
            else:
                transfer.add_done_callback(self._judge)
                return transfer
        refused = GetTransfer(len(keys))
        refused.conclude(BackendError("L2 is left alone after a failure"))
        return refused

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
        """Store; every key FAILED where the store is left alone."""
        if self._admit(long=True):
            try:
                transfer = self._inner.put(keys, shard, source, checksums, hold=hold, timeout=timeout)
            except Exception as error:  # whatever it is: it is a miss, and a trial must not stay open
                self._failed(error)
            else:
                transfer.add_done_callback(self._judge)
                return transfer
        refused = PutTransfer(len(keys))
        refused.conclude(BackendError("L2 is left alone after a failure"))
        return refused

    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        """Pass on."""
        return self._inner.delete(keys, timeout=timeout)

    def stats(self, *, timeout: float) -> dict[str, Any]:
        """Pass on."""
        return self._inner.stats(timeout=timeout)

    def close(self) -> None:
        """Pass on."""
        self._inner.close()

    def _admit(self, *, long: bool = False) -> bool:
        """Whether a call may go through. One that may take long is no trial that others wait for."""
        with self._guard:
            if self._state is BreakerState.CLOSED:
                return True
            due = self._state is BreakerState.OPEN and self._clock() >= self._retry_at
            if due or (self._state is BreakerState.TRYING and self._trial_is_long and not long):
                self._state = BreakerState.TRYING
                self._trial_is_long = long
                return True
            return False

    def _judge(self, transfer: Transfer) -> None:
        if transfer.error is None:
            self._succeeded(moved_bytes=bool(transfer.ok.any()))
        else:
            self._failed(transfer.error)

    def _succeeded(self, *, moved_bytes: bool) -> None:
        with self._guard:
            was = self._state
            self._state = BreakerState.CLOSED
            if moved_bytes:
                self._pause_s = FIRST_PAUSE_S
        if was is not BreakerState.CLOSED:
            logger.warning("L2 answers again")

    def _failed(self, error: Exception) -> None:
        with self._guard:
            self.failures += 1
            if self._state is BreakerState.OPEN:
                return
            self._state = BreakerState.OPEN
            now = self._clock()
            pause = FIRST_PAUSE_S if now - self._failed_at > FORGET_S else self._pause_s
            self._failed_at, self._retry_at = now, now + pause
            self._pause_s = min(LONGEST_PAUSE_S, 2 * pause)
        unexpected = None if isinstance(error, KVRDMAError) else error
        logger.warning("L2 failed and is left alone for %.1f s: %s", pause, error, exc_info=unexpected)
