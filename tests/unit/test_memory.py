"""Slabs, slots, leases, spans, and the copies between a device's blocks and slots."""

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrdma.errors import CapacityError, ClosedError, ConfigError, RegionError
from kvrdma.layout import BlockLayout, ByteRun
from kvrdma.memory import (
    CpuCopier,
    Lease,
    MemfdSlabs,
    Memory,
    PinnedPool,
    SlabReserve,
    SlotAllocator,
    Spans,
    available_memory_nbytes,
    read_slots,
)
from kvrdma.memory.slab import PAGE_NBYTES, SlabSource

HUGE = 1 << 60


def column(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# -- memory


def test_memory_of_a_buffer() -> None:
    raw = bytearray(b"hello")
    memory = Memory.of(raw)
    memory.array()[0] = ord("j")
    memory.view()[4] = ord("y")
    assert raw == b"jelly"
    assert memory.nbytes == 5
    array = np.zeros((3, 4), dtype=np.float32)
    assert Memory.of(array).nbytes == 48


def test_memory_keeps_its_buffer() -> None:
    memory = Memory.of(bytearray(b"x" * 1000))
    gc.collect()
    assert bytes(memory.view()) == b"x" * 1000


def test_memory_is_itself_only() -> None:
    raw = bytearray(8)
    one, two = Memory.of(raw), Memory.of(raw)
    assert one != two
    assert len({one, two}) == 2


def test_what_is_no_memory() -> None:
    for address, nbytes in ((0, 1), (1, 0), (-1, 1), (1, -1)):
        with pytest.raises(RegionError):
            Memory(address, nbytes)
    with pytest.raises(RegionError, match="read-only"):
        Memory.of(b"constant")
    with pytest.raises(RegionError):
        Memory.of(bytearray())


# -- slabs


def test_a_slab_is_whole_pages_and_shared_by_descriptor() -> None:
    source = MemfdSlabs()
    slab = source.allocate(PAGE_NBYTES + 1)
    assert slab.nbytes == 2 * PAGE_NBYTES
    assert slab.address % PAGE_NBYTES == 0
    assert not slab.array().any()
    slab.array()[:5] = list(b"hello")
    assert slab.fd is not None
    assert os.pread(slab.fd, 5, 0) == b"hello"
    assert not os.get_inheritable(slab.fd)
    for nbytes in (0, 4 * PAGE_NBYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(slab.fd, nbytes)  # sealed: whoever maps it cannot be hit by SIGBUS
    source.release(slab)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(slab.fd)


def test_more_than_the_host_has() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match="available"):
        MemfdSlabs().allocate(HUGE)
    with pytest.raises(CapacityError, match="available"):
        PinnedPool(1 << 20, HUGE >> 20)
    with pytest.raises(CapacityError, match="available"):
        SlabReserve(HUGE, 1 << 30)
    assert set(os.listdir("/proc/self/fd")) == before
    assert 0 < available_memory_nbytes() < HUGE


LOCKING = """
    import ctypes, logging, os, resource, sys
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
    from kvrdma.memory import MemfdSlabs
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT, LIMIT))
    if os.getuid() == 0:  # root may lock whatever the limit is
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    source = MemfdSlabs()
    slabs = [source.allocate(1 << 20) for _ in range(3)]
    assert all(slab.array()[::4096].sum() == 0 for slab in slabs)
    slabs[0].array()[:] = 1
    print("locked", source.locked_nbytes >> 20, "unlocked", source.unlocked_nbytes >> 20)
    for slab in slabs:
        source.release(slab)
"""


@pytest.mark.parametrize(("limit", "locked"), [(0, 0), (2 << 20, 2)])
def test_a_refused_page_lock_is_counted_and_warned_of_once(limit: int, locked: int) -> None:
    """The memory is there and of use all the same."""
    program = textwrap.dedent(LOCKING).replace("(LIMIT, LIMIT)", f"({limit}, {limit})")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1] == f"locked {locked} unlocked {3 - locked}"
    assert len(lines) == 2
    assert lines[0].startswith("WARNING pool memory is not page-locked")
    assert "ulimit -l" in lines[0]


