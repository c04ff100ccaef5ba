"""`Prober`: the thread beside the index that asks L2 what it has, and never keeps the index waiting."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kvrdma.backends import Lookup, StorageBackend
from kvrdma.cache.jobs import Probe, ProbeAnswer
from kvrdma.errors import KVRDMAError
from kvrdma.keys import KeySpace
from kvrdma.layout import Shard

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S: Final = 5.0


class Prober:
    """Answers probes in order; those that have waited for `timeout` seconds without asking.

    `on_answer` is called on its thread when `poll` has something new.
    """

    def __init__(
        self,
        backend: StorageBackend,
        shards: Sequence[Shard],
        *,
        timeout: float,
        on_answer: Callable[[], None] | None = None,
    ) -> None:
        self._backend = backend
        self._shards = tuple(shards)
        self._timeout = timeout
        self._on_answer = on_answer
        self._probes: queue.SimpleQueue[tuple[Probe, float] | None] = queue.SimpleQueue()
        self._answers: deque[ProbeAnswer] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvrdma-prober", daemon=True)
        self._thread.start()

    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Say which key space the probes that follow belong to."""
        self._backend.use_keyspace(keyspace)

    def submit(self, probes: Sequence[Probe]) -> None:
        """Ask; returns at once."""
        now = time.monotonic()
        for probe in probes:
            self._probes.put((probe, now))

    def poll(self) -> list[ProbeAnswer]:
        """The answers since the last call."""
        answers = []
        while self._answers:
            answers.append(self._answers.popleft())
        return answers

    def close(self) -> None:
        """End the thread after the probe under way; those behind it are not answered."""
        self._closed = True
        self._probes.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:  # connect now: the first request's lookup has no time for it
            self._backend.stats(timeout=_CONNECT_TIMEOUT_S)
        except KVRDMAError as error:
            logger.warning("L2 does not answer yet: %s", error)
        except Exception:  # the thread must live on: lookups wait for it
            logger.exception("L2 could not be asked")
        while (asked := self._probes.get()) is not None and not self._closed:
            probe, since = asked
            begun, seconds = time.monotonic(), None
            try:
                if begun - since < self._timeout:
                    found = self._backend.lookup(probe.keys, self._shards, timeout=self._timeout)
                else:  # nobody waits for it any more
                    found = Lookup.unavailable(len(probe.keys))
            except KVRDMAError as error:
                logger.info("probe %d: %s", probe.number, error)
                found = Lookup.unavailable(len(probe.keys))
            except Exception:  # a backend's fault must not silence every lookup that follows
                logger.exception("probe %d failed", probe.number)
                found = Lookup.unavailable(len(probe.keys))
            if not found.down:
                seconds = time.monotonic() - begun
            self._answers.append(ProbeAnswer(probe.number, found.present, found.down, found.differs, seconds))
            if self._on_answer is not None:
                self._on_answer()
