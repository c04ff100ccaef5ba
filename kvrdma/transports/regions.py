"""Registered memory and its exports, for transports that check a peer's requests themselves."""

from __future__ import annotations

import hmac
import itertools
import secrets
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import RegionError
from kvrdma.layout import Int64s
from kvrdma.memory import Memory
from kvrdma.transports.base import MemoryRegion, RemoteRegion, Rights

_TOKEN = struct.Struct("<I16s")
TOKEN_NBYTES: Final = _TOKEN.size


class RangeStatus(IntEnum):
    """What became of one range of a request, as it crosses the wire."""

    OK = 0
    BAD_KEY = 1
    BAD_BOUNDS = 2
    NO_RIGHT = 3
    CANCELLED = 4


_EXPLAINED: Final = {
    RangeStatus.BAD_KEY: "the remote key is wrong or was revoked",
    RangeStatus.BAD_BOUNDS: "the range lies outside the peer's region",
    RangeStatus.NO_RIGHT: "the remote key does not grant this operation",
    RangeStatus.CANCELLED: "cancelled",
}


def explain(status: int) -> str:
    """Say a status in words."""
    try:
        return _EXPLAINED[RangeStatus(status)]
    except (ValueError, KeyError):
        return f"the peer reports status {status}"


@dataclass(frozen=True, slots=True)
class Export:
    """What one key stands for."""

    number: int
    region: MemoryRegion
    rights: Rights
    key: bytes = field(repr=False)


class RegionTable:
    """The regions and exports of one transport. Thread-safe. `on_revoked` is told the number of a key that ended."""

    def __init__(self, scheme: str, *, on_revoked: Callable[[int], None] | None = None) -> None:
        self._scheme = scheme
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._regions: dict[int, MemoryRegion] = {}
        self._exports: dict[int, Export] = {}
        self._on_revoked = on_revoked

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable."""
        with self._guard:
            region = MemoryRegion(memory, next(self._numbers))
            self._regions[region.handle] = region
        return region

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and its exports."""
        with self._guard:
            self._regions.pop(region.handle, None)
            numbers = [number for number, export in self._exports.items() if export.region is region]
        for number in numbers:
            self._forget(number)

    def check(self, regions: Sequence[MemoryRegion]) -> None:
        """Raise `RegionError` where one of them is not registered here."""
        for region in regions:
            if self._regions.get(region.handle) is not region:
                raise RegionError(f"{self._scheme}: region {region.handle} is not registered with this transport")

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region."""
        self.check([region])
        key = secrets.token_bytes(16)
        with self._guard:
            number = next(self._numbers)
            self._exports[number] = Export(number, region, rights, key)
        return RemoteRegion(self._scheme, region.nbytes, _TOKEN.pack(number, key))

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        export = self.find(remote.token)
        if export is not None:
            self._forget(export.number)

    def find(self, token: bytes) -> Export | None:
        """What a peer's key stands for; None where it is not one of ours, or was revoked."""
        if len(token) != TOKEN_NBYTES:
            return None
        number, key = _TOKEN.unpack(token)
        export = self._exports.get(number)
        return export if export is not None and hmac.compare_digest(export.key, key) else None

    def _forget(self, number: int) -> None:
        with self._guard:
            gone = self._exports.pop(number, None)
        if gone is not None and self._on_revoked is not None:
            self._on_revoked(number)

    def resolve(
        self, tokens: Sequence[bytes], rows: Int64s, offsets: Int64s, nbytes: Int64s, need: Rights
    ) -> tuple[NDArray[np.uint8], Int64s, list[Memory]]:
        """Check a peer's ranges.

        Gives a `RangeStatus` a range (uint8[n]), the address of each that is allowed (int64[n], else 0),
        and what keeps that memory alive.
        """
        # One more row than tokens: the one of ranges that name no token.
        n_tokens = len(tokens)
        base = np.zeros(n_tokens + 1, dtype=np.int64)
        size = np.zeros(n_tokens + 1, dtype=np.int64)
        state = np.full(n_tokens + 1, RangeStatus.BAD_KEY, dtype=np.uint8)
        memories = []
        for i, token in enumerate(tokens):
            export = self.find(token)
            if export is None:
                continue
            memory = export.region.memory
            base[i], size[i] = memory.address, memory.nbytes
            state[i] = RangeStatus.OK if need in export.rights else RangeStatus.NO_RIGHT
            memories.append(memory)
        status, addresses = check_ranges(base, size, state, rows, offsets, nbytes)
        return status, addresses, memories


def check_remote(scheme: str, remote: Sequence[RemoteRegion]) -> None:
    """Raise `RegionError` where a remote region is not one of a scheme."""
    for region in remote:
        if region.scheme != scheme or len(region.token) != TOKEN_NBYTES:
            raise RegionError(f"{scheme}: a remote region of scheme {region.scheme!r} cannot be used here")


def check_ranges(
    base: Int64s, size: Int64s, state: NDArray[np.uint8], rows: Int64s, offsets: Int64s, nbytes: Int64s
) -> tuple[NDArray[np.uint8], Int64s]:
    """Check ranges against regions given as columns, and find their addresses.

    `base`, `size` and `state` (a `RangeStatus`) have a row a region and one more for ranges that name none.
    Gives a status a range, and the address of each that is OK, else 0.
    """
    n_regions = len(base) - 1
    named = np.minimum(rows.view(np.uint64), n_regions).view(np.int64)  # as unsigned, negative ones are large
    status, limit = state[named], size[named]
    outside = (offsets < 0) | (nbytes < 1) | (nbytes > limit) | (offsets > limit - nbytes)
    if outside.any():
        status[outside & (status == RangeStatus.OK)] = RangeStatus.BAD_BOUNDS
    addresses = base[named] + offsets
    if status.any():
        addresses[status != RangeStatus.OK] = 0
    return status, addresses