def test_a_reserve_hands_out_whole_slabs() -> None:
    reserve = SlabReserve(3 * PAGE_NBYTES + 5, PAGE_NBYTES)
    assert reserve.available_nbytes() == 3 * PAGE_NBYTES
    slabs = [reserve.allocate(1) for _ in range(3)]
    assert {slab.address for slab in slabs} == {slab.address for slab in reserve.slabs}
    with pytest.raises(CapacityError):
        reserve.allocate(1)
    reserve.release(slabs[1])
    assert reserve.available_nbytes() == PAGE_NBYTES
    with pytest.raises(CapacityError):
        reserve.allocate(PAGE_NBYTES + 1)
    assert reserve.allocate(PAGE_NBYTES) is slabs[1]
    reserve.close()
    reserve.close()
    assert reserve.available_nbytes() == 0
    with pytest.raises(CapacityError):
        reserve.allocate(1)


def test_a_reserve_smaller_than_a_slab() -> None:
    with pytest.raises(CapacityError, match="less than one slab"):
        SlabReserve(PAGE_NBYTES - 1, PAGE_NBYTES)


class Scarce:
    """Gives two slabs of real memory, then none; says that it has plenty."""

    def __init__(self) -> None:
        self.inner = MemfdSlabs()
        self.out: list[Memory] = []

    def allocate(self, nbytes: int) -> Memory:
        if len(self.out) == 2:
            raise CapacityError("no more")
        self.out.append(self.inner.allocate(nbytes))
        return self.out[-1]

    def available_nbytes(self) -> int:
        return HUGE

    def release(self, memory: Memory) -> None:
        self.out.remove(memory)
        self.inner.release(memory)


def test_slabs_are_given_back_when_there_are_not_enough() -> None:
    """Of a pool, of its growth, and of a reserve."""
    source = Scarce()
    typed: SlabSource = source
    with pytest.raises(CapacityError, match="no more"):
        PinnedPool(PAGE_NBYTES, 3, source=typed, slab_nbytes=PAGE_NBYTES)
    assert source.out == []
    with pytest.raises(CapacityError, match="no more"):
        SlabReserve(3 * PAGE_NBYTES, PAGE_NBYTES, source=typed)
    assert source.out == []
    with PinnedPool(PAGE_NBYTES, 1, source=typed, slab_nbytes=PAGE_NBYTES) as pool:
        with pytest.raises(CapacityError, match="no more"):
            pool.grow(2)
        assert (pool.n_slots, pool.n_free, len(source.out)) == (1, 1, 1)
        assert len(pool.grow(1)) == 1
        assert (pool.n_slots, pool.n_free) == (2, 2)
    assert source.out == []


# -- slots


def test_slots_all_or_none() -> None:
    slots = SlotAllocator(4)
    first = slots.allocate(3)
    assert first == [0, 1, 2]
    with pytest.raises(CapacityError, match="2 slots asked for, 1 of 4"):
        slots.allocate(2)
    assert slots.n_free == 1
    assert slots.allocate(0) == []
    assert slots.allocate(1) == [3]
    slots.free([1])
    assert slots.generation(1) == 1
    assert slots.allocate(1) == [1]
    assert slots.generations([0, 1]).tolist() == [0, 1]


@pytest.mark.parametrize("freed", [[4, 5, 6, 7], [7, 6, 5, 4], [6, 4, 7, 5]])
def test_slots_freed_together_are_a_run_again(freed: list[int]) -> None:
    slots = SlotAllocator(8)
    slots.allocate(8)
    slots.free([0, 1])
    for slot in freed:
        slots.free([slot])
    assert slots.allocate(4) == [4, 5, 6, 7]


def test_a_slot_is_freed_once() -> None:
    slots = SlotAllocator(2)
    taken = slots.allocate(1)
    slots.free(taken)
    with pytest.raises(AssertionError, match="twice"):
        slots.free(taken)
    assert sorted(slots.allocate(2)) == [0, 1]


