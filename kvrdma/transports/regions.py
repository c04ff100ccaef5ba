"""Registered memory and its exports, for transports that check a peer's requests themselves."""

from __future__ import annotations

import hmac
import itertools
import secrets
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
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
class _Export:
    region: MemoryRegion
    rights: Rights
    key: bytes


class RegionTable:
    """The regions and exports of one transport. Thread-safe."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._guard = threading.Lock()
        self._numbers = itertools.count(1)
        self._regions: dict[int, MemoryRegion] = {}
        self._exports: dict[int, _Export] = {}

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
            for number in [n for n, e in self._exports.items() if e.region is region]:
                del self._exports[number]

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
            self._exports[number] = _Export(region, rights, key)
        return RemoteRegion(self._scheme, region.nbytes, _TOKEN.pack(number, key))

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back."""
        if len(remote.token) == TOKEN_NBYTES:
            number, key = _TOKEN.unpack(remote.token)
            export = self._exports.get(number)
            if export is not None and hmac.compare_digest(export.key, key):
                with self._guard:
                    self._exports.pop(number, None)

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
            number, key = _TOKEN.unpack(token)
            export = self._exports.get(number)
            if export is None or not hmac.compare_digest(export.key, key):
                continue
            memory = export.region.memory
            base[i], size[i] = memory.address, memory.nbytes
            state[i] = RangeStatus.OK if need in export.rights else RangeStatus.NO_RIGHT
            memories.append(memory)
        named = np.minimum(rows.view(np.uint64), n_tokens).view(np.int64)  # as unsigned, negative ones are large
        status, limit = state[named], size[named]
        outside = (offsets < 0) | (nbytes < 1) | (nbytes > limit) | (offsets > limit - nbytes)
        if outside.any():
            status[outside & (status == RangeStatus.OK)] = RangeStatus.BAD_BOUNDS
        addresses = base[named] + offsets
        if status.any():
            addresses[status != RangeStatus.OK] = 0
        return status, addresses, memories
