"""What every store below the pinned cache does: `StorageBackendSuite`."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Final

import numpy as np
import pytest

from kvrdma.backends import GetStatus, GetTransfer, PutStatus, PutTransfer, StorageBackend
from kvrdma.errors import ClosedError, KVRDMAError
from kvrdma.keys import KeyBatch, KeySpace, block_keys, pack_keys, unpack_keys
from kvrdma.layout import Checksums, Shard, checksum
from kvrdma.memory import Lease, Memory, PinnedPool, Spans

PATIENCE_S: Final = 30.0
SLOT_NBYTES: Final = 4096
SHARD: Final = Shard(0, 0, 32, 0, 8)
OTHER_SHARD: Final = Shard(0, 0, 32, 8, 16)


class Bench:
    """A backend with a registered pool of 64 slots of random bytes, and a key space that nobody else uses."""

    def __init__(self, backend: StorageBackend, pool: PinnedPool) -> None:
        self.backend = backend
        self.pool = pool
        self.keyspace = KeySpace(
            model="suite",
            weights=secrets.token_hex(16),
            config="0",
            kv_dtype="bfloat16",
            attention="suite",
            head_size=128,
            layers=32,
            block_tokens=16,
        )
        for memory in pool.memories:
            backend.register(memory)
        backend.use_keyspace(self.keyspace)
        rng = np.random.default_rng(0)
        for slot in range(pool.n_slots):
            pool.view(slot)[:] = rng.integers(0, 256, pool.slot_nbytes, dtype=np.uint8)

    def keys(self, n: int) -> KeyBatch:
        """n keys that were never used before."""
        return pack_keys([secrets.token_bytes(16) for _ in range(n)])

    def checksums(self, keys: KeyBatch, spans: Spans, shard: Shard = SHARD) -> Checksums:
        """The checksum of each block, as its owner makes it."""
        return np.array(
            [checksum(key, shard.encode(), spans.parts(i)) for i, key in enumerate(unpack_keys(keys))],
            dtype=np.uint64,
        )

    def put(
        self,
        keys: KeyBatch,
        spans: Spans,
        *,
        shard: Shard = SHARD,
        hold: Lease | None = None,
        checksums: Checksums | None = None,
    ) -> PutTransfer:
        """Put and wait."""
        given = self.checksums(keys, spans, shard) if checksums is None else checksums
        transfer = self.backend.put(keys, shard, spans, given, hold=hold, timeout=PATIENCE_S)
        transfer.result(PATIENCE_S)
        return transfer

    def get(self, keys: KeyBatch, spans: Spans, *, shard: Shard = SHARD, hold: Lease | None = None) -> GetTransfer:
        """Get and wait."""
        transfer = self.backend.get_into(keys, shard, spans, hold=hold, timeout=PATIENCE_S)
        transfer.result(PATIENCE_S)
        return transfer

    def content(self, spans: Spans, row: int) -> bytes:
        """One key's bytes."""
        return b"".join(part.tobytes() for part in spans.parts(row))


