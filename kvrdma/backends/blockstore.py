"""A store of blocks in memory: size classes over slabs, eviction by policy, pins and reservations.

Pure bookkeeping on pinned pools, for one thread at a time: the pool server and the `memory://` backend both
put their own I/O around it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvrdma.errors import CapacityError, ConfigError
from kvrdma.keys import KeySpace
from kvrdma.memory import Lease, PinnedPool, SlabReserve, SlabSource
from kvrdma.policies import EvictionPolicy

_MIN_SLAB_NBYTES: Final = 8 << 20
_MAX_SLAB_NBYTES: Final = 256 << 20
_SLABS_WANTED: Final = 16


@dataclass(slots=True, eq=False)
class Entry:
    """One stored block of one shard. Readers pin it; once it is gone its slot stays until the last unpins."""

    name: bytes  # key and shard
    keyspace: int
    nbytes: int
    lease: Lease
    generation: int
    size_class: SizeClass
    checksum: int = 0
    pins: int = 0
    gone: bool = False

    @property
    def slot(self) -> int:
        """Its number in its size class's pool."""
        return int(self.lease.slots[0])


@dataclass(slots=True, eq=False)
class SizeClass:
    """The blocks of one size, on slabs of their own."""

    nbytes: int
    pool: PinnedPool
    policy: EvictionPolicy
    n_pinned: int = 0


