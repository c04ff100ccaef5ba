"""One end of several rails: where each range of a batch goes, and where again when its rail fails."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Protocol

import numpy as np

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.layout import Bitmap, Int64s
from kvrdma.memory import Lease
from kvrdma.transports.base import (
    Endpoint,
    MemoryRegion,
    Priority,
    RemoteRegion,
    Transfer,
    TransferBatch,
    call_guarded,
    check_open,
)
from kvrdma.transports.endpoints import EndpointBase, wait_for
from kvrdma.transports.loop import IoLoop
from kvrdma.transports.rails.shares import Meter, split
from kvrdma.transports.rails.wire import decode_token

logger = logging.getLogger(__name__)

MAX_TRIES: Final = 8  # of one range; each but the first follows the end of a rail


class Owner(Protocol):
    """The transport, as an endpoint sees it."""

    tiers: Sequence[Sequence[str]]
    clock: IoLoop

    def check(self, regions: Sequence[MemoryRegion]) -> None:
        """Raise `RegionError` where one of them is not registered."""

    def inner(self, region: MemoryRegion) -> dict[str, MemoryRegion]:
        """A region as each rail knows it that can use it."""

    def remote(self, name: str, nbytes: int, token: bytes) -> RemoteRegion:
        """A peer's region as a rail takes it."""


class Keeper(Protocol):
    """Who sees to it that an endpoint has rails."""

    def lost(self, name: str) -> None:
        """A rail has ended. On any thread, with no lock held."""

    def wanted(self, names: set[str]) -> None:
        """Ranges wait for one of these rails, none of which lives. On any thread, with no lock held."""


@dataclass(slots=True, eq=False)
class Rail:
    """One transport's connection, and what it carries."""

    name: str
    endpoint: Endpoint
    meter: Meter = field(default_factory=Meter)


@dataclass(slots=True, eq=False)
class _Operation:
    batch: TransferBatch
    transfer: Transfer
    priority: Priority
    deadline: float | None
    keys: list[dict[str, bytes]]  # of each remote region, by rail
    ok: Bitmap
    tries: Int64s
    left: int  # ranges that are not decided
    posted: set[Transfer] = field(default_factory=set)
    cancelled: bool = False
    error: KVRDMAError | None = None
    finisher: int = 0  # the thread that makes it terminal


@dataclass(frozen=True, slots=True, eq=False)
class _Parked:
    """Ranges that wait for one of some rails."""

    operation: _Operation
    rows: Int64s
    wanted: frozenset[str]
    number: int


