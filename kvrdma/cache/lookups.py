"""Lookup and fetch before promise, step by step, and the account of every block that was looked up. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvrdma.cache.jobs import Probe, ProbeAnswer
from kvrdma.cache.requests import Answer, Offer, Phase, Request
from kvrdma.cache.slots import Slot, SlotState, SlotTable
from kvrdma.keys import pack_keys
from kvrdma.metrics import Metrics, Reason


class Gate(Protocol):
    """Decides how many blocks are worth fetching rather than computing."""

    def cut(self, *, l1_blocks: int, l2_blocks: int) -> int:
        """Of a run of `l2_blocks` behind `l1_blocks` that L1 has: how many to fetch."""


class OpenGate:
    """Fetches everything: the gate that is off."""

    def cut(self, *, l1_blocks: int, l2_blocks: int) -> int:
        """All of them."""
        return l2_blocks


class Lookups:
    """The requests that ask, from their first question to the end of what they were offered.

    `fetch` has slots filled from L2; `probe_timeout_s` of None means that there is no L2 to ask.
    """

    def __init__(
        self,
        table: SlotTable,
        gate: Gate,
        metrics: Metrics,
        *,
        fetch: Callable[[list[Slot]], None],
        number: Callable[[], int],
        clock: Callable[[], float],
        probe_timeout_s: float | None,
        waiting_share: float,
    ) -> None:
        self._table = table
        self._gate = gate
        self._metrics = metrics
        self._fetch = fetch
        self._number = number
        self._clock = clock
        self._probe_timeout_s = probe_timeout_s
        self._waiting_share = waiting_share
        self._requests: dict[str, Request] = {}
        self._probing: dict[int, Request] = {}
        self._probes_out: list[Probe] = []
        self.n_waiting_slots = 0  # slots that requests hold and were not allocated yet

    def __len__(self) -> int:
        return len(self._requests)

    def lookup(
        self, request_id: str, keys: Sequence[bytes], first: int, *, ready_only: bool = False, counted: bool = True
    ) -> Offer:
        """How many blocks of `keys[first:]` can be loaded?"""
        request = self._requests.get(request_id)
        if request is None or request.phase is Phase.DONE or request.first != first or len(request.keys) != len(keys):
            refused = request is not None and request.refused
            if request is not None:
                self._end(request)
            request = self._requests[request_id] = Request(
                request_id, list(keys), first, refused=refused, counted=counted
            )
        if request.phase is Phase.NEW:
            self._begin(request, ready_only=ready_only)
        if request.phase is Phase.PROBING and (ready_only or self._clock() >= request.deadline):
            self._probing.pop(request.probe, None)
            self._decide(request, self._ready(request))
        if request.phase is Phase.WAITING and (ready_only or not request.arriving()):
            self._offer(request)
        if request.phase is not Phase.OFFERED:
            return Offer(Answer.PENDING, 0)
        return Offer(Answer.OFFERED, len(request.held))

    def take(self, request_id: str, n_blocks: int) -> tuple[list[Slot], int]:
        """Pass on the references to the first `n_blocks` of what was offered; the rest is let go.

        Gives the slots, and how many of them, the first ones, were in L1 already.
        """
        request = self._requests.get(request_id)
        if request is None or request.phase is not Phase.OFFERED:
            return [], 0
        if not 0 <= n_blocks <= len(request.held):
            raise AssertionError(f"{request_id}: {n_blocks} blocks taken, {len(request.held)} were offered")
        taken = request.held[:n_blocks]
        self._uncount(taken)
        request.held = request.held[n_blocks:]
        self._end(request)
        return taken, min(n_blocks, request.n_from_l1)

    def finished(self, request_id: str) -> None:
        """The request has ended: what is held for it is let go."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._end(request)

    def refuse(self, request_id: str) -> None:
        """Offer nothing to this request any more."""
        request = self._requests.get(request_id)
        if request is not None:
            request.refused = True
            if request.phase is not Phase.OFFERED:  # what was promised stays so until the engine takes it or not
                self._let_go_held(request)

    def clear(self) -> None:
        """End every request."""
        for request_id in list(self._requests):
            self.finished(request_id)
        self._probes_out.clear()

    def take_probes(self) -> list[Probe]:
        """Questions to L2 since the last call."""
        probes, self._probes_out = self._probes_out, []
        return probes

    def on_probe(self, answer: ProbeAnswer) -> None:
        """L2 has answered; too late, it is ignored."""
        request = self._probing.pop(answer.number, None)
        if request is not None:
            request.answer = answer
            self._decide(request, self._ready(request))

    def on_lost(self, key: bytes, reason: Reason) -> None:
        """A block that was being fetched did not come."""
        for request in self._requests.values():
            waited = request.waits_for.get(key)
            if waited is not None:
                request.failures[waited[0]] = reason

    # -- the steps

    def _begin(self, request: Request, *, ready_only: bool) -> None:
        ready = self._ready(request)
        at = request.first + len(ready)
        if request.refused or at == len(request.keys) or ready_only or self._probe_timeout_s is None:
            self._decide(request, ready)
            return
        request.phase, request.probe, request.probed_from = Phase.PROBING, self._number(), at
        request.deadline = self._clock() + self._probe_timeout_s
        self._probing[request.probe] = request
        self._probes_out.append(Probe(request.probe, pack_keys(request.keys[at:])))

    def _decide(self, request: Request, ready: list[Slot]) -> None:
        """L2 has answered, or is not asked: what is fetched, and what is waited for?"""
        request.phase = Phase.WAITING
        if request.refused:
            return
        self._hold_run(request, ready)
        run = request.n_from_l1 = len(request.held)
        fetch: list[int] = []
        waits: list[tuple[int, Slot]] = []
        end = request.first + run
        for row in range(end, len(request.keys)):
            slot = self._table.get(request.keys[row])
            if slot is None and request.in_l2(row):
                fetch.append(row)
            elif slot is not None and slot.state in {SlotState.READY, SlotState.FETCHING}:
                waits.append((row, slot))
            else:
                break
            end = row + 1
        # What is here or on its way is held before room is made for the rest: else that could evict it.
        self._wait_for(request, waits)
        fetch = self._limit(request, fetch, run)
        if not fetch:
            return
        keys = [request.keys[row] for row in fetch]
        parents = [request.keys[row - 1] if row else None for row in fetch]
        slots = self._table.allocate(keys, SlotState.FETCHING, parents=parents)
        if not slots:
            request.refusals |= dict.fromkeys(fetch, Reason.NO_ROOM)
            return
        self._wait_for(request, zip(fetch, slots, strict=True))
        self._fetch(slots)

    def _limit(self, request: Request, fetch: list[int], run: int) -> list[int]:
        """What the gate finds worth it, what waiting requests may hold, and what there is room for."""
        if not fetch:
            return fetch
        wanted = self._gate.cut(l1_blocks=run, l2_blocks=len(fetch))
        request.refusals |= dict.fromkeys(fetch[wanted:], Reason.GATE)
        fetch = fetch[:wanted]
        limit = int(self._waiting_share * self._table.n_slots)
        room = max(0, min(limit - self.n_waiting_slots, self._table.n_available))
        request.refusals |= dict.fromkeys(fetch[room:], Reason.NO_ROOM)
        return fetch[:room]

    def _offer(self, request: Request) -> None:
        self._hold_run(request, self._ready(request))
        first_missing = request.first + len(request.held)
        request.reasons = [self._explain(request, row) for row in range(first_missing, len(request.keys))]
        self._stop_waiting(request)
        request.phase = Phase.OFFERED

    def _ready(self, request: Request) -> list[Slot]:
        """What is READY behind what is held already, and may be offered."""
        if request.refused:
            return []
        return self._table.leading_ready(request.keys[request.first + len(request.held) :])

    def _hold_run(self, request: Request, ready: list[Slot]) -> None:
        self._hold(ready)
        request.held += ready

    def _wait_for(self, request: Request, waits: Sequence[tuple[int, Slot]] | zip[tuple[int, Slot]]) -> None:
        for row, slot in waits:
            self._hold([slot])
            request.waits_for[slot.key] = (row, slot)

    def _stop_waiting(self, request: Request) -> None:
        slots = [slot for _, slot in request.waits_for.values()]
        request.waits_for = {}
        self._uncount(slots)
        self._table.unref(slots)

    def _let_go_held(self, request: Request) -> None:
        slots, request.held = request.held, []
        self._uncount(slots)
        self._table.unref(slots)

    def _hold(self, slots: Sequence[Slot]) -> None:
        """Reference slots for a waiting request. Those of many requests with one prefix hold no more slots."""
        self._table.ref(slots)
        for slot in slots:
            slot.waiters += 1
            self.n_waiting_slots += slot.waiters == 1

    def _uncount(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            slot.waiters -= 1
            self.n_waiting_slots -= slot.waiters == 0

    # -- the account

    def _explain(self, request: Request, row: int) -> Reason:
        """Why a block is not offered. The order matters: the first that holds is the reason."""
        key = request.keys[row]
        slot = self._table.get(key)
        answer = request.answer
        if request.refused:
            return Reason.LOAD_FAILED
        if slot is not None:
            return Reason.BEHIND_HOLE if slot.state is SlotState.READY else Reason.NOT_YET
        if row in request.failures:
            return request.failures[row]
        if row in request.refusals:
            return request.refusals[row]
        if request.in_l2(row):
            return Reason.BEHIND_HOLE
        if request.probe and answer is None:
            return Reason.NOT_YET
        if answer is not None and answer.down:
            return Reason.TIER_DOWN
        if self._table.was_evicted(key):
            return Reason.EVICTED
        if answer is not None and answer.differs:
            return Reason.OTHER_KEYSPACE
        return Reason.NOT_THERE

    def _end(self, request: Request) -> None:
        """Let go of what is held, and close the account: every looked-up block is served or has one reason."""
        if request.phase is Phase.DONE:
            return
        self._probing.pop(request.probe, None)
        unused = len(request.held)
        if request.phase is not Phase.OFFERED:
            unused += len(self._ready(request))
            rows = range(request.first + unused, len(request.keys))
            request.reasons = [self._explain(request, row) for row in rows]
        if request.counted:
            self._metrics.add("lookups")
            self._metrics.add("looked_up_blocks", request.n_wanted)
            self._metrics.miss(Reason.UNUSED, unused)
            for reason in request.reasons:
                self._metrics.miss(reason)
        self._let_go_held(request)
        self._stop_waiting(request)
        request.phase = Phase.DONE
