"""A posted batch on its way: the requests that it needs, and which of its ranges they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvrdma.errors import KVRDMAError, RegionError
from kvrdma.layout import Bitmap, Int64s
from kvrdma.transports.base import Opcode, Rights, Transfer, TransferBatch
from kvrdma.transports.loop import Timer
from kvrdma.transports.regions import RangeStatus, check_ranges, explain
from kvrdma.transports.verbs.binding import Wr
from kvrdma.transports.verbs.exchange import Grant
from kvrdma.transports.verbs.rail import Rail

MAX_PIECE_NBYTES: Final = 4 << 20
_NEED: Final = {Opcode.READ: Rights.READ, Opcode.WRITE: Rights.WRITE}
_WR: Final = {Opcode.READ: Wr.READ, Opcode.WRITE: Wr.WRITE}


@dataclass(slots=True, eq=False)
class Operation:
    """Columns of requests, with the row of the range that each belongs to; `next` is the first that is not posted."""

    batch: TransferBatch
    transfer: Transfer
    ok: Bitmap
    priority: int
    number: int
    timers: tuple[Timer, ...] = ()
    error: KVRDMAError | None = None
    cancelled: bool = False
    missing: set[bytes] = field(default_factory=set)
    grants: dict[bytes, Grant] = field(default_factory=dict)
    opcode: Wr = Wr.READ
    rows: Int64s = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    addresses: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    lkeys: list[int] = field(default_factory=list)
    remote_addresses: list[int] = field(default_factory=list)
    rkeys: list[int] = field(default_factory=list)
    next: int = 0
    total: int = 0
    in_flight: int = 0

    def __lt__(self, other: Operation) -> bool:
        return (self.priority, self.number) < (other.priority, other.number)

    @property
    def finished(self) -> bool:
        """Whether nothing of it is left to post or under way."""
        return self.next == self.total and not self.in_flight

    def prepare(self, rail: Rail, piece_nbytes: int) -> None:
        """Check the ranges against the grants and cut them into requests; those that fail are False from now on."""
        batch = self.batch
        self.opcode = _WR[batch.opcode]
        status, remote_addresses, rkeys = self._resolve(self.grants)
        good = status == RangeStatus.OK
        if not good.all():
            self.refuse(np.flatnonzero(~good), RegionError(f"verbs: {explain(int(status[~good][0]))}"))
        rows = np.flatnonzero(good)
        bases = np.array([region.memory.address for region in batch.local], dtype=np.int64)
        keys = np.array([rail.lkey(region) for region in batch.local], dtype=np.int64)
        local_rows, nbytes = batch.local_rows[rows], batch.nbytes[rows]
        addresses, lkeys = bases[local_rows] + batch.local_offsets[rows], keys[local_rows]
        remote_addresses, rkeys = remote_addresses[rows], rkeys[rows]
        limit = min(piece_nbytes, MAX_PIECE_NBYTES)
        if nbytes.size and int(nbytes.max()) > limit:
            parts = -(-nbytes // limit)
            of = np.repeat(np.arange(len(rows)), parts)
            shift = (np.arange(len(of)) - np.repeat(np.cumsum(parts) - parts, parts)) * limit
            nbytes = np.minimum(limit, nbytes[of] - shift)
            rows, lkeys, rkeys = rows[of], lkeys[of], rkeys[of]
            addresses, remote_addresses = addresses[of] + shift, remote_addresses[of] + shift
        self.rows = rows
        self.addresses, self.nbytes, self.lkeys = addresses.tolist(), nbytes.tolist(), lkeys.tolist()
        self.remote_addresses, self.rkeys = remote_addresses.tolist(), rkeys.tolist()
        self.total = len(rows)

    def _resolve(self, grants: Mapping[bytes, Grant]) -> tuple[np.ndarray, Int64s, Int64s]:
        batch, need = self.batch, _NEED[self.batch.opcode]
        n = len(batch.remote)
        base, size, rkeys = (np.zeros(n + 1, dtype=np.int64) for _ in range(3))
        state = np.full(n + 1, RangeStatus.BAD_KEY, dtype=np.uint8)
        for row, remote in enumerate(batch.remote):
            grant = grants[remote.token]
            base[row], size[row], rkeys[row] = grant.address, grant.nbytes, grant.rkey
            state[row] = grant.status
            if grant.status is RangeStatus.OK and need not in grant.rights:
                state[row] = RangeStatus.NO_RIGHT
        status, addresses = check_ranges(base, size, state, batch.remote_rows, batch.remote_offsets, batch.nbytes)
        return status, addresses, rkeys[batch.remote_rows]

    def refuse(self, rows: Int64s, error: KVRDMAError) -> None:
        """Mark ranges as failed; the first error stays."""
        self.ok[rows] = False
        self.error = self.error or error

    def drop_rest(self, error: KVRDMAError) -> None:
        """Give up what is not posted yet."""
        if self.missing:
            self.ok[:] = False
            self.missing.clear()
        elif self.next < self.total:
            self.ok[self.rows[self.next :]] = False
        self.next = self.total = min(self.next, self.total)
        self.error = self.error or error

    def fail_posted(self, first: int, last: int, error: KVRDMAError) -> None:
        """Requests [first, last) of those posted did not end well."""
        self.in_flight -= last - first
        self.refuse(self.rows[first:last], error)
