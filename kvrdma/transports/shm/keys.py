"""Live keys: a page of words that an owner shares with its peers to be read.

The word of a key is its number while the key lives, and 0 afterwards. Whoever copies by that key looks
before and after: what is reported as arrived was copied while the key was alive.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import CapacityError
from kvrdma.transports.shm.mapping import Mapping, open_to_read

MAX_KEYS: Final = 8192
PAGE_NBYTES: Final = 8 * MAX_KEYS

Words = NDArray[np.int64]


class LiveKeys:
    """The owner's page."""

    def __init__(self) -> None:
        fd = os.memfd_create("kvrdma-keys", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, PAGE_NBYTES)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._words: Words = np.frombuffer(mmap.mmap(fd, PAGE_NBYTES, mmap.MAP_SHARED), dtype=np.int64)
            self.fd = open_to_read(fd)
        finally:
            os.close(fd)
        self._guard = threading.Lock()
        self._free = list(range(MAX_KEYS - 1, -1, -1))
        self._slots: dict[int, int] = {}

    def add(self, number: int) -> None:
        """Have a key live; raises `CapacityError` where too many do."""
        with self._guard:
            if not self._free:
                raise CapacityError(f"shm: {MAX_KEYS} keys are exported already; revoke some")
            slot = self._slots[number] = self._free.pop()
            self._words[slot] = number

    def end(self, number: int) -> None:
        """Have a key live no longer; when this returns no copy by it that is still under way will count."""
        with self._guard:
            slot = self._slots.pop(number, None)
            if slot is not None:
                self._words[slot] = 0
                self._free.append(slot)

    def slot(self, number: int) -> int | None:
        """Which word is a key's; None where it has ended."""
        return self._slots.get(number)

    def close(self) -> None:
        """End every key."""
        with self._guard:
            self._words[:] = 0
            self._slots.clear()
        os.close(self.fd)


class PeerKeys:
    """A peer's page, as it was given to us."""

    def __init__(self, mapping: Mapping) -> None:
        self._words: Words = mapping.array.view(np.int64)

    def alive(self, slots: Words, numbers: Words) -> NDArray[np.bool_]:
        """Which of some keys live now: bool[n]."""
        living: NDArray[np.bool_] = self._words[slots] == numbers
        return living
