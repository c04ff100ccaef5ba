"""Those who are told what L1 takes in and lets go, and may veto the latter. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from kvrdma.errors import ReentryError
from kvrdma.metrics import Metrics
from kvrdma.policies import CacheListener, Removal

logger = logging.getLogger(__name__)

CALL_LIMIT_S: Final = 0.05  # a listener that takes longer over one key is not asked again


class Listeners:
    """Tells listeners, none of whom can do harm: what raises is counted, who is slow is let go of.

    A listener that raises in `before_evict` has vetoed. One that calls back into the cache gets a
    `ReentryError` there.
    """

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._listeners: list[CacheListener] = []
        self._calling = False

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def add(self, listener: CacheListener) -> None:
        """Tell one more from now on."""
        self._listeners.append(listener)

    def check_not_called_back(self) -> None:
        """Raise `ReentryError` within a listener's callback."""
        if self._calling:
            raise ReentryError("a listener's callback must not call the cache that called it")

    def inserted(self, key: bytes) -> None:
        """A key is READY."""
        for listener in tuple(self._listeners):
            self._call(listener, listener.on_insert, key)

    def hot(self, key: bytes) -> None:
        """A use has just made a key hot."""
        for listener in tuple(self._listeners):
            self._call(listener, listener.on_hot, key)

    def may_evict(self, key: bytes) -> bool:
        """Whether nobody has anything against it; who raises has."""
        return all(self._call(listener, listener.before_evict, key) for listener in tuple(self._listeners))

    def removed(self, key: bytes, cause: Removal) -> None:
        """A key that was READY is not any more."""
        for listener in tuple(self._listeners):
            self._call(listener, listener.on_removed, key, cause)

    def _call(self, listener: CacheListener, method: Callable[..., object], *arguments: object) -> bool:
        """Whether the callback said anything but False, and did not raise."""
        began = self._clock()
        self._calling = True
        try:
            return method(*arguments) is not False
        except Exception:
            self._metrics.add("listener_errors")
            logger.exception("kvrdma: %s raised in a callback", type(listener).__name__)
            return False
        finally:
            self._calling = False
            took = self._clock() - began
            if took > CALL_LIMIT_S and listener in self._listeners:
                self._listeners.remove(listener)
                self._metrics.add("listeners_dropped")
                logger.error(
                    "kvrdma: %s took %.3f s in a callback; it is not called any more", type(listener).__name__, took
                )