class RailsEndpoint(EndpointBase):
    """Stripes what is posted here over the living rails of the best tier."""

    scheme: ClassVar[str] = "rails"

    def __init__(self, owner: Owner, *, peer: str, ticket: bytes) -> None:
        super().__init__(peer=peer, ticket=ticket)
        self._owner = owner
        self._rails: dict[str, Rail] = {}
        self._meters: dict[str, Meter] = {}  # also of rails that may come back
        self._operations: dict[_Operation, None] = {}
        self._parked: list[_Parked] = []
        self._n_parked = 0  # so far
        self._keeper: Keeper | None = None
        self.resent_ranges = 0

    def keep(self, keeper: Keeper) -> None:
        """Name who sees to it that there are rails; once, before the first."""
        self._keeper = keeper

    # -- the interface

    @property
    def living(self) -> tuple[str, ...]:
        """The rails that live, best first."""
        with self._guard:
            return tuple(name for tier in self._owner.tiers for name in tier if name in self._rails)

    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        """Queue a batch; returns at once. One that no rail serves in time ends without an end of the endpoint."""
        check_open(self._closed, str(self))
        self._owner.check(batch.local)
        if any(remote.scheme != self.scheme for remote in batch.remote):
            raise RegionError("rails: a remote region of another scheme cannot be used here")
        keys: list[dict[str, bytes]] = []
        error: KVRDMAError | None = None
        for remote in batch.remote:
            try:
                keys.append(decode_token(remote.token))
            except RegionError as wrong:
                keys.append({})
                error = wrong
        n = len(batch)
        transfer = Transfer(n, hold=hold)
        deadline = None if timeout is None else time.monotonic() + timeout
        ok = np.zeros(n, dtype=np.bool_)
        operation = _Operation(
            batch, transfer, priority, deadline, keys, ok, np.zeros(n, dtype=np.int64), n, error=error
        )
        transfer._on_cancel = lambda: self.cancel(operation, ClosedError("rails: cancelled"))
        try:
            with self._guard:
                check_open(self._closed, str(self))
                self._operations[operation] = None
        except ClosedError as closed:
            transfer.finish(ok, closed)
            raise
        if n:
            self._send(operation, np.arange(n))
        else:
            self._finish(operation)
        return transfer

    def close(self, *, timeout: float = 5.0) -> None:
        """Let posted transfers end, then close."""
        deadline = time.monotonic() + timeout
        with self._guard:
            rails = list(self._rails.values())
            pending = [operation.transfer for operation in self._operations]
        if not self._closed:
            wait_for(pending, deadline)
            with self._guard:
                self._closed = True  # so that no rail is brought back
            for rail in rails:
                rail.endpoint.close(timeout=max(0.0, deadline - time.monotonic()))
        self.end(ClosedError(f"{self}: closed"))

    def abort(self) -> None:
        """End at once."""
        self.end(ClosedError(f"{self}: aborted"))

    # -- rails come and go

    def add(self, name: str, endpoint: Endpoint) -> None:
        """Use a rail. One of the same name is ended first: its peer has given it up."""
        with self._guard:
            old = self._rails.get(name)
            closed = self._closed
        if closed:
            endpoint.abort()
            return
        if old is not None:
            old.endpoint.abort()
        rail = Rail(name, endpoint, self._meters.setdefault(name, Meter()))
        with self._guard:
            self._rails[name] = rail
        endpoint.add_close_callback(lambda: self._lose(rail))
        if self._closed:  # meanwhile
            endpoint.abort()
        self.resume()

    def waiting(self) -> tuple[int, set[str]]:
        """The number of what was parked last, and the rails that what is parked waits for."""
        with self._guard:
            return self._n_parked, {name for parked in self._parked for name in parked.wanted}

    def resume(self, refusal: KVRDMAError | None = None, *, until: int = 0) -> None:
        """Send again what waits for a rail. What was parked up to number `until` and still finds none has failed."""
        with self._guard:
            waiting, self._parked = self._parked, []
        for parked in waiting:
            self._send(parked.operation, parked.rows, refusal if parked.number <= until else None)

    def reach(self, remote: RemoteRegion) -> None:
        """See to it that the peer has a rail for an export of ours. Returns at once; only for who connected."""
        tokens = decode_token(remote.token)
        if self._keeper is not None and not tokens.keys() & set(self.living):
            self._keeper.wanted(set(tokens))

    def _lose(self, rail: Rail) -> None:
        with self._guard:
            if self._rails.get(rail.name) is not rail:
                return
            del self._rails[rail.name]
            closed, left = self._closed, list(self._rails)
        if not closed:
            logger.warning("rails endpoint to %s: lost %s; left: %s", self._peer, rail.name, ", ".join(left) or "none")
            if self._keeper is not None:
                self._keeper.lost(rail.name)

    # -- a batch's way

    def _send(self, operation: _Operation, rows: Int64s, refusal: KVRDMAError | None = None) -> None:
        """Post ranges on the rails that are best for them; again, where one of those is no more by then."""
        while len(rows):
            with self._guard:
                stop = self._stopped(operation)
                runs, unserved, wanted = ([], rows, set[str]()) if stop else self._assign(operation, rows)
                parks = bool(wanted) and refusal is None
                if parks:
                    self._n_parked += 1
                    self._parked.append(_Parked(operation, unserved, frozenset(wanted), self._n_parked))
            if parks:
                self._wait(operation, wanted)
            elif len(unserved):
                useless = RegionError("rails: no rail can use this memory or this key")
                self._decide(operation, unserved, stop or (refusal if wanted else useless))
            again = [run for rail, run in runs if not self._post(operation, rail, run)]
            rows = np.concatenate(again) if again else rows[:0]

    def _wait(self, operation: _Operation, wanted: set[str]) -> None:
        """Ranges of an operation are parked: ask for a rail, and wait for it no longer than for the operation."""
        deadline = operation.deadline
        if deadline is not None:
            with contextlib.suppress(ClosedError):
                self._owner.clock.call_soon(lambda: self._expire_at(deadline))
        if self._keeper is not None:
            self._keeper.wanted(wanted)
        if self._closed:  # meanwhile, by somebody who has not seen what was parked just now
            self._fail_parked(self._error)

    def _stopped(self, operation: _Operation) -> KVRDMAError | None:
        """Why nothing more of an operation is to be sent, or None."""
        if self._closed:
            return self._error
        if operation.cancelled:
            return operation.error or ClosedError("rails: cancelled")
        if operation.deadline is not None and time.monotonic() >= operation.deadline:
            return DeadlineError(f"rails: {self._peer} did not serve a batch in time")
        return None

    def _assign(self, operation: _Operation, rows: Int64s) -> tuple[list[tuple[Rail, Int64s]], Int64s, set[str]]:
        """Runs of ranges by rail, those that no living rail can take, and the rails that could."""
        batch = operation.batch
        inner = [self._owner.inner(region) for region in batch.local]
        runs: list[tuple[Rail, Int64s]] = []
        wanted: set[str] = set()

        def fits(name: str) -> Bitmap:
            here = np.array([name in regions for regions in inner], dtype=np.bool_)
            there = np.array([name in keys for keys in operation.keys], dtype=np.bool_)
            both: Bitmap = here[batch.local_rows[rows]] & there[batch.remote_rows[rows]]
            return both

        for tier in self._owner.tiers:
            if not len(rows):
                break
            # Rails of a tier are alike: ranges that not all of them can take go where all of theirs fit.
            able = {name: fits(name) for name in tier}
            living = [name for name in tier if name in self._rails and able[name].any()]
            if not living:
                wanted.update(name for name in tier if able[name].any())
                continue
            common = np.logical_and.reduce([able[name] for name in living])
            taken = common if common.any() else able[living[0]]
            names = living if common.any() else living[:1]
            rails = [self._rails[name] for name in names]
            chosen = rows[taken]
            cuts = split(batch.nbytes[chosen], [rail.meter for rail in rails])
            runs += [(rail, chosen[cut]) for rail, cut in zip(rails, cuts, strict=True) if len(chosen[cut])]
            rows = rows[~taken]
        return runs, rows, wanted if len(rows) else set()

    def _post(self, operation: _Operation, rail: Rail, rows: Int64s) -> bool:
        """Post a run on a rail; False where that rail has ended and the run is to go elsewhere."""
        batch = operation.batch
        local, local_rows = np.unique(batch.local_rows[rows], return_inverse=True)
        remote, remote_rows = np.unique(batch.remote_rows[rows], return_inverse=True)
        part = replace(
            batch,
            local=[self._owner.inner(batch.local[row])[rail.name] for row in local],
            remote=[
                self._owner.remote(rail.name, batch.remote[row].nbytes, operation.keys[row][rail.name])
                for row in remote
            ],
            local_rows=local_rows.astype(np.int64),
            local_offsets=batch.local_offsets[rows],
            remote_rows=remote_rows.astype(np.int64),
            remote_offsets=batch.remote_offsets[rows],
            nbytes=batch.nbytes[rows],
        )
        left = None if operation.deadline is None else max(0.001, operation.deadline - time.monotonic())
        nbytes = int(part.nbytes.sum())
        with self._guard:
            begun = rail.meter.begin(nbytes)
        try:
            posted = rail.endpoint.post(part, priority=operation.priority, timeout=left)
        except KVRDMAError as error:
            with self._guard:
                rail.meter.end(nbytes, begun, whole=False)
                operation.tries[rows] += 1
                over = bool((operation.tries[rows] >= MAX_TRIES).any())
            if rail.endpoint.closed() and not over:
                self._lose(rail)
                return False
            self._decide(operation, rows, error)
            return True
        with self._guard:
            operation.posted.add(posted)
            cancelled = operation.cancelled
        posted.add_done_callback(lambda done: self._on_done(operation, rail, rows, nbytes, begun, done))
        if cancelled:
            posted.cancel()
        return True

    def _on_done(
        self, operation: _Operation, rail: Rail, rows: Int64s, nbytes: int, begun: float, done: Transfer
    ) -> None:
        """A run is terminal: what of it arrived counts, and what its rail's end has cost is sent again."""
        failed = not done.ok.all() and isinstance(done.error, TransportError | ClosedError | DeadlineError)
        if failed and not rail.endpoint.closed() and isinstance(done.error, TransportError):
            rail.endpoint.abort()  # what a rail says of itself
        missing = rows[~done.ok]
        with self._guard:
            rail.meter.end(nbytes, begun, whole=bool(done.ok.all()))
            operation.posted.discard(done)
            operation.ok[rows[done.ok]] = True
            operation.tries[missing] += 1
            again = (
                failed
                and rail.endpoint.closed()
                and not self._stopped(operation)
                and not (operation.tries[missing] >= MAX_TRIES).any()
            )
            if again:
                self.resent_ranges += len(missing)
        self._decide(operation, rows[done.ok], None)
        if again:
            self._lose(rail)
            self._send(operation, missing)
        else:
            self._decide(operation, missing, done.error)

    def _decide(self, operation: _Operation, rows: Int64s, error: KVRDMAError | None) -> None:
        """Ranges are through, or given up."""
        with self._guard:
            operation.left -= len(rows)
            if len(rows):
                operation.error = operation.error or error
            last = operation.left == 0
        if last:
            self._finish(operation)

    def cancel(self, operation: _Operation, error: KVRDMAError) -> None:
        """Send no more of it, and ask the rails to end what they have of it."""
        with self._guard:
            if operation.cancelled or operation.finisher:
                return
            operation.cancelled = True
            operation.error = operation.error or error
            posted = list(operation.posted)
            waiting = [parked.rows for parked in self._parked if parked.operation is operation]
            self._parked = [parked for parked in self._parked if parked.operation is not operation]
        for transfer in posted:
            transfer.cancel()
        for rows in waiting:
            self._decide(operation, rows, error)

    def _expire_at(self, deadline: float) -> None:
        self._owner.clock.call_at(deadline, self._expire)

    def _expire(self) -> None:
        """Give up what has waited for a rail until its deadline."""
        now = time.monotonic()
        with self._guard:
            late = [parked for parked in self._parked if (parked.operation.deadline or now + 1) <= now]
            self._parked = [parked for parked in self._parked if parked not in late]
        for parked in late:
            self._decide(parked.operation, parked.rows, DeadlineError(f"rails: no rail to {self._peer} came in time"))

    def _finish(self, operation: _Operation) -> None:
        with self._guard:
            if operation.finisher:
                return
            operation.finisher = threading.get_ident()
        try:
            operation.transfer.finish(operation.ok, operation.error)
        finally:
            with self._guard:
                self._operations.pop(operation, None)

    def end(self, error: KVRDMAError) -> None:
        """Abort every rail, and make every transfer terminal. Idempotent."""
        _, callbacks = self._mark_closed(error)
        with self._guard:
            rails = list(self._rails.values())
        for rail in rails:
            rail.endpoint.abort()
        self._fail_parked(self._error)
        with self._guard:
            ending = [operation for operation in self._operations if operation.finisher != threading.get_ident()]
        for operation in ending:
            operation.transfer.result()  # another thread is just about to finish it
        for callback in callbacks:
            call_guarded(callback)

    def _fail_parked(self, error: KVRDMAError) -> None:
        with self._guard:
            waiting, self._parked = self._parked, []
        for parked in waiting:
            self._decide(parked.operation, parked.rows, error)
