"""A store of blocks in memory: size classes over slabs, eviction by policy, pins and reservations.

Pure bookkeeping, for one thread at a time: the pool server and the `memory://` backend both put their own I/O
around it. A slab belongs to one size class at a time and goes where it is needed:

- A slab without a block goes back to the reserve, and a class without a slab vanishes. So there are never more
  classes than slabs, however many sizes there are.
- A class that needs room takes a free slab; else the coldest slab of the others, if that one's blocks were last
  used more than twice as long ago, on average, as the block that the class would evict of its own; else it evicts
  that block. Long ago is counted in uses of blocks in the whole store. Twice, because one slab more or less makes a
  class with few slabs keep its blocks up to twice as long or half as long: so two classes in a steady state do not
  take the same slab from each other for ever. Comparing ages, and moving the slab from where they are oldest, is
  what Memcache at Facebook does (Nishtala et al., NSDI 2013, section 3.3).
- A class with less than its share (slabs over classes, at least one) that has nothing of its own to evict takes the
  coldest slab whatever its age. So no size starves.
- The blocks of a slab that is taken are evicted. While one of its slots is pinned or reserved, a slab stays.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvrdma.errors import CapacityError, ConfigError
from kvrdma.keys import KEY_NBYTES, KeySpace
from kvrdma.memory import Memory, SlabReserve, SlabSource
from kvrdma.policies import EvictionPolicy, PolicyMaker

_MIN_SLAB_NBYTES: Final = 8 << 20
_MAX_SLAB_NBYTES: Final = 256 << 20
_SLABS_WANTED: Final = 16
_ALIGNMENT: Final = 64
_COLDER: Final = 2
MAX_KEYSPACES: Final = 4096
REMEMBERED: Final = 1 << 16  # evicted blocks, for the reasons of misses


@dataclass(slots=True, eq=False)
class Entry:
    """One stored block of one shard. Readers pin it; once it is gone its slot stays until the last unpins."""

    name: bytes  # key and shard
    keyspace: int
    nbytes: int
    slab: Slab
    slot: int  # of its slab
    generation: int
    used: int  # by the store's clock
    checksum: int = 0
    pins: int = 0
    gone: bool = False

    @property
    def memory(self) -> Memory:
        """The slab that it lies in."""
        return self.slab.memory

    @property
    def offset(self) -> int:
        """Where in the slab it begins, in bytes."""
        return self.slot * self.slab.size_class.stride

    def view(self) -> NDArray[np.uint8]:
        """Its bytes, without a copy."""
        return self.slab.array[self.offset : self.offset + self.nbytes]


@dataclass(slots=True, eq=False)
class Slab:
    """A piece of memory, cut into slots of one size as long as it belongs to a size class."""

    memory: Memory
    array: NDArray[np.uint8]
    size_class: SizeClass
    free: list[int]
    entries: list[Entry | None]  # those that are there, by slot
    n_entries: int = 0
    n_held: int = 0  # slots that are reserved or pinned
    used: int = 0  # sum over `entries`


@dataclass(slots=True, eq=False)
class SizeClass:
    """The blocks of one size, on slabs of their own."""

    nbytes: int
    stride: int
    slots_per_slab: int
    policy: EvictionPolicy
    slabs: dict[Slab, None] = field(default_factory=dict)  # a set in the order in which they came
    open: dict[Slab, None] = field(default_factory=dict)  # those with a free slot
    n_free: int = 0
    pinned: set[bytes] = field(default_factory=set)  # names of blocks that are there and pinned

    @property
    def n_evictable(self) -> int:
        """How many of its blocks could go."""
        return len(self.policy) - len(self.pinned)


def slab_size(capacity_nbytes: int) -> int:
    """A sixteenth of the capacity, within 8 MiB and 256 MiB: room for many sizes, and few registrations."""
    return max(_MIN_SLAB_NBYTES, min(_MAX_SLAB_NBYTES, capacity_nbytes // _SLABS_WANTED))


class BlockStore:
    """Blocks by name, which is a key of `key_nbytes` and a shard, within a fixed capacity.

    With `in_background` it begins with a part of it, and its owner calls `reserve_of_slabs.grow` for the rest.

    Raises:
        CapacityError: the capacity is less than one slab, or more than the host has.
    """

    def __init__(
        self,
        capacity_nbytes: int,
        policy: PolicyMaker,
        *,
        slab_nbytes: int | None = None,
        source: SlabSource | None = None,
        key_nbytes: int = KEY_NBYTES,
        in_background: bool = False,
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.reserve_of_slabs = SlabReserve(
            capacity_nbytes, slab_nbytes or slab_size(capacity_nbytes), source=source, in_background=in_background
        )
        self._policy = policy
        self._key_nbytes = key_nbytes
        self._classes: dict[int, SizeClass] = {}
        self._entries: dict[bytes, Entry] = {}
        self._reserved: dict[bytes, Entry] = {}
        self._last_generation = 0
        self._clock = 0
        self._nbytes = 0
        self._n_zombies = 0  # gone, but still read
        self._keyspaces: dict[bytes, int] = {}
        self._spaces: dict[int, KeySpace] = {}
        self._space_numbers = itertools.count()
        self._blocks_in: Counter[int] = Counter()
        self._blocks_of: Counter[bytes] = Counter()  # by shard
        self._evicted: OrderedDict[int, None] = OrderedDict()  # hashes of names: a wrong one is a wrong statistic
        self.counts: Counter[str] = Counter()

    # -- key spaces

    def open_keyspace(self, keyspace: KeySpace) -> int:
        """The number of a key space, the same each time as long as it has blocks.

        Engines make new ones without end, one at each update of their weights: of more than `MAX_KEYSPACES` an
        empty one is forgotten. Its blocks would still be found, only `nearest_filled` does not know it.
        """
        digest = keyspace.digest
        number = self._keyspaces.get(digest)
        if number is None:
            if len(self._spaces) >= MAX_KEYSPACES:
                oldest = next(iter(self._spaces))
                empty = next((n for n in self._spaces if not self._blocks_in[n]), oldest)
                del self._keyspaces[self._spaces.pop(empty).digest]
            number = self._keyspaces[digest] = next(self._space_numbers)
            self._spaces[number] = keyspace
        return number

    def nearest_filled(self, keyspace: int) -> list[str]:
        """Where this key space is empty: the fields in which the nearest one that is not differs."""
        here = self._spaces.get(keyspace)
        if here is None or self._blocks_in[keyspace] > 0:
            return []
        differences = [
            here.differs(self._spaces[number])
            for number, n_blocks in self._blocks_in.items()
            if n_blocks > 0 and number != keyspace and number in self._spaces
        ]
        return min(differences, key=len, default=[])

    # -- blocks

    def has(self, name: bytes) -> bool:
        """Whether a block is there, whole."""
        return name in self._entries

    def was_evicted(self, name: bytes) -> bool:
        """Whether a block that is not there once was, as far as it is remembered."""
        return hash(name) in self._evicted

    def reserve(self, keyspace: int, names: Sequence[bytes], nbytes: Sequence[int]) -> list[Entry | None]:
        """Take slots for blocks that are not there yet, evicting others; None for those that get none.

        Of each size the leading ones get slots where not all can. A reserved block is not there until it is
        committed; one that somebody else has reserved gets none.
        """
        wanted: dict[int, list[int]] = {}
        taken: set[bytes] = set()
        for i, (name, size) in enumerate(zip(names, nbytes, strict=True)):
            if not 0 < size <= self.reserve_of_slabs.slab_nbytes:
                self.counts["declined_too_large"] += 1
            elif not (name in self._entries or name in self._reserved or name in taken):
                taken.add(name)
                wanted.setdefault(size, []).append(i)
        entries: list[Entry | None] = [None] * len(names)
        for size, rows in wanted.items():
            size_class = self._classes.get(size) or self._new_class(size)
            for i in rows[: self._make_room(size_class, len(rows))]:
                entries[i] = self._reserve(keyspace, names[i], size_class)
        return entries

    def commit(self, entry: Entry, checksum: int) -> None:
        """A reserved block's bytes are in place: it is there from now on."""
        self._end_reservation(entry)
        entry.checksum = checksum
        entry.used = self._tick()
        slab = entry.slab
        slab.n_held -= 1
        slab.entries[entry.slot] = entry
        slab.n_entries += 1
        slab.used += entry.used
        slab.size_class.policy.insert(entry.name)
        self._evicted.pop(hash(entry.name), None)
        self._entries[entry.name] = entry
        self._nbytes += entry.nbytes
        self._blocks_in[entry.keyspace] += 1
        self._blocks_of[entry.name[self._key_nbytes :]] += 1
        self.counts["stored_blocks"] += 1
        self.counts["stored_bytes"] += entry.nbytes

    def give_up(self, entry: Entry) -> None:
        """A reserved block did not come: its slot is free again."""
        self._end_reservation(entry)
        entry.slab.n_held -= 1
        self._free(entry)

    def pin(self, names: Iterable[bytes]) -> list[Entry | None]:
        """Keep the blocks that are there from being evicted, and note their use."""
        pinned: list[Entry | None] = []
        for name in names:
            entry = self._entries.get(name)
            pinned.append(entry)
            if entry is None:
                continue
            slab, now = entry.slab, self._tick()
            slab.size_class.policy.touch(name)
            slab.used += now - entry.used
            entry.used = now
            entry.pins += 1
            if entry.pins == 1:
                slab.n_held += 1
                slab.size_class.pinned.add(name)
        return pinned

    def unpin(self, entries: Iterable[Entry]) -> None:
        """Undo one `pin` of each."""
        for entry in entries:
            assert entry.pins > 0, "unpinned more often than pinned"
            entry.pins -= 1
            if entry.pins == 0:
                entry.slab.n_held -= 1
                if entry.gone:
                    self._n_zombies -= 1
                    self._free(entry)
                else:
                    entry.slab.size_class.pinned.discard(entry.name)

    def drop_wrong(self, entry: Entry) -> None:
        """Drop a block that a reader found wrong, if it is still the one that was read."""
        if self._entries.get(entry.name) is entry:
            self.counts["dropped_wrong"] += 1
            self._remove(entry)

    def delete(self, keys: set[bytes]) -> int:
        """Drop every shard of these keys; gives the number of blocks dropped."""
        n, shards = self._key_nbytes, list(self._blocks_of)
        names: Iterable[bytes]
        if len(keys) * len(shards) < len(self._entries):
            names = (key + shard for key in keys for shard in shards)
        else:
            names = [name for name in self._entries if name[:n] in keys]
        doomed = [entry for entry in map(self._entries.get, names) if entry is not None]
        for entry in doomed:
            self._remove(entry)
        return len(doomed)

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name; `by_size` has a row a size class."""
        by_size = [
            {"nbytes": c.nbytes, "slabs": len(c.slabs), "blocks": len(c.policy), "pinned": len(c.pinned)}
            for c in sorted(self._classes.values(), key=lambda c: c.nbytes)
        ]
        return {
            "evicted_blocks": 0,
            "moved_slabs": 0,
            **self.counts,
            "blocks": len(self._entries),
            "bytes": self._nbytes,
            "capacity_bytes": self.capacity_nbytes,
            "slabs": self.reserve_of_slabs.n_slabs,
            "ready_slabs": self.reserve_of_slabs.n_ready,
            "free_slabs": self._n_free_slabs,
            "keyspaces": len(self._spaces),
            "size_classes": len(self._classes),
            "pinned_blocks": sum(row["pinned"] for row in by_size),
            "reserved_blocks": len(self._reserved),
            "zombie_blocks": self._n_zombies,
            "by_size": by_size,
        }

    def close(self) -> None:
        """Give the memory back. Idempotent.

        Raises:
            CapacityError: something is pinned or reserved; what is not has gone all the same.
        """
        for entry in list(self._entries.values()):
            self._remove(entry)
        n_held = sum(slab.n_held for size_class in self._classes.values() for slab in size_class.slabs)
        if n_held:
            raise CapacityError(f"store: {n_held} blocks are still held by readers and puts")
        self.reserve_of_slabs.close()

    # -- slots

    def _reserve(self, keyspace: int, name: bytes, size_class: SizeClass) -> Entry:
        slab = next(iter(size_class.open))
        slot = slab.free.pop()
        if not slab.free:
            del size_class.open[slab]
        size_class.n_free -= 1
        slab.n_held += 1
        self._last_generation += 1
        entry = Entry(name, keyspace, size_class.nbytes, slab, slot, self._last_generation, self._clock)
        self._reserved[name] = entry
        return entry

    def _end_reservation(self, entry: Entry) -> None:
        assert self._reserved.get(entry.name) is entry, "committed or given up twice"
        del self._reserved[entry.name]

    def _remove(self, entry: Entry) -> None:
        entry.slab.size_class.policy.remove(entry.name)
        self._forget(entry)

    def _evict(self, entry: Entry) -> None:
        entry.slab.size_class.policy.evict(entry.name)
        self.counts["evicted_blocks"] += 1
        self._evicted[hash(entry.name)] = None
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        """It is not there any longer; its slot is free once nobody reads it."""
        slab, shard = entry.slab, entry.name[self._key_nbytes :]
        entry.gone = True
        del self._entries[entry.name]
        slab.entries[entry.slot] = None
        slab.n_entries -= 1
        slab.used -= entry.used
        self._nbytes -= entry.nbytes
        self._blocks_in[entry.keyspace] -= 1
        self._blocks_of[shard] -= 1
        if not self._blocks_of[shard]:
            del self._blocks_of[shard]
        if not self._blocks_in[entry.keyspace]:
            del self._blocks_in[entry.keyspace]
        if entry.pins:
            slab.size_class.pinned.discard(entry.name)
            self._n_zombies += 1
        else:
            self._free(entry)

    def _free(self, entry: Entry) -> None:
        """Free a slot; a slab whose last one this was goes back, and a class whose last slab that was."""
        slab, size_class = entry.slab, entry.slab.size_class
        slab.free.append(entry.slot)
        size_class.open[slab] = None
        size_class.n_free += 1
        if len(slab.free) == size_class.slots_per_slab:
            size_class.n_free -= len(slab.free)
            del size_class.slabs[slab], size_class.open[slab]
            if not size_class.slabs:
                del self._classes[size_class.nbytes]
            self.reserve_of_slabs.release(slab.memory)

    # -- room

    def _new_class(self, nbytes: int) -> SizeClass:
        stride = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        capacity = max(1, self.capacity_nbytes // nbytes)
        return SizeClass(nbytes, stride, max(1, self.reserve_of_slabs.slab_nbytes // stride), self._policy(capacity))

    def _make_room(self, size_class: SizeClass, n: int) -> int:
        """Take slabs and evict until n slots are free, or as many as there can be; gives that number."""
        while size_class.n_free < n:
            if self._n_free_slabs:
                self._take_slab(size_class)
                continue
            n_wanted = min(n - size_class.n_free, size_class.n_evictable, size_class.slots_per_slab)
            victims = size_class.policy.victims(n_wanted, is_pinned=size_class.pinned.__contains__)
            coldest = min(self._slabs_of_others(size_class), key=_mean_use, default=None)
            if coldest is not None and self._may_take(size_class, coldest, victims):
                self.counts["moved_slabs"] += 1
                for entry in coldest.entries:
                    if entry is not None:
                        self._evict(entry)
            elif victims:
                for name in victims:
                    self._evict(self._entries[name])
            else:
                break
        return min(n, size_class.n_free)

    def _slabs_of_others(self, size_class: SizeClass) -> Iterator[Slab]:
        """The slabs of other classes that nobody holds. Each has a block: an empty one is in the reserve."""
        for other in self._classes.values():
            if other is not size_class:
                yield from (slab for slab in other.slabs if not slab.n_held)

    def _may_take(self, size_class: SizeClass, slab: Slab, victims: list[bytes]) -> bool:
        """Whether a slab of another class goes, rather than the first of a class's own victims."""
        if victims:
            age = self._clock - self._entries[victims[0]].used
            return self._clock - _mean_use(slab) > _COLDER * age
        share = self.reserve_of_slabs.n_slabs // (len(self._classes) + (size_class.nbytes not in self._classes))
        return len(size_class.slabs) < max(1, share)

    def _take_slab(self, size_class: SizeClass) -> None:
        """Take a slab from the reserve."""
        memory = self.reserve_of_slabs.allocate(self.reserve_of_slabs.slab_nbytes)
        n = size_class.slots_per_slab
        slab = Slab(memory, memory.array(), size_class, list(reversed(range(n))), [None] * n)
        self._classes[size_class.nbytes] = size_class  # again, where its own evictions have emptied it
        size_class.slabs[slab] = size_class.open[slab] = None
        size_class.n_free += n

    @property
    def _n_free_slabs(self) -> int:
        return self.reserve_of_slabs.available_nbytes() // self.reserve_of_slabs.slab_nbytes

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _mean_use(slab: Slab) -> float:
    """When its blocks were last used, on average, by the store's clock."""
    return slab.used / slab.n_entries


def check_capacity(capacity_nbytes: int) -> None:
    """Raise `ConfigError` where a capacity is too small to be of use."""
    if capacity_nbytes < _MIN_SLAB_NBYTES:
        raise ConfigError(f"capacity of {capacity_nbytes} bytes: at least {_MIN_SLAB_NBYTES} are needed")
