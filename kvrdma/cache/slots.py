"""The index's table of slots: key -> slot, states, references, eviction. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvrdma.memory import SlotAllocator
from kvrdma.metrics import Metrics
from kvrdma.policies import EvictionPolicy


class SlotState(Enum):
    """What a slot is to the index. READY alone is served; ZOMBIE has no key any more, only transfers."""

    FETCHING = "fetching"
    WRITING = "writing"
    READY = "ready"
    ZOMBIE = "zombie"


_ALLOWED: Final = {
    SlotState.FETCHING: {SlotState.READY, SlotState.ZOMBIE},
    SlotState.WRITING: {SlotState.READY, SlotState.ZOMBIE},
    SlotState.READY: {SlotState.ZOMBIE},
    SlotState.ZOMBIE: set[SlotState](),
}


@dataclass(slots=True, eq=False)
class Slot:
    """One block in L1. It is freed when it is a ZOMBIE and nobody holds a reference."""

    number: int
    generation: int
    key: bytes
    state: SlotState
    parent: bytes | None = None
    cost: float = 1.0
    refs: int = 0
    waiters: int = 0  # of the references, those of requests that were not allocated yet
    offloaded: bool = False  # L2 has it, or a put of it is under way


class SlotTable:
    """Who is where. `on_evict` is told of victims before they go, and says which of them must wait.

    A victim that must wait (its offload has just begun) becomes a ZOMBIE with a reference. Of `capacity` slots
    the first `n_slots` can be used; `grow` adds to them.
    """

    def __init__(
        self,
        capacity: int,
        policy: EvictionPolicy,
        metrics: Metrics,
        *,
        on_evict: Callable[[Sequence[Slot]], None],
        remember: int,
        n_slots: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.policy = policy
        self._allocator = SlotAllocator(capacity if n_slots is None else n_slots)
        self._slots: dict[bytes, Slot] = {}
        self._metrics = metrics
        self._on_evict = on_evict
        self._n_pinned = 0  # READY slots with references
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._remember = remember
        self.n_zombies = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def n_slots(self) -> int:
        """Slots that can be used by now."""
        return len(self._allocator)

    def grow(self, n_slots: int) -> None:
        """Have the first `n_slots` be usable, at most `capacity`; never fewer than before."""
        more = min(n_slots, self.capacity) - len(self._allocator)
        if more > 0:
            self._allocator.grow(more)

    @property
    def n_free(self) -> int:
        """Slots that hold nothing."""
        return self._allocator.n_free

    @property
    def n_available(self) -> int:
        """Slots that can be had now: free, or READY and unreferenced."""
        return self._allocator.n_free + len(self.policy) - self._n_pinned

    def get(self, key: bytes) -> Slot | None:
        """The slot of a key, in whatever state."""
        return self._slots.get(key)

    def leading_ready(self, keys: Iterable[bytes]) -> list[Slot]:
        """The READY slots of the leading keys, up to the first key that has none."""
        slots: list[Slot] = []
        get, ready = self._slots.get, SlotState.READY
        for key in keys:
            slot = get(key)
            if slot is None or slot.state is not ready:
                break
            slots.append(slot)
        return slots

    def was_evicted(self, key: bytes) -> bool:
        """Whether L1 had the key and lost it, as far as it remembers."""
        return key in self._evicted

    def allocate(
        self,
        keys: Sequence[bytes],
        state: SlotState,
        *,
        parents: Sequence[bytes | None],
        costs: Sequence[float] | None = None,
    ) -> list[Slot]:
        """Take a slot for each key, with one reference, evicting as needed; an empty list where not all fit."""
        if not self._make_room(len(keys)):
            return []
        slots = []
        numbers = self._allocator.allocate(len(keys))
        for i, (key, number) in enumerate(zip(keys, numbers, strict=True)):
            slot = Slot(number, self._allocator.generation(number), key, state, parents[i])
            slot.cost = 1.0 if costs is None else costs[i]
            slot.refs = 1
            self._slots[key] = slot
            slots.append(slot)
        return slots

    def make_ready(self, slot: Slot) -> None:
        """Its bytes are whole on every rank: it can be served and evicted from now on."""
        self._change(slot, SlotState.READY)
        self._evicted.pop(slot.key, None)
        if slot.refs:
            self._n_pinned += 1
        self.policy.insert(slot.key, parent=slot.parent, cost=slot.cost)

    def make_zombie(self, slot: Slot) -> None:
        """It is found no more; its number stays reserved until the last reference is gone."""
        if slot.state is SlotState.READY:
            self.policy.remove(slot.key)
            self._n_pinned -= slot.refs > 0
        self._lose(slot)

    def ref(self, slots: Iterable[Slot]) -> None:
        """Hold slots, once each."""
        for slot in slots:
            slot.refs += 1
            if slot.refs == 1 and slot.state is SlotState.READY:
                self._n_pinned += 1

    def unref(self, slots: Iterable[Slot]) -> None:
        """Let go of slots, once each."""
        for slot in slots:
            slot.refs -= 1
            if slot.refs == 0:
                if slot.state is SlotState.ZOMBIE:
                    self._free(slot)
                elif slot.state is SlotState.READY:
                    self._n_pinned -= 1

    def clear(self) -> None:
        """Lose every key."""
        for slot in list(self._slots.values()):
            self.make_zombie(slot)
        self._evicted.clear()

    def keys(self) -> list[bytes]:
        """Every key that has a slot."""
        return list(self._slots)

    def _make_room(self, n: int) -> bool:
        needed = n - self._allocator.n_free
        if needed > 0:
            victims = self.policy.victims(needed, is_pinned=lambda key: self._slots[key].refs > 0)
            if not victims:
                return False
            slots = [self._slots[key] for key in victims]
            self._on_evict(slots)
            for slot in slots:
                self.policy.evict(slot.key)
                self._n_pinned -= slot.refs > 0
                self._lose(slot)
                self._evicted[slot.key] = None
                self._metrics.add("l1_evicted_blocks")
            while len(self._evicted) > self._remember:
                self._evicted.popitem(last=False)
        return self._allocator.n_free >= n

    def _lose(self, slot: Slot) -> None:
        del self._slots[slot.key]
        self._change(slot, SlotState.ZOMBIE)
        self.n_zombies += 1
        if slot.refs == 0:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        self.n_zombies -= 1
        self._allocator.free([slot.number])

    @staticmethod
    def _change(slot: Slot, state: SlotState) -> None:
        if state not in _ALLOWED[slot.state]:
            raise AssertionError(f"slot {slot.number}: {slot.state.value} cannot become {state.value}")
        slot.state = state