class SlotsMachine(RuleBasedStateMachine):
    """No slot is with two holders, and every one is free or held."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotAllocator(3)
        self.held: list[list[int]] = []
        self.frees: dict[int, int] = {}

    @rule(n=st.integers(0, 6))
    def allocate(self, n: int) -> None:
        if n > self.slots.n_free:
            with pytest.raises(CapacityError):
                self.slots.allocate(n)
        else:
            self.held.append(self.slots.allocate(n))
            assert len(self.held[-1]) == n

    @rule(which=st.integers(0, 20))
    def free(self, which: int) -> None:
        if self.held:
            gone = self.held.pop(which % len(self.held))
            self.slots.free(gone)
            for slot in gone:
                self.frees[slot] = self.frees.get(slot, 0) + 1

    @rule(n=st.integers(1, 3))
    def grow(self, n: int) -> None:
        if len(self.slots) < 20:
            self.slots.grow(n)

    @invariant()
    def adds_up(self) -> None:
        out = [slot for slots in self.held for slot in slots]
        assert len(set(out)) == len(out)
        assert len(out) + self.slots.n_free == len(self.slots)
        assert all(self.slots.generation(slot) == n for slot, n in self.frees.items())


TestSlots = SlotsMachine.TestCase
TestSlots.settings = settings(
    max_examples=2 * settings.default.max_examples // 5, stateful_step_count=30, deadline=None
)


# -- pool and leases


def small_pool(n_slots: int = 10, slot_nbytes: int = 1000) -> PinnedPool:
    """Four slots a slab."""
    return PinnedPool(slot_nbytes, n_slots, slab_nbytes=4096)


def test_slots_do_not_overlap_and_are_aligned() -> None:
    with small_pool() as pool:
        assert len(pool.memories) == 3
        for slot in range(10):
            pool.view(slot)[:] = slot
        addresses = sorted(pool.view(slot).ctypes.data for slot in range(10))
        assert all(address % 64 == 0 for address in addresses)
        assert all(pool.view(slot).tolist() == [slot] * 1000 for slot in range(10))


def test_spans_are_where_the_views_are() -> None:
    with small_pool() as pool:
        slots = [9, 0, 5, 3]
        spans = pool.spans(slots)
        assert spans.n_keys == 4
        for row, slot in enumerate(slots):
            memory = spans.memories[spans.memory_row[row]]
            assert memory.address + spans.offset[row] == pool.view(slot).ctypes.data
            (part,) = spans.parts(row)
            assert part.ctypes.data == pool.view(slot).ctypes.data
            assert part.nbytes == 1000
        assert pool.spans([1], 10).nbytes.tolist() == [10]
        assert pool.spans([]).total_nbytes == 0


def test_spans_stay_within_their_slots() -> None:
    """More bytes than a slot has would be the next slot's."""
    with small_pool() as pool:
        for slots, nbytes in (([0], 1001), ([0], 0), ([10], 1000), ([-1], 1000)):
            with pytest.raises(RegionError):
                pool.spans(slots, nbytes)


def test_a_lease_is_all_or_nothing() -> None:
    with small_pool() as pool:
        with pool.allocate(6) as lease:
            assert lease.slots.tolist() == [0, 1, 2, 3, 4, 5]
            with pytest.raises(CapacityError):
                pool.allocate(5)
            assert (pool.n_free, pool.n_leases) == (4, 1)
        assert not lease.alive
        assert (pool.n_free, pool.n_leases) == (10, 0)
        with pool.allocate(1) as again:
            assert again.generations is not None
            assert again.generations.tolist() == [1]


def test_a_lease_lasts_until_its_last_holder_lets_go() -> None:
    with small_pool() as pool:
        lease = pool.allocate(2)
        lease.retain().retain()
        lease.release()
        lease.release()
        assert lease.alive
        assert pool.n_free == 8
        lease.release()
        assert pool.n_free == 10
        for call in (lease.release, lease.retain):
            with pytest.raises(ClosedError):
                call()
        assert (pool.n_free, pool.n_leases) == (10, 0)


