"""What of L1 goes to L2, and when: the offload policy is asked, puts begin, and what was missed is counted. Pure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from kvrdma.cache.slots import Slot, SlotTable
from kvrdma.metrics import Metrics
from kvrdma.policies import Event, OffloadPolicy

logger = logging.getLogger(__name__)

MAX_AHEAD: Final = 1024  # blocks: how many victims one sweep may look at, so that it fits into a scheduler's step


class Offloads:
    """Asks the offload policy at each event. Nothing goes out twice, and nobody waits for what does.

    Blocks are offered as `Event.EVICTING` ahead of need: once fewer than half of `n_ahead` slots are free or
    would be given by blocks that were offered, the next `n_ahead` victims are. They stay READY, held while
    their put is under way. What must go before that is over (L2 is slow, or away) goes without, and
    is counted as `offload_dropped_blocks`.
    """

    def __init__(
        self,
        table: SlotTable,
        policy: OffloadPolicy,
        metrics: Metrics,
        *,
        n_ahead: int,
        put: Callable[[list[Slot]], None],
    ) -> None:
        self.policy = policy
        self._table = table
        self._metrics = metrics
        self._n_ahead = max(1, min(n_ahead, MAX_AHEAD))
        self._put = put
        self._offered_until = 0  # evictions, of all since the start, that the last sweep provides for
        self._swept_at = (0, 0)  # what had come and gone by the last sweep
        self._n_going = 0  # victims whose puts are under way

    def offer(self, slots: Sequence[Slot], event: Event) -> None:
        """Put what the policy picks of READY slots that L2 has not."""
        todo = self._select(slots, event)
        if todo:
            self._metrics.add(f"offload_{event.value}_blocks", len(todo))
            for slot in todo:
                slot.offloaded = True
            self._put(todo)

    def ended(self, slot: Slot, *, stored: bool) -> None:
        """A put is terminal."""
        slot.offloaded = stored
        if slot.going:
            slot.going = False
            self._n_going -= 1
            self._offered_until -= not stored

    def lost(self, slots: Sequence[Slot]) -> None:
        """These are evicted now, with no time left for a put: count those that should have had one."""
        self._metrics.add("offload_dropped_blocks", len(self._select(slots, Event.EVICTING)))

    def look_ahead(self) -> None:
        """Offer the next victims, where there are too few slots to be had without losing anything."""
        table = self._table
        if (table.n_inserted, table.n_evicted) == self._swept_at:
            return  # or puts that fail would be tried again and again
        ready_for = table.n_free + self._offered_until - table.n_evicted
        if ready_for >= (self._n_ahead + 1) // 2:
            return
        self._swept_at = (table.n_inserted, table.n_evicted)
        n = min(self._n_ahead, table.n_available - table.n_free)
        self._offered_until = table.n_evicted + n
        room = max(0, self._n_ahead - self._n_going)
        dirty = [slot for slot in table.next_victims(n) if not slot.offloaded][:room]
        self.offer(dirty, Event.EVICTING)
        for slot in dirty:
            if slot.offloaded:
                slot.going = True
                self._n_going += 1

    def _select(self, slots: Sequence[Slot], event: Event) -> list[Slot]:
        """What the policy picks; one that raises picks nothing, and what it makes up is not there."""
        slots = [slot for slot in slots if not slot.offloaded]
        if not slots:
            return []
        try:
            chosen = set(self.policy.select([slot.key for slot in slots], event))
        except Exception:
            self._metrics.add("offload_policy_errors")
            logger.exception("kvrdma: the offload policy %s raised", type(self.policy).__name__)
            return []
        return [slot for slot in slots if slot.key in chosen]
