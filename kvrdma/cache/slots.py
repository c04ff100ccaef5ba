"""The index's table of slots: key -> slot, states, references, eviction. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvrdma.cache.listeners import Listeners
from kvrdma.memory import SlotAllocator
from kvrdma.metrics import Metrics
from kvrdma.policies import EvictionPolicy, Removal

_MAX_VETOES_PER_BLOCK: Final = 4  # that is wanted: nobody may have the whole cache asked through for one block


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
    going: bool = False  # a put of it is under way because its turn to be evicted is near


class SlotTable:
    """Who is where. `on_evict` is told of victims just before they go.

    Of `capacity` slots the first `n_slots` can be used; `grow` adds to them.
    """

    def __init__(
        self,
        capacity: int,
        policy: EvictionPolicy,
        metrics: Metrics,
        listeners: Listeners,
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
        self._listeners = listeners
        self._on_evict = on_evict
        self._n_pinned = 0  # READY slots with references
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._remember = remember
        self.n_zombies = 0
        self.n_evicted = 0  # since the start
        self.n_inserted = 0  # likewise: slots that have become READY

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
        self.n_inserted += 1
        self._evicted.pop(slot.key, None)
        if slot.refs:
            self._n_pinned += 1
        self.policy.insert(slot.key, parent=slot.parent, cost=slot.cost)
        self._listeners.inserted(slot.key)

    def make_zombie(self, slot: Slot, cause: Removal = Removal.FORGOTTEN) -> None:
        """It is found no more; its number stays reserved until the last reference is gone."""
        was_ready = slot.state is SlotState.READY
        if was_ready:
            self.policy.remove(slot.key)
            self._n_pinned -= slot.refs > 0
        self._lose(slot)
        if was_ready:
            self._listeners.removed(slot.key, cause)

    def touch(self, slots: Iterable[Slot]) -> list[Slot]:
        """Note a use of those that are READY; gives those that it has made hot."""
        hot = [slot for slot in slots if slot.state is SlotState.READY and self.policy.touch(slot.key)]
        for slot in hot:
            self._listeners.hot(slot.key)
        return hot

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
            self.make_zombie(slot, Removal.RESET)
        self._evicted.clear()

    def keys(self) -> list[bytes]:
        """Every key that has a slot."""
        return list(self._slots)

    def next_victims(self, n: int) -> list[Slot]:
        """The n slots that would be evicted next, or none where there are not n; nothing changes."""
        return [self._slots[key] for key in self.policy.victims(n, is_pinned=self._is_pinned)]

    def _is_pinned(self, key: bytes) -> bool:
        return self._slots[key].refs > 0

    def _make_room(self, n: int) -> bool:
        """Evict what is needed for n free slots: all of it or, where that is not to be had, nothing."""
        needed = n - self._allocator.n_free
        if needed <= 0:
            return True
        slots = self._agreed_victims(needed) if self._listeners else self.next_victims(needed)
        if not slots:
            return False
        self._on_evict(slots)
        for slot in slots:
            self.policy.evict(slot.key)
            self._lose(slot)
            self._evicted[slot.key] = None
        self.n_evicted += len(slots)
        self._metrics.add("l1_evicted_blocks", len(slots))
        while len(self._evicted) > self._remember:
            self._evicted.popitem(last=False)
        for slot in slots:
            self._listeners.removed(slot.key, Removal.EVICTED)
        return True

    def _agreed_victims(self, n: int) -> list[Slot]:
        """n victims that no listener vetoes, each asked about once; after too many vetoes, none."""
        agreed: dict[bytes, Slot] = {}
        vetoed: set[bytes] = set()
        while len(agreed) < n and len(vetoed) <= _MAX_VETOES_PER_BLOCK * n:
            victims = self.policy.victims(n, is_pinned=lambda key: key in vetoed or self._slots[key].refs > 0)
            if not victims:
                return []
            agreed = {key: agreed[key] for key in victims if key in agreed} | {
                key: self._slots[key] for key in victims if key not in agreed and self._allowed(key, vetoed)
            }
        return [agreed[key] for key in agreed] if len(agreed) == n else []

    def _allowed(self, key: bytes, vetoed: set[bytes]) -> bool:
        if self._listeners.may_evict(key):
            return True
        vetoed.add(key)
        self._metrics.add("eviction_vetoes")
        return False

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