def test_a_lease_is_released_once_by_many_threads() -> None:
    ends: list[int] = []
    lease = Lease(column(0), on_last=lambda: ends.append(1))
    n = 2000
    for _ in range(4 * n):
        lease.retain()
    threads = [threading.Thread(target=lambda: [lease.release() for _ in range(n)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == []
    lease.release()
    assert ends == [1]


def test_leases_on_numbers_of_somebody_elses() -> None:
    with small_pool() as pool:
        shared = pool.lease([1, 2])
        with pool.lease([2, 3]), pytest.raises(RegionError, match="still held"):
            pool.lease([3], exclusive=True)
        with pool.lease([3], exclusive=True):
            assert pool.n_leases == 2
        with pytest.raises(RegionError):
            pool.lease([0, 2], exclusive=True)
        with pool.lease([0], exclusive=True):
            pass
        shared.release()
        for slots in ([10], [-1], [0, 10]):
            with pytest.raises(RegionError, match="slots must lie in"):
                pool.lease(slots)
        assert pool.n_leases == 0
        pool.lease([]).release()


def test_a_lease_keeps_its_own_numbers() -> None:
    """Whatever its maker does with the array afterwards."""
    with small_pool() as pool:
        numbers = column(1, 2)
        lease = pool.lease(numbers, exclusive=True)
        numbers[:] = 5
        with pytest.raises(RegionError):
            pool.lease([1], exclusive=True)
        lease.release()
        for slot in range(10):
            pool.lease([slot], exclusive=True).release()


def test_a_pool_is_not_closed_under_a_lease() -> None:
    pool = small_pool()
    lease = pool.allocate(1)
    with pytest.raises(CapacityError, match="1 leases"):
        pool.close()
    pool.view(0)[:] = 1
    lease.release()
    pool.close()
    pool.close()
    for call in (lambda: pool.allocate(1), lambda: pool.lease([0])):
        with pytest.raises(ClosedError):
            call()


def test_a_pool_gives_its_descriptors_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with small_pool():
            assert set(os.listdir("/proc/self/fd")) > before
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_pool_grows_in_whole_slabs() -> None:
    with PinnedPool(1000, slab_nbytes=4096) as pool:
        assert (pool.n_slots, pool.memories) == (0, ())
        assert len(pool.grow(8)) == 2
        pool.view(7)[:] = 7
        assert len(pool.grow(1)) == 1
        with pytest.raises(CapacityError, match="not a whole one"):
            pool.grow(1)
        assert pool.view(7).tolist() == [7] * 1000
        assert pool.allocate(9).slots.tolist() == list(range(9))
        assert pool.n_free == 0
        pool.lease([8]).release()
        pool._n_leases = 0  # the nine are never given back


class Together:
    """Real slabs, given out only when two ask at the same time, where that can be."""

    def __init__(self) -> None:
        self.inner = MemfdSlabs()
        self.two = threading.Barrier(2)
        self.out = 0

    def allocate(self, nbytes: int) -> Memory:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.two.wait(0.2)
        self.out += 1
        return self.inner.allocate(nbytes)

    def available_nbytes(self) -> int:
        return self.inner.available_nbytes()

    def release(self, memory: Memory) -> None:
        self.out -= 1
        self.inner.release(memory)


def test_a_pool_grown_by_two_threads() -> None:
    """One after the other: a slab that is not whole in the middle would shift every slot behind it."""
    with PinnedPool(1000, source=Together(), slab_nbytes=4096) as pool:

        def grow() -> None:
            with contextlib.suppress(CapacityError):
                pool.grow(1)

        threads = [threading.Thread(target=grow) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (pool.n_slots, len(pool.memories)) == (1, 1)


def test_a_closed_pool_does_not_grow() -> None:
    source = Together()
    pool = PinnedPool(1000, source=source, slab_nbytes=4096)
    pool.close()
    with pytest.raises(ClosedError):
        pool.grow(1)
    assert source.out == 0


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_slot_holds_something(nbytes: int) -> None:
    with pytest.raises(CapacityError):
        PinnedPool(nbytes, 1)


# -- spans


def test_spans_of_several_ranges_a_key() -> None:
    memories = (Memory.of(bytearray(range(100))), Memory.of(bytearray(range(100, 200))))
    spans = Spans(memories, 3, column(0, 0, 2), column(1, 0, 1), column(5, 10, 0), column(2, 3, 1))
    assert [bytes(b"".join(p.tobytes() for p in spans.parts(row))) for row in range(3)] == [
        bytes([105, 106, 10, 11, 12]),
        b"",
        bytes([100]),
    ]
    assert spans.key_nbytes().tolist() == [5, 0, 1]
    assert spans.total_nbytes == 6
    kept = spans.select(np.array([False, True, True]))
    assert (kept.n_keys, kept.key_row.tolist(), kept.offset.tolist()) == (2, [1], [0])
    assert spans.select(np.zeros(3, dtype=np.bool_)).n_keys == 0


BIG = (1 << 63) - 1


@pytest.mark.parametrize(
    ("key_row", "memory_row", "offset", "nbytes"),
    [
        ((0,), (0,), (91,), (10,)),
        ((0,), (0,), (-1,), (1,)),
        ((0,), (0,), (0,), (0,)),
        ((0,), (0,), (0,), (-5,)),
        ((0,), (0,), (0,), (BIG,)),
        ((0,), (0,), (BIG,), (1,)),
        ((0,), (0,), (BIG,), (BIG,)),
        ((0,), (0,), (-BIG,), (BIG,)),
        ((0,), (1,), (0,), (1,)),
        ((0,), (-1,), (0,), (1,)),
        ((2,), (0,), (0,), (1,)),
        ((-1,), (0,), (0,), (1,)),
        ((1, 0), (0, 0), (0, 0), (1, 1)),
        ((0, 1), (0,), (0,), (1,)),
    ],
)
def test_spans_outside_are_refused(
    key_row: tuple[int, ...], memory_row: tuple[int, ...], offset: tuple[int, ...], nbytes: tuple[int, ...]
) -> None:
    with pytest.raises(RegionError):
        Spans((Memory.of(bytearray(100)),), 2, column(*key_row), column(*memory_row), column(*offset), column(*nbytes))


def test_spans_of_another_type_are_refused() -> None:
    with pytest.raises(RegionError, match="int64"):
        Spans((Memory.of(bytearray(100)),), 1, *[np.zeros(1, dtype=np.int32)] * 4)


# -- copies


class Blocks:
    """Device blocks as an engine lays them out: for each layer K and V, blocks with gaps between them."""

    def __init__(self, n_blocks: int, sizes: list[tuple[int, int]]) -> None:
        self.arrays = [np.zeros((n_blocks, stride), dtype=np.uint8) for _, stride in sizes]
        self.sizes = sizes
        rng = np.random.default_rng(3)
        for array in self.arrays:
            array[:] = rng.integers(0, 256, array.shape, dtype=np.uint8)
        self.layout = BlockLayout(
            n_blocks,
            tuple(
                ByteRun(f"layer {i}", array.ctypes.data, stride, size)
                for i, (array, (size, stride)) in enumerate(zip(self.arrays, sizes, strict=True))
            ),
            keepalive=self.arrays,
        )

    def block(self, number: int) -> np.ndarray:
        """One block's bytes, run after run."""
        return np.concatenate([array[number, :size] for array, (size, _) in zip(self.arrays, self.sizes, strict=True)])


SIZES = [(48, 48), (48, 64), (7, 300)]
N_BLOCKS, N_SLOTS = 40, 30


def pairs(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    n = int(rng.integers(1, N_SLOTS))
    if kind == "random":
        return rng.permutation(N_BLOCKS)[:n], rng.permutation(N_SLOTS)[:n]
    if kind == "runs":
        return np.arange(5, 5 + n), np.arange(N_SLOTS - n, N_SLOTS)
    return np.arange(n)[::-1].copy(), np.arange(n)


@pytest.mark.parametrize("kind", ["random", "runs", "reversed", "empty", "one"])
@pytest.mark.parametrize("seed", range(5))
def test_gather_and_scatter_against_a_loop(kind: str, seed: int) -> None:
    """Over several slabs; what was not named stays as it was, gaps between blocks included."""
    rng = np.random.default_rng(seed)
    if kind == "empty":
        blocks, slots = column(), column()
    elif kind == "one":
        blocks, slots = column(39), column(29)
    else:
        blocks, slots = pairs(kind, rng)
    blocks, slots = blocks.astype(np.int64), slots.astype(np.int64)
    device = Blocks(N_BLOCKS, SIZES)
    with PinnedPool(sum(size for size, _ in SIZES), N_SLOTS, slab_nbytes=128 * 7) as pool:
        assert len(pool.memories) == 5
        for slot in range(N_SLOTS):
            pool.view(slot)[:] = rng.integers(0, 256, pool.slot_nbytes, dtype=np.uint8)
        copier = CpuCopier()
        copier.register(device.layout, pool)
        expected = [pool.view(slot).copy() for slot in range(N_SLOTS)]
        for block, slot in zip(blocks, slots, strict=True):
            expected[slot] = device.block(block)
        copy = copier.gather(0, blocks, slots, after=copier.fence())
        copy.wait()
        assert copy.done()
        assert copy.nbytes == len(blocks) * pool.slot_nbytes
        for slot in range(N_SLOTS):
            np.testing.assert_array_equal(pool.view(slot), expected[slot])

        wanted = [array.copy() for array in device.arrays]
        targets = rng.permutation(N_BLOCKS)[: len(slots)].astype(np.int64)
        for block, slot in zip(targets, slots, strict=True):
            offset = 0
            for array, (size, _) in zip(wanted, SIZES, strict=True):
                array[block, :size] = pool.view(slot)[offset : offset + size]
                offset += size
        copier.scatter(0, targets, slots, after=copier.fence()).wait()
        for array, right in zip(device.arrays, wanted, strict=True):
            np.testing.assert_array_equal(array, right)
        copier.close()


@settings(
    max_examples=3 * settings.default.max_examples // 5, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.data())
def test_gather_then_scatter_gives_the_block_back(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    blocks = np.array(data.draw(st.permutations(range(12)))[:n], dtype=np.int64)
    slots = np.array(data.draw(st.permutations(range(12)))[:n], dtype=np.int64)
    device = Blocks(12, SIZES)
    before = [array.copy() for array in device.arrays]
    with PinnedPool(sum(size for size, _ in SIZES), 12, slab_nbytes=128 * 5) as pool:
        copier = CpuCopier()
        copier.register(device.layout, pool)
        copier.gather(0, blocks, slots, after=copier.fence()).wait()
        for array, (size, _) in zip(device.arrays, SIZES, strict=True):
            array[blocks, :size] = 0
        copier.scatter(0, blocks, slots, after=copier.fence()).wait()
        for array, right in zip(device.arrays, before, strict=True):
            np.testing.assert_array_equal(array, right)
        copier.close()


def test_groups_have_pools_of_their_own() -> None:
    one, two = Blocks(4, [(64, 64)]), Blocks(4, [(32, 40)])
    with PinnedPool(64, 4) as first, PinnedPool(32, 4) as second:
        copier = CpuCopier()
        copier.register(one.layout, first)
        copier.register(two.layout, second)
        copier.gather(1, column(2), column(3), after=copier.fence()).wait()
        np.testing.assert_array_equal(second.view(3), two.block(2))
        assert not first.view(3).any()
        copier.close()


def test_layouts_that_do_not_fit() -> None:
    device = Blocks(4, [(64, 64)])
    elsewhere = BlockLayout(4, device.layout.runs, device="cuda:0")
    with PinnedPool(64, 4) as right, PinnedPool(65, 4) as wrong:
        with pytest.raises(ConfigError, match="64 bytes, a slot 65"):
            CpuCopier().register(device.layout, wrong)
        with pytest.raises(ConfigError, match="cuda:0"):
            CpuCopier().register(elsewhere, right)


def test_as_many_blocks_as_slots() -> None:
    """Columns of different lengths would pair what does not belong together."""
    device = Blocks(8, [(64, 64)])
    with PinnedPool(64, 8) as pool:
        copier = CpuCopier()
        copier.register(device.layout, pool)
        for blocks, slots in (
            (column(0, 1), column(0, 1, 2, 3, 4)),
            (column(0, 1, 2), column(5)),
            (column(), column(1)),
        ):
            with pytest.raises(RegionError):
                copier.gather(0, blocks, slots, after=copier.fence())
        assert not any(pool.view(slot).any() for slot in range(8))
        copier.close()


@pytest.mark.parametrize("slots", [[], [3], [0, 1, 2, 3, 4, 5], [9, 2, 3, 4, 1, 0, 7, 8], [3, 3, 4], [4, 3, 2]])
def test_slots_are_read_in_the_order_asked_for(slots: list[int]) -> None:
    with small_pool() as pool:
        assert len(pool.rows()) > 1
        for slot in range(pool.n_slots):
            pool.view(slot)[:] = slot + 1
        target = np.zeros((len(slots) + 1, pool.slot_nbytes), dtype=np.uint8)
        read_slots(pool.rows(), column(*slots), target[:-1])
        assert (target == np.array([*(slot + 1 for slot in slots), 0])[:, None]).all()
