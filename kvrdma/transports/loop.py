"""One I/O thread: epoll over sockets, calls from other threads, and timers."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from kvrdma.errors import ClosedError

logger = logging.getLogger(__name__)

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
_BROKEN: Final = select.EPOLLHUP | select.EPOLLERR
_FEW_TIMERS: Final = 64  # so few are not worth a sweep


class Timer:
    """A call in the future that can be taken back."""

    __slots__ = ("_on_cancel", "call")

    def __init__(self, call: Callable[[], None], on_cancel: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """Do not call. On the loop's thread only."""
        if self.call is not None:
            self.call = None
            self._on_cancel()


class IoLoop:
    """Runs callbacks on a thread of its own. A callback that raises is logged; the loop goes on."""

    def __init__(self, name: str) -> None:
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, READABLE)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._n_cancelled = 0  # of the timers
        self._order = itertools.count()
        self._poll: Callable[[], bool] | None = None
        self._closing = False
        self._ended = False
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def inside(self) -> bool:
        """Whether the caller is on the loop's thread."""
        return threading.current_thread() is self._thread

    def call_soon(self, call: Callable[[], None]) -> None:
        """Run a call on the loop's thread, in the order of the posts. From any thread.

        Raises:
            ClosedError: the loop has ended, and its descriptors may be somebody else's by now.
        """
        with self._guard:
            if self._ended:
                raise ClosedError(f"{self._thread.name}: ended")
            self._calls.append(call)
            os.eventfd_write(self._wake_fd, 1)

    def run(self, call: Callable[[], None]) -> None:
        """Run a call on the loop's thread and wait for it; at once where the caller is on it or it has ended."""
        if self.inside():
            call()
            return
        done = threading.Event()

        def run() -> None:
            try:
                call()
            finally:
                done.set()

        try:
            self.call_soon(run)
        except ClosedError:
            self._thread.join()  # it may still be at the calls that were posted before its end
            call()
            return
        done.wait()

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        """Run a call at a time of `time.monotonic`. On the loop's thread only."""
        timer = Timer(call, self._note_cancelled)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(events)` when the descriptor is ready. On the loop's thread only."""
        if fd in self._handlers:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def poll_with(self, poll: Callable[[], bool]) -> None:
        """Call `poll` before every wait; while it says True there is more to do, and the loop does not wait."""
        self._poll = poll

    def forget(self, fd: int) -> None:
        """Watch a descriptor no longer; before it is closed."""
        if self._handlers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """End the thread, after the calls posted so far."""

        def stop() -> None:
            self._closing = True

        with contextlib.suppress(ClosedError):
            self.call_soon(stop)
        if not self.inside():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._turn_until_closed()
        finally:
            with self._guard:
                self._ended = True
            while self._calls:  # posted since the last turn; nothing is added any more
                self._guarded(self._calls.popleft())
            self._epoll.close()
            os.close(self._wake_fd)

    def _turn_until_closed(self) -> None:
        while not self._closing:
            wait = -1.0
            if self._timers:
                wait = max(0.0, self._timers[0][0] - time.monotonic())
            if self._poll is not None and self._poll():
                wait = 0.0
            for fd, events in self._epoll.poll(wait):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    continue
                handler = self._handlers.get(fd)
                if handler is not None:
                    self._guarded(partial(handler, events | (READABLE if events & _BROKEN else 0)))
            while self._calls:
                self._guarded(self._calls.popleft())
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                call, timer.call = timer.call, None
                if call is None:
                    self._n_cancelled -= 1
                else:
                    self._guarded(call)

    def _note_cancelled(self) -> None:
        """Keep no more cancelled timers than live ones: their time may be far away."""
        self._n_cancelled += 1
        if self._n_cancelled > max(_FEW_TIMERS, len(self._timers) // 2):
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._n_cancelled = 0

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            logger.exception("%s: a callback failed", self._thread.name)
