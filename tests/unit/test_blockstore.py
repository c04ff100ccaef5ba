"""`BlockStore`: what is there, what is pinned, what makes room; by examples and as a machine against a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrdma.backends import blockstore
from kvrdma.backends.blockstore import BlockStore, Entry, check_capacity, slab_size
from kvrdma.errors import CapacityError, ConfigError
from kvrdma.keys import KeySpace
from kvrdma.memory import MemfdSlabs
from kvrdma.policies.lru import LruPolicy

SLAB = 64 << 10
SMALL, LARGE, HUGE = 8 << 10, 24 << 10, 64 << 10  # eight, two, and one a slab
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
    return BlockStore(n_slabs * SLAB, LruPolicy, slab_nbytes=SLAB, source=MemfdSlabs(lock=False), key_nbytes=KEY_NBYTES)


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


def place(entry: Entry) -> tuple[int, int]:
    return id(entry.memory), entry.offset


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
        assert entry.view().nbytes == nbytes


def test_what_was_used_longest_ago_makes_room() -> None:
    with opened(1) as store:
        store_all(store, *range(8))
        store.unpin(entry for entry in store.pin(names(0, 1)) if entry)
        store_all(store, 8, 9)
        assert has(store, *range(10)) == [True, True, False, False] + [True] * 6
        assert store.stats()["evicted_blocks"] == 2


def test_evicted_blocks_are_remembered_and_only_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockstore, "REMEMBERED", 3)
    with opened(1) as store:
        store_all(store, *range(8))
        store_all(store, *range(8, 12))
        assert [store.was_evicted(name) for name in names(*range(5))] == [False, True, True, True, False]
        store_all(store, 1)  # it is back
        store.delete({name[:KEY_NBYTES] for name in names(6)})
        assert [store.was_evicted(name) for name in names(1, 2, 3, 4, 6)] == [False, True, True, True, False]


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
        slot = place(readers[0])
        readers[0].view()[:] = 33
        assert store.delete({name(3)[:KEY_NBYTES]}) == 1
        assert has(store, 3) == [False]
        for round_ in range(3):
            for entry in store_all(store, *range(20 * (round_ + 1), 20 * (round_ + 1) + 7)):
                assert place(entry) != slot
                entry.view()[:] = 44
        assert (readers[0].view() == 33).all()
        store.unpin(readers[:1])
        reserved = store.reserve(0, names(*range(90, 98)), [SMALL] * 8)
        assert reserved.pop() is None
        for entry in reserved:
            assert entry is not None
            store.give_up(entry)
        store.unpin(readers[1:])
        assert slot in [place(entry) for entry in store_all(store, *range(100, 108))]


def test_a_block_found_wrong_is_dropped_unless_it_is_another_one_by_now() -> None:
    with opened(1) as store:
        (old,) = store_all(store, 1)
        store.drop_wrong(old)
        assert has(store, 1) == [False]
        (new,) = store_all(store, 1)
        store.drop_wrong(old)
        assert has(store, 1) == [True]
        assert store.counts["dropped_wrong"] == 1
        (reserved,) = store.reserve(0, names(2), [SMALL])
        assert reserved is not None
        store.drop_wrong(reserved)  # nobody can have read it yet
        store.commit(reserved, 0)
        assert has(store, 2) == [True]
        (pinned,) = store.pin(names(1))
        assert pinned is new
        store.drop_wrong(new)
        store.drop_wrong(new)  # found by two readers
        store.unpin([new])


def test_delete_drops_every_shard_of_a_key() -> None:
    with opened(1) as store:
        blocks = [name(1, 0), name(1, 1), name(2, 0)]
        for entry in store.reserve(0, blocks, [SMALL] * 3):
            assert entry is not None
            store.commit(entry, 0)
        assert store.delete({name(1)[:KEY_NBYTES], name(9)[:KEY_NBYTES]}) == 2
        assert [store.has(block) for block in blocks] == [False, False, True]


def test_a_block_that_is_under_way_is_not_deleted() -> None:
    with opened(1) as store:
        (entry,) = store.reserve(0, names(1), [SMALL])
        assert entry is not None
        assert store.delete({name(1)[:KEY_NBYTES]}) == 0
        store.commit(entry, 0)
        assert has(store, 1) == [True]


def test_deleting_many_keys_and_few_comes_to_the_same() -> None:
    with opened(2) as store:
        for shard in range(4):
            entries = store.reserve(0, [name(key, shard) for key in range(4)], [SMALL] * 4)
            for entry in entries:
                assert entry is not None
                store.commit(entry, 0)
        assert store.delete({name(0)[:KEY_NBYTES]}) == 4  # by shards
        assert store.delete({name(key)[:KEY_NBYTES] for key in range(1, 9)}) == 12  # by blocks
        assert (store.stats()["blocks"], store.stats()["bytes"]) == (0, 0)


# -- slabs and size classes


def slabs_of(store: BlockStore) -> dict[int, int]:
    return {row["nbytes"]: row["slabs"] for row in store.stats()["by_size"]}


def put(store: BlockStore, number: int, nbytes: int) -> bool:
    """Store one block if it gets a slot."""
    (entry,) = store.reserve(0, names(number), [nbytes])
    if entry is not None:
        store.commit(entry, 0)
    return entry is not None


def test_each_size_has_slabs_of_its_own() -> None:
    with opened(3) as store:
        store_all(store, 1, nbytes=SMALL)
        store_all(store, 2, 3, 4, nbytes=LARGE)
        stats = store.stats()
        assert stats["by_size"] == [
            {"nbytes": SMALL, "slabs": 1, "blocks": 1, "pinned": 0},
            {"nbytes": LARGE, "slabs": 2, "blocks": 3, "pinned": 0},
        ]
        assert (stats["size_classes"], stats["slabs"], stats["free_slabs"]) == (2, 3, 0)
        assert (stats["blocks"], stats["bytes"]) == (4, SMALL + 3 * LARGE)


def test_a_size_without_a_slab_takes_the_coldest() -> None:
    with opened(2) as store:
        store_all(store, *range(16))
        store.unpin(entry for entry in store.pin(names(*range(8))) if entry)
        assert put(store, 20, LARGE)
        assert has(store, *range(16)) == [True] * 8 + [False] * 8
        assert slabs_of(store) == {SMALL: 1, LARGE: 1}
        stats = store.stats()
        assert (stats["moved_slabs"], stats["evicted_blocks"]) == (1, 8)


def test_a_size_that_filled_the_store_makes_way_for_one_that_is_used() -> None:
    with opened(8) as store:
        store_all(store, *range(64))
        for number in range(100, 130):
            assert put(store, number, LARGE)
        assert slabs_of(store)[LARGE] >= 7
        for number in range(200, 300):
            assert put(store, number, SMALL)
        assert slabs_of(store)[SMALL] >= 7


def test_a_size_that_is_used_keeps_its_slabs_though_another_streams_through() -> None:
    with opened(4) as store:
        store_all(store, *range(16))  # two slabs
        for number in range(100, 1000):
            assert put(store, number, LARGE)
            store.unpin(entry for entry in store.pin(names(*range(16))) if entry)
        assert has(store, *range(16)) == [True] * 16


def test_one_block_in_use_does_not_keep_a_cold_slab() -> None:
    with opened(3) as store:
        store_all(store, *range(24))
        for number in range(100, 200):
            assert put(store, number, LARGE)
            store.unpin(entry for entry in store.pin(names(0, 8, 16)) if entry)
        assert slabs_of(store)[LARGE] >= 2


@pytest.mark.parametrize("how", ["reserved", "pinned", "gone"])
def test_a_slab_with_one_block_that_is_held_stays(how: str) -> None:
    with opened(1) as store:
        store_all(store, *range(7))
        entries = store.reserve(0, names(7), [SMALL]) if how == "reserved" else store.pin(names(0))
        (held,) = [entry for entry in entries if entry]
        held.view()[:] = 77
        if how == "gone":
            store.delete({name(0)[:KEY_NBYTES]})
        before = store.stats()
        assert not put(store, 20, LARGE)
        assert store.stats() == before  # nothing was evicted in vain
        assert (held.view() == 77).all()
        store.give_up(held) if how == "reserved" else store.unpin([held])
        assert put(store, 20, LARGE)
        assert slabs_of(store) == {LARGE: 1}


def test_a_slab_is_taken_beside_one_that_is_held() -> None:
    with opened(2) as store:
        store_all(store, *range(16))
        held = [entry for entry in store.pin(names(0)) if entry]
        store.unpin(entry for entry in store.pin(names(*range(8, 16))) if entry)
        assert put(store, 20, LARGE)
        assert has(store, *range(16)) == [True] * 8 + [False] * 8  # the warmer one
        store.unpin(held)


def test_a_size_with_nothing_to_evict_takes_its_share_and_no_more() -> None:
    with opened(4) as store:
        store_all(store, *range(32))
        entries = [entry for entry in store.reserve(0, names(*range(40, 50)), [LARGE] * 10) if entry]
        assert len(entries) == 4
        assert slabs_of(store) == {SMALL: 2, LARGE: 2}
        for entry in entries:
            store.give_up(entry)
        assert slabs_of(store) == {SMALL: 2}


def test_a_flood_of_sizes_never_makes_more_classes_than_slabs() -> None:
    with opened(3) as store:
        store_all(store, *range(24))
        for number in range(500):
            assert put(store, 100 + number, 1 + 97 * number)
            assert store.stats()["size_classes"] <= 3
        for number in range(1000, 1072):  # and when it is over, what is used has the store again
            assert put(store, number, SMALL)
        assert slabs_of(store) == {SMALL: 3}
        store.delete({name(number)[:KEY_NBYTES] for number in range(1100)})
        assert (store.stats()["size_classes"], store.stats()["free_slabs"]) == (0, 3)


@pytest.mark.parametrize("n_slabs", [2, 3, 4, 7])
@pytest.mark.parametrize("ratio", [1, 3])
def test_two_sizes_in_a_steady_state_leave_each_other_their_slabs(n_slabs: int, ratio: int) -> None:
    small, large = 1 << 10, 2 << 10
    with opened(n_slabs) as store:
        for number in range(4000):
            if number == 2000:
                moved = store.stats()["moved_slabs"]
            assert put(store, number, large if number % (1 + ratio) == 0 else small)
        assert store.stats()["moved_slabs"] == moved
        assert set(slabs_of(store)) == {small, large}


def test_a_slab_without_a_block_goes_back_and_so_does_a_class_without_a_slab() -> None:
    with opened(2) as store:
        store_all(store, *range(9))
        store.delete({name(8)[:KEY_NBYTES]})
        assert (slabs_of(store), store.stats()["free_slabs"]) == ({SMALL: 1}, 1)
        store.delete({name(number)[:KEY_NBYTES] for number in range(8)})
        assert (slabs_of(store), store.stats()["free_slabs"]) == ({}, 2)
        store_all(store, *range(4), nbytes=LARGE)


def test_ending_a_pin_or_a_reservation_twice_is_refused() -> None:
    with opened(1) as store:
        (entry,) = store.reserve(0, names(1), [SMALL])
        assert entry is not None
        store.commit(entry, 0)
        for call in (lambda: store.commit(entry, 0), lambda: store.give_up(entry), lambda: store.unpin([entry])):
            with pytest.raises(AssertionError, match=r"twice|more often"):
                call()
        assert has(store, 1) == [True]


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
        store.delete({name(2)[:KEY_NBYTES]})
        assert store.nearest_filled(0) == ["model", "weights"]
        store_all(store, 3)
        assert store.nearest_filled(0) == []


def test_of_too_many_key_spaces_an_empty_one_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine makes a new one at each update of its weights: a server must not grow by that."""
    monkeypatch.setattr(blockstore, "MAX_KEYSPACES", 3)
    with opened(1) as store:
        first = store.open_keyspace(SPACE)
        store_all(store, 1, keyspace=first)
        numbers = [store.open_keyspace(replace(SPACE, epoch=f"{i:032x}")) for i in range(1, 10)]
        assert len({first, *numbers}) == 10
        assert store.stats()["keyspaces"] == 3
        assert store.open_keyspace(SPACE) == first
        assert store.nearest_filled(numbers[0]) == []  # forgotten
        assert store.nearest_filled(numbers[-1]) == ["epoch"]
        store_all(store, 2, keyspace=numbers[0])  # its blocks are found all the same
        assert has(store, 1, 2) == [True, True]


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
        self.entry.view()[:] = self.mark

    def whole(self) -> bool:
        return bool((self.entry.view() == self.mark).all())


