"""S3-FIFO: three FIFO queues that keep what is used once from passing through the whole cache.

After "FIFO Queues are All You Need for Cache Eviction" (Yang et al., SOSP 2023), with the one difference that
its authors have made in libCacheSim since: until something is evicted, what does not fit the small queue goes
to the main one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from kvrdma.errors import ConfigError
from kvrdma.policies.base import EvictionPolicy
from kvrdma.settings import option, parse_count, parse_ratio, parse_share

_MAX_USES: Final = 3  # the paper's two bits
_HOT: Final = 4  # added to the uses of a key in the main queue that has been hot


@dataclass(frozen=True, slots=True, kw_only=True)
class S3FifoOptions:
    """What can be set; the defaults are the paper's."""

    small_ratio: float = option(0.1, parse_share, "share of the capacity that the small queue has")
    threshold: int = option(2, parse_count, "uses in the small queue that move a key to the main one, at most 3")
    ghost_ratio: float = option(0.9, parse_ratio, "evicted keys remembered, over the capacity")

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= _MAX_USES:
            raise ConfigError(f"s3fifo: threshold={self.threshold}: must be 1 to {_MAX_USES}")


class S3FifoPolicy(EvictionPolicy):
    """New keys wait in a small queue; those used there move to the main one, the others go and are remembered.

    What comes back while it is remembered (a ghost) goes to the main queue at once, in which a key that was
    used goes round again. Hot: used `threshold` times in the small queue, or once in the main one; cold: at
    the head of its queue, unused.
    """

    name: ClassVar[str] = "s3fifo"
    options_type: ClassVar[type] = S3FifoOptions

    def __init__(self, capacity: int, options: S3FifoOptions | None = None) -> None:
        super().__init__(capacity)
        options = S3FifoOptions() if options is None else options
        self._threshold = options.threshold
        self._small_size = max(1, int(capacity * options.small_ratio))
        self._main_size = capacity - self._small_size
        self._ghost_size = int(capacity * options.ghost_ratio)
        self._small: OrderedDict[bytes, int] = OrderedDict()  # key -> uses
        self._main: OrderedDict[bytes, int] = OrderedDict()  # key -> uses, and _HOT where it has been hot
        self._ghost: OrderedDict[bytes, None] = OrderedDict()
        self._has_evicted = False

    def insert(self, key: bytes, *, parent: bytes | None = None, cost: float = 1.0) -> None:
        """Take in a key: a ghost to the main queue, another to the small one."""
        if key in self._small or key in self._main:
            raise KeyError(f"{key.hex()} is in already")
        ghost = self._ghost
        if key in ghost:
            del ghost[key]
            self._main[key] = 0
        elif self._has_evicted or len(self._small) < self._small_size:
            self._small[key] = 0
        else:
            self._main[key] = 0
        while len(ghost) > self._ghost_size:
            ghost.popitem(last=False)

    def touch(self, key: bytes) -> bool:
        """Count a use, up to three."""
        uses = self._small.get(key)
        if uses is not None:
            if uses == _MAX_USES:
                return False
            self._small[key] = uses = uses + 1
            return uses == self._threshold
        uses = self._main[key]
        if uses >= _HOT:
            if uses < _HOT + _MAX_USES:
                self._main[key] = uses + 1
            return False
        self._main[key] = uses + 1 + _HOT
        return True

    def victims(self, n: int, *, is_pinned: Callable[[bytes], bool]) -> list[bytes]:
        """The n keys that would be reached first, all unpinned, or none."""
        if n < 1:
            return []
        if n == 1 and self._small and len(self._main) <= self._main_size:
            head, uses = next(iter(self._small.items()))
            if uses < self._threshold and not is_pinned(head):
                return [head]
        chosen: list[bytes] = []
        for key in self._reached(is_pinned):
            chosen.append(key)
            if len(chosen) == n:
                return chosen
        return []

    def _reached(self, is_pinned: Callable[[bytes], bool]) -> Iterator[bytes]:
        """Unpinned keys in the order in which evictions would reach them, without moving any.

        Pinned keys keep their places. What would have moved on is in `behind`, with the uses it has left.
        """
        behind: deque[tuple[bytes, int]] = deque()
        n_main = len(self._main)

        def of_small() -> Iterator[bytes]:
            nonlocal n_main
            for key, uses in self._small.items():
                if uses >= self._threshold:
                    behind.append((key, 0))
                    n_main += 1
                elif not is_pinned(key):
                    yield key

        def of_main() -> Iterator[bytes | None]:
            main = iter(self._main.items())
            while True:
                item = next(main, None) or (behind.popleft() if behind else None)
                if item is None:
                    yield None  # until a key of the small queue moves on
                elif item[1] % _HOT:
                    behind.append((item[0], item[1] % _HOT - 1))
                elif not is_pinned(item[0]):
                    yield item[0]

        small, mains = of_small(), of_main()
        while True:
            key = next(mains) if n_main > self._main_size else None
            if key is None:
                key = next(small, None)
                if key is not None:
                    yield key
                    continue
                key = next(mains)
                if key is None:
                    return
            n_main -= 1
            yield key

    def evict(self, key: bytes) -> None:
        """Let a victim go, after what stood before it has moved on. Of the small queue it becomes a ghost."""
        small, main = self._small, self._main
        if key in small:
            if next(iter(small)) != key:
                self._promote(until=key)
            del small[key]
            self._ghost[key] = None
        elif key in main:
            if len(main) <= self._main_size:
                self._promote()
            self._go_round(key)
            del main[key]
        else:
            raise KeyError(f"{key.hex()} is not in")
        self._has_evicted = True

    def _promote(self, until: bytes | None = None) -> None:
        """Move keys that were used from the head of the small queue to the main one; pinned ones stay."""
        passed = []
        for key, uses in self._small.items():
            if key == until:
                break
            if uses >= self._threshold:
                passed.append(key)
            elif until is None:
                break
        for key in passed:
            del self._small[key]
            self._main[key] = _HOT

    def _go_round(self, key: bytes) -> None:
        """Move what stands before a key in the main queue behind it, for one use each, until its turn has come.

        What stands before it unused is pinned, and keeps its place.
        """
        main = self._main
        found = False
        while not found:
            used = []
            for other, uses in main.items():
                if uses % _HOT:
                    used.append(other)
                elif other == key:
                    found = True
                    break
            for other in used:
                main[other] -= 1
                main.move_to_end(other)

    def remove(self, key: bytes) -> None:
        """Forget a key; it becomes no ghost."""
        if self._small.pop(key, None) is None:
            del self._main[key]

    def clear(self) -> None:
        """Forget everything, ghosts too."""
        self._small.clear()
        self._main.clear()
        self._ghost.clear()
        self._has_evicted = False

    def __contains__(self, key: bytes) -> bool:
        return key in self._small or key in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
