"""`BlockStore`: what is there, what is pinned, what makes room; by examples and as a machine against a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrdma.backends.blockstore import BlockStore, Entry, check_capacity, slab_size
from kvrdma.errors import CapacityError, ConfigError
from kvrdma.keys import KeySpace
from kvrdma.memory import MemfdSlabs
from kvrdma.policies.lru import LruPolicy

SLAB = 64 << 10
SMALL, LARGE = 8 << 10, 24 << 10  # eight, and two, a slab
KEY_NBYTES = 2
SPACE = KeySpace(
    model="m",
    weights="w",
    config="c",
    kv_dtype="bfloat16",
    attention="a",
    head_size=64,
    layers=2,
    block_tokens=4,
)


def make_store(n_slabs: int) -> BlockStore:
    return BlockStore(n_slabs * SLAB, LruPolicy, slab_nbytes=SLAB, source=MemfdSlabs(lock=False))


@contextmanager
def opened(n_slabs: int) -> Iterator[BlockStore]:
    """A store with one key space; its memory comes back whole."""
    store = make_store(n_slabs)
    store.open_keyspace(SPACE)
    yield store
    store.close()


def name(number: int, shard: int = 0) -> bytes:
    return number.to_bytes(KEY_NBYTES, "big") + bytes([shard])


def names(*numbers: int) -> list[bytes]:
    return [name(number) for number in numbers]


def view(entry: Entry) -> np.ndarray:
    return entry.size_class.pool.view(entry.slot)


def store_all(store: BlockStore, *numbers: int, nbytes: int = SMALL, keyspace: int = 0) -> list[Entry]:
    entries = store.reserve(keyspace, names(*numbers), [nbytes] * len(numbers))
    taken = [entry for entry in entries if entry is not None]
    assert len(taken) == len(numbers)
    for entry in taken:
        store.commit(entry, 0)
    return taken


def has(store: BlockStore, *numbers: int) -> list[bool]:
    return [store.has(name(number)) for number in numbers]


def test_reserved_is_not_there_yet_and_nobody_else_gets_it() -> None:
    with opened(1) as store:
        first, second = store.reserve(0, names(1, 2), [SMALL, SMALL])
        assert first is not None
        assert second is not None
        assert has(store, 1, 2) == [False, False]
        assert store.pin(names(1)) == [None]
        assert store.reserve(0, names(2, 1), [SMALL, SMALL]) == [None, None]
        assert store.reserve(0, names(1), [LARGE]) == [None]  # nor with another size
        assert store.stats()["reserved_blocks"] == 2
        store.commit(first, 11)
        store.give_up(second)
        assert has(store, 1, 2) == [True, False]
        assert store.stats()["reserved_blocks"] == 0
        assert store.reserve(0, names(1), [SMALL]) == [None]  # there already
        (again,) = store.reserve(0, names(2), [SMALL])
        assert again is not None
        assert again.generation > second.generation
        store.give_up(again)


def test_a_name_given_twice_is_reserved_once() -> None:
    with opened(1) as store:
        entries = store.reserve(0, names(1, 1), [SMALL, LARGE])
        assert entries[1] is None
        assert entries[0] is not None
        store.give_up(entries[0])


def test_the_leading_ones_get_the_slots_that_there_are() -> None:
    with opened(1) as store:
        entries = store.reserve(0, names(*range(10)), [SMALL] * 10)
        assert [entry is not None for entry in entries] == [True] * 8 + [False] * 2
        for entry in entries[:8]:
            assert entry is not None
            store.give_up(entry)
        assert store.stats()["blocks"] == 0


def test_a_block_larger_than_a_slab_is_declined() -> None:
    with opened(1) as store:
        assert store.reserve(0, names(1, 2), [SLAB + 1, 0]) == [None, None]
        assert store.counts["declined_too_large"] == 2
        store_all(store, 3, nbytes=SLAB)


@pytest.mark.parametrize("nbytes", [1, 63, 65, 1000, SLAB - 1, SLAB])
def test_any_size_up_to_a_slab_is_stored(nbytes: int) -> None:
    with opened(1) as store:
        (entry,) = store_all(store, 1, nbytes=nbytes)
        assert view(entry).nbytes == nbytes


def test_where_one_size_has_every_slab_another_is_declined() -> None:
    with opened(1) as store:
        store_all(store, 1)
        assert store.reserve(0, names(2), [LARGE]) == [None]
        assert has(store, 1) == [True]


def test_what_was_used_longest_ago_makes_room() -> None:
    with opened(1) as store:
        store_all(store, *range(8))
        store.unpin(entry for entry in store.pin(names(0, 1)) if entry)
        store_all(store, 8, 9)
        assert has(store, *range(10)) == [True, True, False, False] + [True] * 6
        assert store.stats()["evicted_blocks"] == 2


def test_pinned_and_reserved_blocks_are_never_evicted() -> None:
    with opened(1) as store:
        store_all(store, *range(6))
        reserved = store.reserve(0, names(6, 7), [SMALL, SMALL])
        pinned = [entry for entry in store.pin(names(0, 1, 2, 3, 4)) if entry]
        entries = store.reserve(0, names(10, 11), [SMALL, SMALL])
        assert entries[1] is None
        assert has(store, *range(6)) == [True] * 5 + [False]
        for entry in (*reserved, entries[0]):
            assert entry is not None
            store.give_up(entry)
        store.unpin(pinned)


def test_a_slot_of_a_block_that_went_while_it_was_read_is_not_used_before_the_last_reader_is_done() -> None:
    with opened(1) as store:
        store_all(store, *range(8))
        readers = [entry for _ in range(2) for entry in store.pin(names(3)) if entry]
        slot = readers[0].slot
        view(readers[0])[:] = 33
        assert store.delete({name(3)[:KEY_NBYTES]}, KEY_NBYTES) == 1
        assert has(store, 3) == [False]
        for round_ in range(3):
            for entry in store_all(store, *range(20 * (round_ + 1), 20 * (round_ + 1) + 7)):
                assert entry.slot != slot
                view(entry)[:] = 44
        assert (view(readers[0]) == 33).all()
        store.unpin(readers[:1])
        reserved = store.reserve(0, names(*range(90, 98)), [SMALL] * 8)
        assert reserved.pop() is None
        for entry in reserved:
            assert entry is not None
            store.give_up(entry)
        store.unpin(readers[1:])
        assert slot in [entry.slot for entry in store_all(store, *range(100, 108))]


def test_a_block_found_wrong_is_dropped_unless_it_is_another_one_by_now() -> None:
    with opened(1) as store:
        (old,) = store_all(store, 1)
        store.drop_wrong(old.generation)
        assert has(store, 1) == [False]
        (new,) = store_all(store, 1)
        store.drop_wrong(old.generation)
        assert has(store, 1) == [True]
        assert store.counts["dropped_wrong"] == 1
        (reserved,) = store.reserve(0, names(2), [SMALL])
        assert reserved is not None
        store.drop_wrong(reserved.generation)  # nobody can have read it yet
        store.commit(reserved, 0)
        assert has(store, 2) == [True]
        (pinned,) = store.pin(names(1))
        assert pinned is new
        store.drop_wrong(new.generation)
        store.drop_wrong(new.generation)  # found by two readers
        store.unpin([new])


def test_delete_drops_every_shard_of_a_key() -> None:
    with opened(1) as store:
        blocks = [name(1, 0), name(1, 1), name(2, 0)]
        for entry in store.reserve(0, blocks, [SMALL] * 3):
            assert entry is not None
            store.commit(entry, 0)
        assert store.delete({name(1)[:KEY_NBYTES], name(9)[:KEY_NBYTES]}, KEY_NBYTES) == 2
        assert [store.has(block) for block in blocks] == [False, False, True]


def test_a_block_that_is_under_way_is_not_deleted() -> None:
    with opened(1) as store:
        (entry,) = store.reserve(0, names(1), [SMALL])
        assert entry is not None
        assert store.delete({name(1)[:KEY_NBYTES]}, KEY_NBYTES) == 0
        store.commit(entry, 0)
        assert has(store, 1) == [True]


def test_two_sizes_have_slabs_of_their_own() -> None:
    with opened(2) as store:
        store_all(store, 1, nbytes=SMALL)
        store_all(store, 2, nbytes=LARGE)
        for number in range(10, 20):
            store_all(store, number, nbytes=LARGE)
        assert has(store, 1) == [True]  # one size does not evict the other
        stats = store.stats()
        assert (stats["size_classes"], stats["blocks"], stats["bytes"]) == (2, 3, SMALL + 2 * LARGE)


def test_the_nearest_key_space_that_is_not_empty() -> None:
    with opened(1) as store:
        near = store.open_keyspace(replace(SPACE, weights="other"))
        far = store.open_keyspace(replace(SPACE, weights="other", model="other"))
        assert store.open_keyspace(SPACE) == 0  # the same each time
        assert store.nearest_filled(0) == []
        store_all(store, 1, keyspace=far)
        assert store.nearest_filled(0) == ["model", "weights"]
        store_all(store, 2, keyspace=near)
        assert store.nearest_filled(0) == ["weights"]
        store.delete({name(2)[:KEY_NBYTES]}, KEY_NBYTES)
        assert store.nearest_filled(0) == ["model", "weights"]
        store_all(store, 3)
        assert store.nearest_filled(0) == []


def test_close_is_refused_while_a_block_is_read_and_idempotent_after() -> None:
    store = make_store(1)
    store.open_keyspace(SPACE)
    store_all(store, 1)
    readers = [entry for entry in store.pin(names(1)) if entry]
    with pytest.raises(CapacityError, match="held"):
        store.close()
    store.unpin(readers)
    store.close()
    store.close()


def test_a_capacity_of_no_use_is_refused() -> None:
    with pytest.raises(CapacityError, match="less than one slab"):
        BlockStore(SLAB - 1, LruPolicy, slab_nbytes=SLAB)
    with pytest.raises(CapacityError, match="the host has"):
        BlockStore(1 << 60, LruPolicy)
    with pytest.raises(ConfigError, match="at least"):
        check_capacity(1 << 20)
    for capacity in (8 << 20, 64 << 20, 1 << 30, 1 << 40):
        check_capacity(capacity)
        assert 8 << 20 <= slab_size(capacity) <= 256 << 20


# -- the machine


@dataclass(eq=False)
class Block:
    """What the model knows of an entry."""

    entry: Entry
    mark: int
    keyspace: int
    pins: int = 0
    there: bool = False

    def write(self) -> None:
        view(self.entry)[:] = self.mark

    def whole(self) -> bool:
        return bool((view(self.entry) == self.mark).all())


numbers = st.lists(st.integers(0, 30), min_size=1, max_size=12)
picks = st.integers(0, 1000)


class StoreMachine(RuleBasedStateMachine):
    @initialize(n_slabs=st.integers(1, 4))
    def start(self, n_slabs: int) -> None:
        self.n_slabs = n_slabs
        self.store = make_store(n_slabs)
        for model in ("m", "n"):
            self.store.open_keyspace(replace(SPACE, model=model))
        self.there: dict[bytes, Block] = {}
        self.reserved: dict[bytes, Block] = {}
        self.readers: list[Block] = []
        self.marks = 0

    @rule(numbers=numbers, large=st.lists(st.booleans(), min_size=12, max_size=12), keyspace=st.integers(0, 1))
    def reserve(self, numbers: list[int], large: list[bool], keyspace: int) -> None:
        wanted = names(*numbers)
        sizes = [LARGE if is_large else SMALL for is_large in large[: len(wanted)]]
        evicted = self.store.counts["evicted_blocks"]
        entries = self.store.reserve(keyspace, wanted, sizes)
        given: dict[int, list[bool]] = {SMALL: [], LARGE: []}
        seen: set[bytes] = set()
        for block_name, size, entry in zip(wanted, sizes, entries, strict=True):
            if block_name in self.there or block_name in self.reserved or block_name in seen:
                assert entry is None
                continue
            seen.add(block_name)
            given[size].append(entry is not None)
            if entry is not None:
                assert (entry.name, entry.nbytes) == (block_name, size)
        for flags in given.values():
            assert flags == sorted(flags, reverse=True)  # the leading ones
        gone = [block for block_name, block in self.there.items() if not self.store.has(block_name)]
        assert len(gone) == self.store.counts["evicted_blocks"] - evicted
        for block in gone:
            assert block.pins == 0
            del self.there[block.entry.name]
        for entry in entries:
            if entry is not None:
                self.marks = (self.marks + 1) % 256
                self.reserved[entry.name] = Block(entry, self.marks, keyspace)
                self.reserved[entry.name].write()

    @precondition(lambda self: self.reserved)
    @rule(pick=picks, stays=st.booleans())
    def end_reservation(self, pick: int, stays: bool) -> None:
        block = self.reserved.pop(list(self.reserved)[pick % len(self.reserved)])
        if stays:
            self.store.commit(block.entry, block.mark)
            block.there = True
            self.there[block.entry.name] = block
        else:
            self.store.give_up(block.entry)

    @rule()
    def commit_all(self) -> None:
        while self.reserved:
            self.end_reservation(0, True)

    @rule(numbers=numbers)
    def pin(self, numbers: list[int]) -> None:
        wanted = names(*numbers)
        for block_name, entry in zip(wanted, self.store.pin(wanted), strict=True):
            block = self.there.get(block_name)
            assert entry is (block.entry if block else None)
            if block:
                assert entry.checksum == block.mark
                block.pins += 1
                self.readers.append(block)

    @precondition(lambda self: self.readers)
    @rule(pick=picks)
    def unpin(self, pick: int) -> None:
        block = self.readers.pop(pick % len(self.readers))
        assert block.whole()
        block.pins -= 1
        self.store.unpin([block.entry])

    @precondition(lambda self: self.readers)
    @rule(pick=picks)
    def drop_wrong(self, pick: int) -> None:
        block = self.readers[pick % len(self.readers)]
        self.store.drop_wrong(block.entry.generation)
        self._forget(block)

    @rule(numbers=numbers)
    def delete(self, numbers: list[int]) -> None:
        doomed = [self.there[block_name] for block_name in set(names(*numbers)) & self.there.keys()]
        assert self.store.delete({block_name[:KEY_NBYTES] for block_name in names(*numbers)}, KEY_NBYTES) == len(doomed)
        for block in doomed:
            self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.there:
            block.there = False
            del self.there[block.entry.name]

    def _live(self) -> list[Block]:
        return [*dict.fromkeys([*self.there.values(), *self.reserved.values(), *self.readers])]

    @invariant()
    def every_slot_has_one_owner_and_its_bytes(self) -> None:
        live = self._live()
        places = {(block.entry.nbytes, block.entry.slot) for block in live}
        assert len(places) == len(live)
        assert all(block.whole() for block in live)

    @invariant()
    def the_books_are_right(self) -> None:
        store, live = self.store, self._live()
        stats = store.stats()
        assert stats["blocks"] == len(self.there)
        assert stats["bytes"] == sum(block.entry.nbytes for block in self.there.values())
        assert stats["reserved_blocks"] == len(self.reserved)
        assert stats["pinned_blocks"] == sum(block.pins > 0 for block in self.there.values())
        n_slots = 0
        for size, size_class in store._classes.items():
            pool = size_class.pool
            assert pool.n_slots - pool.n_free == sum(block.entry.nbytes == size for block in live)
            assert len(size_class.policy) == sum(block.entry.nbytes == size for block in self.there.values())
            n_slots += -(-pool.n_slots // pool.slots_per_slab)
        assert n_slots * SLAB + store.reserve_of_slabs.available_nbytes() == self.n_slabs * SLAB
        for keyspace in range(2):
            here = any(block.keyspace == keyspace for block in self.there.values())
            there = any(block.keyspace != keyspace for block in self.there.values())
            assert store.nearest_filled(keyspace) == (["model"] if there and not here else [])

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        while self.readers:
            self.unpin(0)
        while self.reserved:
            self.end_reservation(0, False)
        self.the_books_are_right()
        self.store.close()


TestStore = StoreMachine.TestCase
