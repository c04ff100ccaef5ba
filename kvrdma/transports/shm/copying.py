"""Threads that copy: pieces of batches, lowest priority number first, one memmove a range."""

from __future__ import annotations

import ctypes
import heapq
import itertools
import logging
import os
import threading
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvrdma.errors import ClosedError

logger = logging.getLogger(__name__)

_MAX_THREADS: Final = 4


def default_threads() -> int:
    """How many threads copy: one for four CPUs, four at most."""
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // 4))


class Owner(Protocol):
    """Whose pieces are copied."""

    def may_copy(self, piece: Piece) -> bool:
        """Whether a piece that has its turn is still wanted."""

    def copied(self, piece: Piece, whole: bool) -> None:
        """A piece has been copied as a whole, or not at all. Nothing touches its memory any more."""


@dataclass(slots=True, eq=False)
class Piece:
    """Ranges of one batch: addresses and sizes to copy, and what the owner knows them by."""

    owner: Owner
    operation: Any
    first: int
    last: int
    targets: list[int]
    sources: list[int]
    nbytes: list[int]


class CopyThreads:
    """A queue of pieces, and the threads that work on it."""

    def __init__(self, n_threads: int) -> None:
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, Piece]] = []
        self._order = itertools.count()
        self._running: set[Piece] = set()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"kvrdma-shm-copy-{i}", daemon=True) for i in range(n_threads)
        ]
        for thread in self._threads:
            thread.start()

    def inside(self) -> bool:
        """Whether the caller is on one of the threads."""
        return threading.current_thread() in self._threads

    def submit(self, priority: int, pieces: list[Piece]) -> None:
        """Queue pieces; raises `ClosedError` where nobody would copy them."""
        with self._changed:
            if self._closed:
                raise ClosedError("shm transport: closed")
            for piece in pieces:
                heapq.heappush(self._queue, (priority, next(self._order), piece))
            self._changed.notify(len(pieces))

    def withdraw(self, owner: Owner) -> list[Piece]:
        """Take an owner's pieces back that have not begun. When it returns, no piece of it is being copied."""
        with self._changed:
            taken = [entry[2] for entry in self._queue if entry[2].owner is owner]
            if taken:
                self._queue = [entry for entry in self._queue if entry[2].owner is not owner]
                heapq.heapify(self._queue)
            self._changed.wait_for(lambda: not any(piece.owner is owner for piece in self._running))
            return taken

    def close(self) -> None:
        """End the threads; pieces that are still queued are nobody's."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                piece = heapq.heappop(self._queue)[2]
                self._running.add(piece)
            whole = False
            try:
                if piece.owner.may_copy(piece):
                    for target, source, nbytes in zip(piece.targets, piece.sources, piece.nbytes, strict=True):
                        ctypes.memmove(target, source, nbytes)
                    whole = True
            except Exception:
                logger.exception("shm: a piece failed unexpectedly")
            finally:
                with self._changed:
                    self._running.discard(piece)
                    self._changed.notify_all()
            try:
                piece.owner.copied(piece, whole)
            except Exception:
                logger.exception("shm: the end of a piece failed unexpectedly")