SIZES = (SMALL, LARGE, HUGE)
numbers = st.lists(st.integers(0, 30), min_size=1, max_size=12)
# Of one size, which is pressure on one class, or of several in one call.
sizes = st.sampled_from(SIZES).map(lambda size: [size] * 12) | st.lists(
    st.sampled_from(SIZES), min_size=12, max_size=12
)
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
        self.given: dict[int, Entry] = {}  # by generation
        self.marks = 0
        self.stored = self.dropped = 0

    @rule(numbers=numbers, sizes=sizes, keyspace=st.integers(0, 1))
    def reserve(self, numbers: list[int], sizes: list[int], keyspace: int) -> None:
        wanted = names(*numbers)
        sizes = sizes[: len(wanted)]
        evicted = self.store.counts["evicted_blocks"]
        live_sizes = {block.entry.nbytes for block in self._live()}
        entries = self.store.reserve(keyspace, wanted, sizes)
        given: dict[int, list[bool]] = {}
        seen: set[bytes] = set()
        for block_name, size, entry in zip(wanted, sizes, entries, strict=True):
            if block_name in self.there or block_name in self.reserved or block_name in seen:
                assert entry is None
                continue
            seen.add(block_name)
            given.setdefault(size, []).append(entry is not None)
            if entry is not None:
                assert (entry.name, entry.nbytes) == (block_name, size)
                assert entry.generation not in self.given
                self.given[entry.generation] = entry
        gone = [block for block_name, block in self.there.items() if not self.store.has(block_name)]
        assert len(gone) == self.store.counts["evicted_blocks"] - evicted
        for block in gone:
            assert block.pins == 0
            block.there = False
            del self.there[block.entry.name]
        for entry in entries:
            if entry is not None:
                self.marks = (self.marks + 1) % 256
                self.reserved[entry.name] = Block(entry, self.marks, keyspace)
                self.reserved[entry.name].write()
        for size, flags in given.items():
            assert flags == sorted(flags, reverse=True)  # the leading ones
            if not all(flags):
                self._had_no_more_to_give(size, live_sizes | set(given))

    def _had_no_more_to_give(self, size: int, sizes: set[int]) -> None:
        """Nothing of that size could go, and it has its share or no slab could come.

        Its share was that among `sizes`, some of which may have lost their last slab later in the same batch.
        """
        held = {id(block.entry.memory) for block in [*self.reserved.values(), *self.readers]}
        live = self._live()
        assert not [b for b in self.there.values() if b.entry.nbytes == size and not b.pins]
        own = {id(block.entry.memory) for block in live if block.entry.nbytes == size}
        assert len(held) == self.n_slabs or len(own) >= max(1, self.n_slabs // len(sizes))

    @precondition(lambda self: self.reserved)
    @rule(pick=picks, stays=st.booleans())
    def end_reservation(self, pick: int, stays: bool) -> None:
        block = self.reserved.pop(list(self.reserved)[pick % len(self.reserved)])
        if stays:
            self.store.commit(block.entry, block.mark)
            block.there = True
            self.there[block.entry.name] = block
            self.stored += 1
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

    @rule()
    def unpin_all(self) -> None:
        while self.readers:
            self.unpin(0)

    @precondition(lambda self: self.readers)
    @rule(pick=picks)
    def drop_wrong(self, pick: int) -> None:
        block = self.readers[pick % len(self.readers)]
        self.store.drop_wrong(block.entry)
        self.dropped += block.there
        self._forget(block)

    @precondition(lambda self: self.given)
    @rule(pick=picks)
    def drop_what_may_be_gone(self, pick: int) -> None:
        entry = list(self.given.values())[pick % len(self.given)]
        self.store.drop_wrong(entry)
        for block in [b for b in self.there.values() if b.entry is entry]:
            self.dropped += 1
            self._forget(block)

    @rule(numbers=numbers)
    def delete(self, numbers: list[int]) -> None:
        doomed = [self.there[block_name] for block_name in set(names(*numbers)) & self.there.keys()]
        assert self.store.delete({block_name[:KEY_NBYTES] for block_name in names(*numbers)}) == len(doomed)
        for block in doomed:
            self._forget(block)

    def _forget(self, block: Block) -> None:
        if block.there:
            block.there = False
            del self.there[block.entry.name]

    def _live(self) -> list[Block]:
        return [*dict.fromkeys([*self.there.values(), *self.reserved.values(), *self.readers])]

    @invariant()
    def every_byte_has_one_owner_and_is_what_that_one_wrote(self) -> None:
        live = self._live()
        slabs = {id(memory): memory.nbytes for memory in self.store.reserve_of_slabs.slabs}
        ranges: dict[int, list[tuple[int, int]]] = {}
        for block in live:
            entry = block.entry
            ranges.setdefault(id(entry.memory), []).append((entry.offset, entry.offset + entry.nbytes))
        for slab, taken in ranges.items():
            taken.sort()
            assert taken[-1][1] <= slabs[slab]
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert all(block.whole() for block in live)

    @invariant()
    def what_is_there_is_what_the_model_says(self) -> None:
        assert {block_name for block_name in names(*range(31)) if self.store.has(block_name)} == self.there.keys()

    @invariant()
    def the_books_are_right(self) -> None:
        store, live = self.store, self._live()
        stats = store.stats()
        assert stats["blocks"] == len(self.there)
        assert stats["bytes"] == sum(block.entry.nbytes for block in self.there.values())
        assert stats["reserved_blocks"] == len(self.reserved)
        assert stats["pinned_blocks"] == sum(block.pins > 0 for block in self.there.values())
        assert store.counts["stored_blocks"] == self.stored
        assert store.counts["dropped_wrong"] == self.dropped
        assert stats["by_size"] == [
            {
                "nbytes": size,
                "slabs": len({id(block.entry.memory) for block in live if block.entry.nbytes == size}),
                "blocks": sum(block.entry.nbytes == size for block in self.there.values()),
                "pinned": sum(block.entry.nbytes == size and block.pins > 0 for block in self.there.values()),
            }
            for size in sorted({block.entry.nbytes for block in live})
        ]
        assert stats["size_classes"] == len(stats["by_size"]) <= self.n_slabs
        assert stats["free_slabs"] + sum(row["slabs"] for row in stats["by_size"]) == self.n_slabs
        for keyspace in range(2):
            here = any(block.keyspace == keyspace for block in self.there.values())
            there = any(block.keyspace != keyspace for block in self.there.values())
            assert store.nearest_filled(keyspace) == (["model"] if there and not here else [])

    def teardown(self) -> None:
        """Once nothing is held, any one size can have all there is."""
        if not hasattr(self, "store"):
            return
        self.unpin_all()
        while self.reserved:
            self.end_reservation(0, False)
        self.the_books_are_right()
        self.delete(list(range(31)))
        for size in SIZES:
            n = self.n_slabs * (SLAB // size)
            store_all(self.store, *range(100, 100 + n), nbytes=size)
            assert self.store.delete({name(number)[:KEY_NBYTES] for number in range(100, 100 + n)}) == n
        self.store.close()


TestStore = StoreMachine.TestCase