def slab_size(capacity_nbytes: int) -> int:
    """A sixteenth of the capacity, within 8 MiB and 256 MiB: room for many sizes, and few registrations."""
    return max(_MIN_SLAB_NBYTES, min(_MAX_SLAB_NBYTES, capacity_nbytes // _SLABS_WANTED))


class BlockStore:
    """Blocks by key and shard within a fixed capacity.

    Raises:
        CapacityError: the capacity is less than one slab, or more than the host has.
    """

    def __init__(
        self,
        capacity_nbytes: int,
        policy: type[EvictionPolicy],
        *,
        slab_nbytes: int | None = None,
        source: SlabSource | None = None,
    ) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.reserve_of_slabs = SlabReserve(capacity_nbytes, slab_nbytes or slab_size(capacity_nbytes), source=source)
        self._policy = policy
        self._classes: dict[int, SizeClass] = {}
        self._entries: dict[bytes, Entry] = {}
        self._reserved: set[bytes] = set()
        self._by_generation: dict[int, Entry] = {}
        self._generations = itertools.count(1)
        self._keyspaces: dict[bytes, int] = {}
        self._spaces: list[KeySpace] = []
        self._blocks_in: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()

    # -- key spaces

    def open_keyspace(self, keyspace: KeySpace) -> int:
        """The number of a key space, the same each time."""
        digest = keyspace.digest
        if digest not in self._keyspaces:
            self._keyspaces[digest] = len(self._spaces)
            self._spaces.append(keyspace)
        return self._keyspaces[digest]

    def nearest_filled(self, keyspace: int) -> list[str]:
        """Where this key space is empty: the fields in which the nearest one that is not differs."""
        if self._blocks_in[keyspace] > 0:
            return []
        here = self._spaces[keyspace]
        differences = [
            here.differs(other)
            for number, other in enumerate(self._spaces)
            if number != keyspace and self._blocks_in[number] > 0
        ]
        return min(differences, key=len, default=[])

    # -- blocks

    def has(self, name: bytes) -> bool:
        """Whether a block is there, whole."""
        return name in self._entries

    def reserve(self, keyspace: int, names: Sequence[bytes], nbytes: Sequence[int]) -> list[Entry | None]:
        """Take slots for blocks that are not there yet, evicting others; None for those that get none.

        Of each size the leading ones get slots where not all can. A reserved block is not there until it is
        committed; one that somebody else has reserved gets none.
        """
        wanted: dict[int, list[int]] = {}
        taken: set[bytes] = set()
        for i, (name, size) in enumerate(zip(names, nbytes, strict=True)):
            size_class = self._class(size)
            if size_class is None or name in self._entries or name in self._reserved or name in taken:
                continue
            taken.add(name)
            wanted.setdefault(size, []).append(i)
        entries: list[Entry | None] = [None] * len(names)
        for size, rows in wanted.items():
            size_class = self._classes[size]
            for i in rows[: self._make_room(size_class, len(rows))]:
                self._reserved.add(names[i])
                entries[i] = Entry(
                    names[i], keyspace, size, size_class.pool.allocate(1), next(self._generations), size_class
                )
        return entries

    def commit(self, entry: Entry, checksum: int) -> None:
        """A reserved block's bytes are in place: it is there from now on."""
        entry.checksum = checksum
        self._reserved.discard(entry.name)
        entry.size_class.policy.insert(entry.name)
        self._entries[entry.name] = entry
        self._by_generation[entry.generation] = entry
        self._blocks_in[entry.keyspace] += 1
        self.counts["stored_blocks"] += 1
        self.counts["stored_bytes"] += entry.nbytes

    def give_up(self, entry: Entry) -> None:
        """A reserved block did not come: its slot is free again."""
        self._reserved.discard(entry.name)
        entry.lease.release()

    def pin(self, names: Iterable[bytes]) -> list[Entry | None]:
        """Keep the blocks that are there from being evicted, and note their use."""
        pinned: list[Entry | None] = []
        for name in names:
            entry = self._entries.get(name)
            pinned.append(entry)
            if entry is None:
                continue
            entry.size_class.policy.touch(name)
            entry.pins += 1
            entry.size_class.n_pinned += entry.pins == 1
        return pinned

    def unpin(self, entries: Iterable[Entry]) -> None:
        """Undo one `pin` of each."""
        for entry in entries:
            entry.pins -= 1
            if entry.pins == 0:
                entry.size_class.n_pinned -= not entry.gone
                if entry.gone:
                    entry.lease.release()

    def drop_wrong(self, generation: int) -> None:
        """Drop a block that a reader found wrong, if it is still the one that was read."""
        entry = self._by_generation.get(generation)
        if entry is not None:
            self.counts["dropped_wrong"] += 1
            entry.size_class.policy.remove(entry.name)
            self._forget(entry)

    def delete(self, keys: set[bytes], key_nbytes: int) -> int:
        """Drop every shard of these keys."""
        doomed = [entry for name, entry in self._entries.items() if name[:key_nbytes] in keys]
        for entry in doomed:
            entry.size_class.policy.remove(entry.name)
            self._forget(entry)
        return len(doomed)

    def stats(self) -> dict[str, int]:
        """Counters and gauges by name."""
        return {
            **self.counts,
            "blocks": len(self._entries),
            "bytes": sum(entry.nbytes for entry in self._entries.values()),
            "capacity_bytes": self.capacity_nbytes,
            "keyspaces": len(self._spaces),
            "size_classes": len(self._classes),
            "pinned_blocks": sum(c.n_pinned for c in self._classes.values()),
            "reserved_blocks": len(self._reserved),
        }

    def close(self) -> None:
        """Give the memory back; nothing may be pinned or reserved."""
        for entry in list(self._entries.values()):
            entry.size_class.policy.remove(entry.name)
            self._forget(entry)
        for size_class in self._classes.values():
            size_class.pool.close()
        self.reserve_of_slabs.close()

    def _class(self, nbytes: int) -> SizeClass | None:
        size_class = self._classes.get(nbytes)
        if size_class is None:
            slabs = self.reserve_of_slabs
            if not 0 < nbytes <= slabs.slab_nbytes:
                self.counts["declined_too_large"] += 1
                return None
            pool = PinnedPool(nbytes, source=slabs, slab_nbytes=slabs.slab_nbytes)
            capacity = max(1, self.capacity_nbytes // nbytes)
            size_class = self._classes[nbytes] = SizeClass(nbytes, pool, self._policy(capacity))
        return size_class

    def _make_room(self, size_class: SizeClass, n: int) -> int:
        """Grow and evict until n slots are free, or as many as there can be; gives that number."""
        pool, policy = size_class.pool, size_class.policy
        while pool.n_free < n and self.reserve_of_slabs.available_nbytes():
            try:
                pool.grow(pool.slots_per_slab)
            except CapacityError:
                break
        n = min(n, pool.n_free + len(policy) - size_class.n_pinned)
        for name in policy.victims(n - pool.n_free, is_pinned=lambda name: self._entries[name].pins > 0):
            policy.evict(name)
            self.counts["evicted_blocks"] += 1
            self._forget(self._entries[name])
        return min(n, pool.n_free)

    def _forget(self, entry: Entry) -> None:
        entry.gone = True
        del self._entries[entry.name]
        del self._by_generation[entry.generation]
        self._blocks_in[entry.keyspace] -= 1
        if entry.pins:
            entry.size_class.n_pinned -= 1
        else:
            entry.lease.release()


def check_capacity(capacity_nbytes: int) -> None:
    """Raise `ConfigError` where a capacity is too small to be of use."""
    if capacity_nbytes < _MIN_SLAB_NBYTES:
        raise ConfigError(f"capacity of {capacity_nbytes} bytes: at least {_MIN_SLAB_NBYTES} are needed")