class StorageBackendSuite:
    """Tests that a backend inherits. `make_backend` is needed; every backend it makes is of one empty store.

    Stored blocks have 4,096 bytes, one test's 3 MiB; a store of 64 MiB is large enough for the whole suite.
    """

    needs_registration: ClassVar[bool] = True
    """Whether memory that was not registered cannot be used."""

    capacity: ClassVar[int | None] = None
    """How many bytes the store holds, where it is to be tested beyond them; twice as many are put."""

    def make_backend(self) -> StorageBackend:
        """Make a backend; the suite closes it."""
        raise NotImplementedError

    def make_memory(self, nbytes: int) -> Memory:
        """Make memory that is not a pool's; for backends that cannot use just any."""
        return Memory.of(bytearray(nbytes))

    @pytest.fixture
    def bench(self) -> Iterator[Bench]:
        """A backend and memory for it. When a test is over no lease may be held any longer."""
        with PinnedPool(SLOT_NBYTES, 64) as pool, self.make_backend() as backend:
            yield Bench(backend, pool)

    # -- bytes

    @pytest.mark.parametrize("n", [1, 7, 32])
    def test_what_was_put_is_got(self, bench: Bench, n: int) -> None:
        """Byte for byte, into other slots, with the checksums it was put with."""
        keys = bench.keys(n)
        source, target = bench.pool.spans(range(n)), bench.pool.spans(range(63, 63 - n, -1))
        checksums = bench.checksums(keys, source)
        put = bench.put(keys, source)
        assert put.ok.all()
        assert put.error is None
        assert put.status.tolist() == [PutStatus.STORED] * n
        got = bench.get(keys, target)
        assert got.ok.all()
        assert got.error is None
        assert got.status.tolist() == [GetStatus.OK] * n
        np.testing.assert_array_equal(got.checksums, checksums)
        for row in range(n):
            assert bench.content(target, row) == bench.content(source, row)

    def test_a_miss_is_in_its_place(self, bench: Bench) -> None:
        """A hole in the middle shifts nothing, and its target stays as it was."""
        keys = bench.keys(8)
        there = np.array([True, True, False, True, False, False, True, True])
        source, target = bench.pool.spans(range(8)), bench.pool.spans(range(32, 40))
        assert bench.put(keys[there], source.select(there)).ok.all()
        before = [bench.content(target, row) for row in range(8)]
        got = bench.get(keys, target)
        assert got.ok.tolist() == there.tolist()
        assert got.status.tolist() == [GetStatus.OK if here else GetStatus.MISSING for here in there]
        assert got.error is None
        for row in range(8):
            expected = bench.content(source, row) if there[row] else before[row]
            assert bench.content(target, row) == expected
        lookup = bench.backend.lookup(keys, [SHARD], timeout=PATIENCE_S)
        assert lookup.present.tolist() == there.tolist()
        assert lookup.run == 2
        assert not lookup.down

    def test_nothing_there(self, bench: Bench) -> None:
        """Every key a miss: a value, not an error."""
        keys = bench.keys(3)
        got = bench.get(keys, bench.pool.spans(range(3)))
        assert got.status.tolist() == [GetStatus.MISSING] * 3
        assert got.error is None
        assert bench.backend.lookup(keys, [SHARD], timeout=PATIENCE_S).run == 0

    def test_put_if_absent(self, bench: Bench) -> None:
        """What is there stays: EXISTS, and the first bytes are the ones that are got."""
        keys = bench.keys(4)
        first, second, target = (bench.pool.spans(range(i, i + 4)) for i in (0, 8, 16))
        some = np.array([True, False, True, False])
        assert bench.put(keys[some], first.select(some)).ok.all()
        again = bench.put(keys, second)
        assert again.status.tolist() == [PutStatus.EXISTS, PutStatus.STORED] * 2
        assert again.ok.all()
        assert bench.get(keys, target).ok.all()
        for row in range(4):
            assert bench.content(target, row) == bench.content(first if some[row] else second, row)

    def test_one_key_twice_in_a_batch(self, bench: Bench) -> None:
        """Stored at most once, and got in both places."""
        key = bench.keys(1)
        keys = np.concatenate([key, key])
        bench.pool.view(1)[:] = bench.pool.view(0)
        put = bench.put(keys, bench.pool.spans([0, 1]))
        assert put.status.tolist().count(PutStatus.STORED) == 1
        target = bench.pool.spans([8, 9])
        assert bench.get(keys, target).ok.all()
        assert bench.content(target, 0) == bench.content(target, 1) == bytes(bench.pool.view(0))

    def test_wrong_bytes_are_never_served(self, bench: Bench) -> None:
        """A block that is not what its checksum says is refused or found out, and a good one can take its place."""
        keys = bench.keys(3)
        source, target = bench.pool.spans(range(3)), bench.pool.spans(range(8, 11))
        checksums = bench.checksums(keys, source)
        wrong = checksums.copy()
        wrong[1] ^= 1
        bench.put(keys, source, checksums=wrong)
        got = bench.get(keys, target)
        assert got.ok.tolist() == [True, False, True]
        assert got.status[1] in {GetStatus.CHECKSUM, GetStatus.MISSING}
        assert bench.get(keys, target).ok.tolist() == [True, False, True]
        assert bench.put(keys, source).ok.all()
        assert bench.get(keys, target).ok.all()
        assert bench.content(target, 1) == bench.content(source, 1)

    def test_another_keys_bytes_are_wrong(self, bench: Bench) -> None:
        """A checksum is of a key and a shard too: good bytes under another name are not served."""
        keys = bench.keys(2)
        source, target = bench.pool.spans([0, 1]), bench.pool.spans([8, 9])
        bench.put(keys, source, checksums=bench.checksums(keys[::-1].copy(), source))
        assert not bench.get(keys, target).ok.any()

    # -- spans

    def test_several_spans_a_key_over_several_memories(self, bench: Bench) -> None:
        """An object is its spans in order, cut differently when it is put and when it is got."""
        memories = tuple(self.make_memory(1 << 16) for _ in range(3))
        arrays = [memory.array() for memory in memories]
        for memory in memories:
            bench.backend.register(memory)
        rng = np.random.default_rng(5)
        for array in arrays:
            array[:] = rng.integers(0, 256, len(array), dtype=np.uint8)

        def spans(rows: list[tuple[int, int, int, int]]) -> Spans:
            columns = np.array(rows, dtype=np.int64).T
            return Spans(memories, 3, *(np.ascontiguousarray(part) for part in columns))

        source = spans(
            [
                (0, 0, 100, 1000),
                (0, 1, 7, 3000),
                (0, 0, 50_000, 96),
                (1, 2, 0, 4096),
                (2, 1, 40_000, 4095),
                (2, 2, 60_000, 1),
            ]
        )
        target = spans(
            [(0, 2, 20_000, 4096), (1, 0, 9_000, 1), (1, 1, 20_000, 4095), (2, 0, 30_000, 2048), (2, 2, 9, 2048)]
        )
        keys = bench.keys(3)
        wanted = [bench.content(source, row) for row in range(3)]
        assert bench.put(keys, source).ok.all()
        assert bench.get(keys, target).ok.all()
        assert [bench.content(target, row) for row in range(3)] == wanted
        in_slots = bench.pool.spans([1, 2, 3])
        assert bench.get(keys, in_slots).ok.all()
        assert [bench.content(in_slots, row) for row in range(3)] == wanted

    def test_a_block_of_another_size_is_a_miss(self, bench: Bench) -> None:
        """Room for fewer or more bytes than are stored: not served, nothing written."""
        keys = bench.keys(2)
        assert bench.put(keys, bench.pool.spans([0, 1])).ok.all()
        before = bytes(bench.pool.view(8))
        got = bench.get(keys, bench.pool.spans([8, 9], 1000))
        assert not got.ok.any()
        assert bytes(bench.pool.view(8)) == before

    def test_large_blocks(self, bench: Bench) -> None:
        """3 MiB each, more than one message or piece holds."""
        with PinnedPool(3 << 20, 4) as pool:
            for memory in pool.memories:
                bench.backend.register(memory)
            rng = np.random.default_rng(1)
            for slot in range(2):
                pool.view(slot)[:] = rng.integers(0, 256, pool.slot_nbytes, dtype=np.uint8)
            keys = bench.keys(2)
            assert bench.put(keys, pool.spans([0, 1])).ok.all()
            assert bench.get(keys, pool.spans([3, 2])).ok.all()
            assert np.array_equal(pool.view(3), pool.view(0))
            assert np.array_equal(pool.view(2), pool.view(1))

    def test_an_empty_batch(self, bench: Bench) -> None:
        """No keys, no harm."""
        keys, spans = bench.keys(0), bench.pool.spans([])
        held = bench.pool.allocate(1)
        assert bench.put(keys, spans, hold=held).ok.shape == (0,)
        assert bench.get(keys, spans, hold=held).ok.shape == (0,)
        held.release()
        assert bench.pool.n_leases == 0
        assert bench.backend.lookup(keys, [SHARD], timeout=PATIENCE_S).run == 0
        assert bench.backend.delete(keys, timeout=PATIENCE_S) == 0
        assert bench.put(bench.keys(1), bench.pool.spans([0])).ok.all()

    # -- names

    def test_two_shards_of_one_key_are_apart(self, bench: Bench) -> None:
        """Each has bytes of its own; a lookup wants all the shards that it names."""
        keys = bench.keys(3)
        first, second, target = (bench.pool.spans(range(i, i + 3)) for i in (0, 8, 16))
        assert bench.put(keys, first, shard=SHARD).ok.all()
        assert not bench.get(keys, target, shard=OTHER_SHARD).ok.any()
        assert bench.put(keys[:2], bench.pool.spans([8, 9]), shard=OTHER_SHARD).ok.all()

        def run(*shards: Shard) -> int:
            return bench.backend.lookup(keys, shards, timeout=PATIENCE_S).run

        assert run(SHARD) == 3
        assert run(OTHER_SHARD) == 2
        assert run(SHARD, OTHER_SHARD) == run(OTHER_SHARD, SHARD) == 2
        assert bench.get(keys, target, shard=OTHER_SHARD).ok.tolist() == [True, True, False]
        assert bench.content(target, 0) == bench.content(second, 0)
        assert bench.get(keys, target, shard=SHARD).ok.all()
        assert bench.content(target, 0) == bench.content(first, 0)

    def test_delete_drops_every_shard(self, bench: Bench) -> None:
        """And says how many objects went; the keys beside them stay, and can be put again."""
        keys = bench.keys(4)
        spans, target = bench.pool.spans(range(4)), bench.pool.spans(range(8, 12))
        assert bench.put(keys, spans).ok.all()
        assert bench.put(keys, spans, shard=OTHER_SHARD).ok.all()
        assert bench.backend.delete(keys[1:3].copy(), timeout=PATIENCE_S) == 4
        assert bench.backend.delete(keys[1:3].copy(), timeout=PATIENCE_S) == 0
        for shard in (SHARD, OTHER_SHARD):
            assert bench.get(keys, target, shard=shard).ok.tolist() == [True, False, False, True]
        assert bench.put(keys, spans).status.tolist() == [
            PutStatus.EXISTS,
            PutStatus.STORED,
            PutStatus.STORED,
            PutStatus.EXISTS,
        ]

    def test_two_key_spaces_are_apart(self, bench: Bench) -> None:
        """The same tokens under other weights are other blocks, and a lookup says in what the spaces differ."""
        tokens = list(range(64))
        other = dataclasses.replace(bench.keyspace, weights=secrets.token_hex(16))
        spans = bench.pool.spans(range(4))
        mine, theirs = (pack_keys(block_keys(keyspace, tokens)) for keyspace in (bench.keyspace, other))
        assert bench.put(mine, spans).ok.all()
        bench.backend.use_keyspace(other)
        lookup = bench.backend.lookup(theirs, [SHARD], timeout=PATIENCE_S)
        assert not lookup.present.any()
        assert lookup.differs == ("weights",)
        assert not bench.get(theirs, bench.pool.spans(range(8, 12))).ok.any()
        assert bench.put(theirs, spans).ok.all()
        assert bench.backend.lookup(bench.keys(1), [SHARD], timeout=PATIENCE_S).differs == ()
        bench.backend.use_keyspace(bench.keyspace)
        assert bench.backend.lookup(mine, [SHARD], timeout=PATIENCE_S).run == 4

    def test_a_put_is_of_the_key_space_that_was_named_before_it(self, bench: Bench) -> None:
        """Not of one that is named while it is under way."""
        other = dataclasses.replace(bench.keyspace, weights=secrets.token_hex(16))
        puts = []
        for slot in range(16):
            keys, spans = bench.keys(1), bench.pool.spans([slot])
            checksums = bench.checksums(keys, spans)
            puts.append(bench.backend.put(keys, SHARD, spans, checksums, hold=None, timeout=PATIENCE_S))
        bench.backend.use_keyspace(other)
        assert all(put.result(PATIENCE_S).all() for put in puts)
        assert bench.backend.lookup(bench.keys(1), [SHARD], timeout=PATIENCE_S).differs == ("weights",)

    def test_before_a_key_space_is_named(self) -> None:
        """`KVRDMAError` or FAILED: whose blocks they are is not known."""
        with PinnedPool(SLOT_NBYTES, 4) as pool, self.make_backend() as backend:
            bench = Bench.__new__(Bench)
            bench.backend, bench.pool = backend, pool
            for memory in pool.memories:
                backend.register(memory)
            keys = bench.keys(2)
            with pytest.raises(KVRDMAError):
                backend.lookup(keys, [SHARD], timeout=PATIENCE_S)
            for call in (bench.put, bench.get):
                with contextlib.suppress(KVRDMAError), pool.allocate(2) as hold:
                    transfer = call(keys, pool.spans([0, 1]), hold=hold)
                    assert not transfer.ok.any()
                    assert transfer.error is not None
                assert pool.n_leases == 0

    # -- leases and ends

    def test_holds_are_let_go_exactly_once(self, bench: Bench) -> None:
        """Kept from the call until the transfer is terminal, gone when `result` returns."""
        keys = bench.keys(4)
        lease = bench.pool.allocate(4)
        source = bench.pool.spans(lease.slots)
        checksums = bench.checksums(keys, source)
        put = bench.backend.put(keys, SHARD, source, checksums, hold=lease, timeout=PATIENCE_S)
        lease.release()
        assert put.result(PATIENCE_S).all()
        assert bench.pool.n_leases == 0
        assert not lease.alive
        lease = bench.pool.allocate(4)
        got = bench.backend.get_into(keys, SHARD, bench.pool.spans(lease.slots), hold=lease, timeout=PATIENCE_S)
        lease.release()
        assert got.result(PATIENCE_S).all()
        assert bench.pool.n_leases == 0
        missing = bench.pool.allocate(1)
        bench.get(bench.keys(1), bench.pool.spans(missing.slots), hold=missing)
        missing.release()
        assert bench.pool.n_leases == 0

    def test_memory_is_left_alone_once_the_hold_has_ended(self, bench: Bench) -> None:
        """Where the last reference goes the slots are somebody else's, who writes to them at once."""
        n = 16
        source, target = bench.pool.spans(range(n)), bench.pool.spans(range(32, 32 + n))
        wanted = [bench.content(source, row) for row in range(n)]
        seen: list[list[bytes]] = []

        def reuse(spans: Spans, filler: int) -> None:
            seen.append([bench.content(spans, row) for row in range(n)])
            for row in range(n):
                for part in spans.parts(row):
                    part[:] = filler

        for _ in range(8):
            keys = bench.keys(n)
            for row in range(n):
                bench.pool.view(row)[:] = np.frombuffer(wanted[row], dtype=np.uint8)
            checksums = bench.checksums(keys, source)
            hold = Lease(np.arange(n), on_last=lambda: reuse(source, 0xAA))
            put = bench.backend.put(keys, SHARD, source, checksums, hold=hold, timeout=PATIENCE_S)
            hold.release()
            assert put.result(PATIENCE_S).all()
            seen.clear()
            hold = Lease(np.arange(32, 32 + n), on_last=lambda: reuse(target, 0xBB))
            got = bench.backend.get_into(keys, SHARD, target, hold=hold, timeout=PATIENCE_S)
            hold.release()
            assert got.result(PATIENCE_S).all(), "a put read its memory after its hold had ended"
            assert seen == [wanted], "a get's hold ended before the bytes were there"
            assert all(set(bench.content(target, row)) == {0xBB} for row in range(n))

    def test_no_byte_beside_its_spans_is_touched(self, bench: Bench) -> None:
        """A get writes to what it gives, a put to nothing; other slots, and what is not served, stay as they are."""
        rows, nbytes = np.arange(8), 1000
        keys = bench.keys(8)
        source, target = bench.pool.spans(range(8), nbytes), bench.pool.spans(range(20, 36, 2), nbytes)
        checksums = bench.checksums(keys, source)
        checksums[5] ^= 1  # it is not stored, or not served
        there = rows != 3

        def everything() -> list[bytes]:
            return [bytes(bench.pool.view(slot)) for slot in range(bench.pool.n_slots)]

        before = everything()
        bench.put(keys[there], source.select(there), checksums=checksums[there])
        bench.put(keys[:2], bench.pool.spans([40, 41], nbytes))  # there already
        bench.get(keys, bench.pool.spans(range(48, 56)))  # of another size
        assert everything() == before
        got = bench.get(keys, target)
        assert got.ok.tolist() == [True, True, True, False, True, False, True, True]
        expected = [bytearray(slot) for slot in before]
        after = everything()
        for row in rows.tolist():
            expected[20 + 2 * row][:nbytes] = before[row][:nbytes] if got.ok[row] else after[20 + 2 * row][:nbytes]
        assert after == expected
        assert after[26] == before[26], "the target of a miss was written"

    @pytest.mark.parametrize("timeout", [1e-9, 1e-4, 1e-2])
    def test_a_time_out_leaves_nothing_behind(self, bench: Bench, timeout: float) -> None:
        """However early it comes: transfers end, holds are let go, and the same keys can be put and got afterwards."""
        keys = bench.keys(8)
        source, target = bench.pool.spans(range(8)), bench.pool.spans(range(8, 16))
        checksums = bench.checksums(keys, source)
        for _ in range(10):
            for slots in (range(8), range(8, 16)):
                lease = bench.pool.lease(np.array(slots, dtype=np.int64))
                with contextlib.suppress(KVRDMAError):
                    if slots[0] == 0:
                        transfer: PutTransfer | GetTransfer = bench.backend.put(
                            keys, SHARD, source, checksums, hold=lease, timeout=timeout
                        )
                    else:
                        transfer = bench.backend.get_into(keys, SHARD, target, hold=lease, timeout=timeout)
                    transfer.result(PATIENCE_S)
                lease.release()
                assert not lease.alive, "a hold outlives its time-out"
            with contextlib.suppress(KVRDMAError):
                bench.backend.lookup(keys, [SHARD], timeout=timeout)
            with contextlib.suppress(KVRDMAError):
                bench.backend.stats(timeout=timeout)
        assert bench.pool.n_leases == 0
        deadline = time.monotonic() + PATIENCE_S

        def works(call: Callable[[], PutTransfer | GetTransfer]) -> bool:
            with contextlib.suppress(KVRDMAError):  # what was given up may have cost the connection
                return bool(call().ok.all())
            return False

        for call in (lambda: bench.put(keys, source), lambda: bench.get(keys, target)):
            while not works(call):
                assert time.monotonic() < deadline, "keys of a call that timed out are of no use any more"
        for row in range(8):
            assert bench.content(target, row) == bench.content(source, row)

    def test_a_full_store_says_what_it_does_not_store(self, bench: Bench) -> None:
        """It evicts, or declines; what it says it stored is there."""
        if self.capacity is None:
            pytest.skip(f"{type(self).__name__}: set `capacity` to run this")
        nbytes, n = 1 << 20, 8
        n_stored = 0
        with PinnedPool(nbytes, 2 * n) as pool:
            for memory in pool.memories:
                bench.backend.register(memory)
            rng = np.random.default_rng(2)
            for slot in range(n):
                pool.view(slot)[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
            source, target = pool.spans(range(n)), pool.spans(range(n, 2 * n))
            for _ in range(-(-2 * self.capacity // (n * nbytes))):
                keys = bench.keys(n)
                put = bench.put(keys, source)
                assert put.error is None
                stored = put.status == PutStatus.STORED
                assert (stored | (put.status == PutStatus.DECLINED)).all()
                found = bench.backend.lookup(keys, [SHARD], timeout=PATIENCE_S).present
                got = bench.get(keys, target)
                np.testing.assert_array_equal(found, stored)
                np.testing.assert_array_equal(got.ok, stored)
                assert all(
                    np.array_equal(pool.view(n + row), pool.view(row)) for row in np.flatnonzero(stored).tolist()
                )
                n_stored += int(stored.sum())
        assert n_stored

    def test_memory_that_was_never_registered(self, bench: Bench) -> None:
        """An error or FAILED, and the backend is of use afterwards."""
        if not self.needs_registration:
            pytest.skip(f"{type(self).__name__}: any memory of this process can be used")
        keys = bench.keys(2)
        assert bench.put(keys, bench.pool.spans([0, 1])).ok.all()
        with PinnedPool(SLOT_NBYTES, 4) as stranger:
            fresh = bench.keys(2)
            for call, names in ((bench.put, fresh), (bench.get, keys)):
                with contextlib.suppress(KVRDMAError), stranger.allocate(2) as hold:
                    transfer = call(names, stranger.spans(hold.slots), hold=hold)
                    assert not transfer.ok.any()
                    assert transfer.error is not None
                assert stranger.n_leases == 0
        assert bench.get(keys, bench.pool.spans([8, 9])).ok.all()

    def test_batches_that_do_not_fit_together(self, bench: Bench) -> None:
        """Keys, spans and checksums of different numbers are refused, and keep no lease."""
        keys, spans = bench.keys(3), bench.pool.spans(range(3))
        checksums = bench.checksums(keys, spans)
        few = bench.pool.spans(range(2))
        hold = bench.pool.allocate(1)
        calls: list[Callable[[], object]] = [
            lambda: bench.backend.put(keys, SHARD, few, checksums, hold=hold, timeout=PATIENCE_S),
            lambda: bench.backend.put(keys, SHARD, spans, checksums[:2], hold=hold, timeout=PATIENCE_S),
            lambda: bench.backend.get_into(keys, SHARD, few, hold=hold, timeout=PATIENCE_S),
            lambda: bench.backend.get_into(keys.ravel(), SHARD, spans, hold=hold, timeout=PATIENCE_S),
        ]
        for call in calls:
            with pytest.raises(KVRDMAError):
                call()
        hold.release()
        assert bench.pool.n_leases == 0

    def test_after_close(self, bench: Bench) -> None:
        """`ClosedError`, or a transfer that says so; nothing hangs and no lease is kept."""
        keys, spans = bench.keys(1), bench.pool.spans([0])
        assert bench.put(keys, spans).ok.all()
        bench.backend.close()
        bench.backend.close()
        with pytest.raises(ClosedError):
            bench.backend.lookup(keys, [SHARD], timeout=PATIENCE_S)
        with pytest.raises(ClosedError):
            bench.backend.delete(keys, timeout=PATIENCE_S)
        with pytest.raises(ClosedError):
            bench.backend.stats(timeout=PATIENCE_S)
        for call in (bench.put, bench.get):
            with contextlib.suppress(ClosedError), bench.pool.allocate(1) as hold:
                transfer = call(keys, spans, hold=hold)
                assert not transfer.ok.any()
                assert isinstance(transfer.error, ClosedError)
            assert bench.pool.n_leases == 0

    def test_close_while_others_are_at_it(self) -> None:
        """Every transfer is terminal, every lease let go, and no thread is left."""
        before = set(threading.enumerate())
        with PinnedPool(SLOT_NBYTES, 64) as pool:
            backend = self.make_backend()
            bench = Bench(backend, pool)
            started = threading.Barrier(4)
            wrong: list[BaseException] = []

            def work(number: int) -> None:
                spans = pool.spans(range(8 * number, 8 * number + 8))
                started.wait(PATIENCE_S)
                try:
                    while True:
                        lease = Lease(np.zeros(1, dtype=np.int64))
                        try:
                            if bench.put(bench.keys(8), spans, hold=lease).error is not None:
                                return
                        finally:
                            lease.release()
                            if lease.alive:
                                wrong.append(AssertionError("a lease is still held"))
                except KVRDMAError:
                    return
                except BaseException as error:
                    wrong.append(error)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            started.wait(PATIENCE_S)
            backend.close()
            for thread in threads:
                thread.join(PATIENCE_S)
            assert not any(thread.is_alive() for thread in threads)
            assert not wrong
        assert not set(threading.enumerate()) - before

    def test_many_threads(self, bench: Bench) -> None:
        """Puts and gets from several threads at once get in nobody's way."""
        wrong: list[str] = []

        def work(number: int) -> None:
            source = bench.pool.spans(range(8 * number, 8 * number + 4))
            target = bench.pool.spans(range(8 * number + 4, 8 * number + 8))
            for _ in range(10):
                keys = bench.keys(4)
                if not (bench.put(keys, source).ok.all() and bench.get(keys, target).ok.all()):
                    wrong.append("missing")
                elif any(bench.content(source, row) != bench.content(target, row) for row in range(4)):
                    wrong.append("other bytes")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not wrong
        assert not any(thread.is_alive() for thread in threads)

    def test_two_puts_of_one_key_at_once(self, bench: Bench) -> None:
        """One of them stores it, and its bytes are got; the other finds it there or is declined."""
        n = 8
        sources, target = [bench.pool.spans(range(i, i + n)) for i in (0, 16)], bench.pool.spans(range(32, 32 + n))
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)  # threads of one process change places between any two steps
        try:
            for _ in range(30):
                keys = bench.keys(n)
                puts = put_at_once(bench, keys, sources)
                assert bench.get(keys, target).ok.all()
                for row in range(n):
                    said = [PutStatus(put.status[row]) for put in puts]
                    assert said.count(PutStatus.STORED) == 1, said
                    winner = said.index(PutStatus.STORED)
                    assert said[1 - winner] in {PutStatus.EXISTS, PutStatus.DECLINED}
                    assert bench.content(target, row) == bench.content(sources[winner], row)
        finally:
            sys.setswitchinterval(interval)

    def test_stats_are_numbers_by_name(self, bench: Bench) -> None:
        """Whatever they are, there are some."""
        assert bench.put(bench.keys(2), bench.pool.spans([0, 1])).ok.all()
        stats = bench.backend.stats(timeout=PATIENCE_S)
        assert stats
        assert all(isinstance(name, str) for name in stats)


def put_at_once(bench: Bench, keys: KeyBatch, sources: list[Spans]) -> list[PutTransfer]:
    """Put the same keys from several threads that begin together."""
    checksums = [bench.checksums(keys, spans) for spans in sources]
    together = threading.Barrier(len(sources))

    def put(number: int) -> PutTransfer:
        together.wait(PATIENCE_S)
        return bench.put(keys, sources[number], checksums=checksums[number])

    with ThreadPoolExecutor(len(sources)) as threads:
        return list(threads.map(put, range(len(sources))))
