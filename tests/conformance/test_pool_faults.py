"""The pool, client and server, over a transport with faults: a miss or a failure, counted, and never a wrong block."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import ClassVar

import numpy as np
import pytest

from kvrdma.backends import GetStatus, PutStatus, StorageBackend, open_backend
from kvrdma.errors import CapacityError, DeadlineError
from kvrdma.keys import KeySpace
from kvrdma.manager import KVCacheManager
from kvrdma.memory import PinnedPool
from kvrdma.metrics import Reason
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.settings import Settings
from kvrdma.testing.backends import PATIENCE_S, SHARD, SLOT_NBYTES, Bench, StorageBackendSuite
from kvrdma.transports import TransferBatch, transports
from kvrdma.transports.faulty import Fault, FaultKind, FaultPlan, FaultyTransport

CORRUPT = Fault(FaultKind.CORRUPT)
DROP = Fault(FaultKind.DROP)


@contextlib.contextmanager
def faulty_pool(
    at_client: FaultPlan | None = None,
    at_server: FaultPlan | None = None,
    *,
    lease_s: float = 30.0,
    capacity: int = 64 << 20,
) -> Iterator[tuple[PoolServer, str]]:
    """A pool server in this process, and the URL of it for clients; either end has the faults of its plan."""
    before = dict(transports._loaded)
    started: Future[PoolServer] = Future()
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = PoolServer(ServerSettings(port=0, capacity=capacity, transports=("faulty",), lease_s=lease_s))
        await server.start()
        started.set_result(server)
        await server.serve_until(stop)

    transports.add("faulty", FaultyTransport.with_plan(at_server or FaultPlan.none()))
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        host, port = started.result(PATIENCE_S).address
        transports.add("faulty", FaultyTransport.with_plan(at_client or FaultPlan.none()))
        yield started.result(), f"kvrdma://{host}:{port}?transports=faulty"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(PATIENCE_S)
        loop.close()
        transports._loaded = before


@contextlib.contextmanager
def bench_at(url: str) -> Iterator[Bench]:
    with PinnedPool(SLOT_NBYTES, 64) as pool, open_backend(url, Settings()) as backend:
        yield Bench(backend, pool)


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def count(bench: Bench, name: str) -> int:
    """A counter of the server's, which is not there before it counts, or a gauge, which is."""
    stats = bench.backend.stats(timeout=PATIENCE_S)
    return int(stats[name] if name in {"pinned_blocks", "reserved_blocks"} else stats.get(name, 0))


class TestPoolWithoutFaults(StorageBackendSuite):
    """The suite, over the wrapper at both ends."""

    capacity: ClassVar[int | None] = 64 << 20

    def plans(self) -> tuple[FaultPlan, FaultPlan]:
        return FaultPlan.none(), FaultPlan.none()

    @pytest.fixture(autouse=True)
    def _at(self) -> Iterator[None]:
        with faulty_pool(*self.plans()) as (_, self.url):
            yield

    def make_backend(self) -> StorageBackend:
        return open_backend(self.url, Settings())


class TestPoolThatIsSlowAndOutOfOrder(TestPoolWithoutFaults):
    """Nothing is lost, so nothing may be missing."""

    def plans(self) -> tuple[FaultPlan, FaultPlan]:
        shares = {Fault(FaultKind.DELAY, seconds=0.002): 0.5, Fault(FaultKind.REORDER, seconds=0.002): 0.5}
        return FaultPlan.seeded(1, shares), FaultPlan.seeded(2, shares)


# -- flipped bytes


def test_a_byte_that_flips_on_its_way_to_the_client() -> None:
    """A CHECKSUM miss, told to the server, which drops that generation; the others are served, and it is put again."""
    plan = FaultPlan.script(Fault(FaultKind.CORRUPT, byte=2 * SLOT_NBYTES + 100))
    with faulty_pool(at_client=plan) as (_, url), bench_at(url) as bench:
        keys, source, target = bench.keys(4), bench.pool.spans(range(4)), bench.pool.spans(range(8, 12))
        assert bench.put(keys, source).ok.all()
        got = bench.get(keys, target)
        assert got.status.tolist() == [GetStatus.OK, GetStatus.OK, GetStatus.CHECKSUM, GetStatus.OK]
        assert got.ok.tolist() == [True, True, False, True]
        assert plan.counts == {FaultKind.CORRUPT: 1}
        eventually(lambda: count(bench, "dropped_wrong") == 1)
        assert bench.get(keys, target).status[2] == GetStatus.MISSING
        assert bench.put(keys, source).status.tolist().count(PutStatus.STORED) == 1
        assert bench.get(keys, target).ok.all()
        assert all(bench.content(target, row) == bench.content(source, row) for row in range(4))
        assert count(bench, "pinned_blocks") == 0


def test_a_byte_that_flips_on_its_way_to_the_server() -> None:
    """The server reads it, finds it wrong and commits nothing of it; the put says so, and the next one stores it."""
    plan = FaultPlan.script(Fault(FaultKind.CORRUPT, byte=SLOT_NBYTES))
    with faulty_pool(at_server=plan) as (_, url), bench_at(url) as bench:
        keys, source, target = bench.keys(3), bench.pool.spans(range(3)), bench.pool.spans(range(8, 11))
        put = bench.put(keys, source)
        assert put.status.tolist() == [PutStatus.STORED, PutStatus.FAILED, PutStatus.STORED]
        assert "1 of 3 blocks could not be read, or arrived altered" in str(put.error)
        assert plan.counts == {FaultKind.CORRUPT: 1}
        assert count(bench, "put_checksum_failures") == 1
        assert bench.get(keys, target).status.tolist() == [GetStatus.OK, GetStatus.MISSING, GetStatus.OK]
        assert bench.put(keys, source).status.tolist() == [PutStatus.EXISTS, PutStatus.STORED, PutStatus.EXISTS]
        assert bench.get(keys, target).ok.all()
        assert bench.content(target, 1) == bench.content(source, 1)
        assert count(bench, "reserved_blocks") == 0


@pytest.mark.parametrize("seed", range(3))
def test_many_flipped_bytes_are_never_served(seed: int) -> None:
    """Whatever flips at either end: what is served is what was put."""
    plans = [FaultPlan.seeded(seed, {Fault(FaultKind.CORRUPT, byte=byte): 0.1 for byte in range(4)}) for _ in range(2)]
    with faulty_pool(*plans) as (_, url), bench_at(url) as bench:
        keys, source = bench.keys(8), bench.pool.spans(range(8))
        wanted = [bench.content(source, row) for row in range(8)]
        target = bench.pool.spans(range(32, 40))
        served = 0
        for _ in range(40):
            bench.put(keys, source)
            for row in range(8):
                bench.pool.view(32 + row)[:] = 0
            got = bench.get(keys, target)
            for row in np.flatnonzero(got.ok):
                assert bench.content(target, int(row)) == wanted[row]
                served += 1
        assert served > 100
        assert min(plan.counts[FaultKind.CORRUPT] for plan in plans) > 0


def test_the_cache_counts_a_flipped_byte_as_its_own_kind_of_miss() -> None:
    """The manager promises only what is before the hole, and says why."""
    plan = FaultPlan.script(Fault(FaultKind.CORRUPT, byte=2 * SLOT_NBYTES))
    space = KeySpace(
        model="m", weights="w", config="c", kv_dtype="bfloat16", attention="a", head_size=64, layers=2, block_tokens=4
    )
    tokens = list(range(16))
    with faulty_pool(at_client=plan) as (_, url):
        settings = Settings(l1_bytes=64 * SLOT_NBYTES, l2=url)
        with KVCacheManager(space, SLOT_NBYTES, settings) as writer:
            with writer.reserve(tokens) as reservation:
                for row, view in enumerate(reservation.views):
                    view[:] = row + 1
                assert reservation.commit()
            assert writer.flush()
        with KVCacheManager(space, SLOT_NBYTES, settings) as reader:
            with reader.acquire(tokens, timeout=PATIENCE_S) as hit:
                assert [int(view[0]) for view in hit.views] == [1, 2]
            assert reader.misses(Reason.CHECKSUM) == 1


# -- late, lost, reset


def test_memory_is_not_used_again_before_a_late_read_is_terminal() -> None:
    """The bytes land after the time-out: until then the slots are nobody else's."""
    plan = FaultPlan.script(Fault(FaultKind.LATE))
    with faulty_pool(at_client=plan) as (_, url), bench_at(url) as bench:
        keys, source = bench.keys(4), bench.pool.spans(range(4))
        assert bench.put(keys, source).ok.all()
        wanted = [bench.content(source, row) for row in range(4)]
        lease = bench.pool.allocate(64)
        target = bench.pool.spans(lease.slots[8:12])
        got = bench.backend.get_into(keys, SHARD, target, hold=lease, timeout=1.0)
        lease.release()
        with pytest.raises(DeadlineError):
            got.result(0.5)
        with pytest.raises(CapacityError):
            bench.pool.allocate(1)
        got.result(PATIENCE_S)
        bench.pool.allocate(64).release()
        assert isinstance(got.error, DeadlineError)
        for row in np.flatnonzero(got.ok):
            assert bench.content(target, int(row)) == wanted[row]
        assert got.ok.all() or set(got.status[~got.ok]) == {GetStatus.FAILED}
        assert plan.counts == {FaultKind.LATE: 1}
        assert bench.get(keys, target).ok.all()


def test_a_read_that_never_ends_is_ended() -> None:
    """After the second time-out the endpoint is aborted: the slots come back, and the next call connects anew."""
    with faulty_pool(at_client=FaultPlan.script(DROP)) as (server, url), bench_at(url) as bench:
        keys, source = bench.keys(4), bench.pool.spans(range(4))
        assert bench.put(keys, source).ok.all()
        lease = bench.pool.allocate(64)
        target = bench.pool.spans(lease.slots[8:12])
        got = bench.backend.get_into(keys, SHARD, target, hold=lease, timeout=0.5)
        lease.release()
        with pytest.raises(DeadlineError):
            got.result(0.6)
        assert bench.pool.n_leases == 1
        assert not got.result(PATIENCE_S).any()
        assert got.status.tolist() == [GetStatus.FAILED] * 4
        assert isinstance(got.error, DeadlineError)
        assert bench.pool.n_leases == 0
        again = bench.get(keys, target)
        assert again.ok.all()
        assert bench.content(target, 3) == bench.content(source, 3)
        eventually(lambda: count(bench, "pinned_blocks") == 0)
        eventually(lambda: len(server._sessions) == 1)


def test_a_put_that_the_server_never_ends_is_ended() -> None:
    """The server aborts after its second time-out; neither end keeps a slot, and the next put stores them."""
    with faulty_pool(at_server=FaultPlan.script(DROP)) as (_, url), bench_at(url) as bench:
        lease = bench.pool.allocate(4)
        keys, source = bench.keys(4), bench.pool.spans(lease.slots)
        checksums = bench.checksums(keys, source)
        put = bench.backend.put(keys, SHARD, source, checksums, hold=lease, timeout=0.5)
        lease.release()
        with pytest.raises(DeadlineError):
            put.result(0.6)
        assert bench.pool.n_leases == 1
        assert not put.result(PATIENCE_S).any()
        assert put.error is not None or (put.status == PutStatus.FAILED).all()  # the server's answer came first
        assert bench.pool.n_leases == 0
        eventually(lambda: count(bench, "reserved_blocks") == 0)
        assert bench.put(keys, source, checksums=checksums).status.tolist() == [PutStatus.STORED] * 4
        assert bench.get(keys, bench.pool.spans(range(8, 12))).ok.all()


@pytest.mark.parametrize("end", ["client", "server"])
def test_a_connection_that_is_reset_in_the_middle(end: str) -> None:
    """Half of the bytes are there, and what is said to be there is; the store and the client go on."""
    plan = FaultPlan.script(Fault(FaultKind.RESET))
    plans = {"at_client": plan} if end == "client" else {"at_server": plan}
    with faulty_pool(**plans) as (_, url), bench_at(url) as bench:
        keys, source, target = bench.keys(4), bench.pool.spans(range(4)), bench.pool.spans(range(8, 12))
        wanted = [bench.content(source, row) for row in range(4)]
        with bench.pool.allocate(1) as hold:
            put = bench.put(keys, source, hold=hold)
            got = bench.get(keys, target, hold=hold)
        assert plan.counts == {FaultKind.RESET: 1}
        assert put.error is not None or got.error is not None
        for row in np.flatnonzero(got.ok):
            assert bench.content(target, int(row)) == wanted[row]
        assert bench.pool.n_leases == 0
        bench.put(keys, source)
        assert bench.get(keys, target).ok.all()
        assert [bench.content(target, row) for row in range(4)] == wanted
        eventually(lambda: count(bench, "reserved_blocks") == count(bench, "pinned_blocks") == 0)


# -- a slot that is used again under a slow reader


def test_a_slot_that_is_used_again_under_a_slow_reader() -> None:
    """Its lease is over and the slot holds another block, whose bytes do not have the checksum of the reply: a miss.

    Not one that says CHECKSUM: nothing is corrupt, and nobody is to look for it.
    """
    begun, go = threading.Event(), threading.Event()

    def wait(number: int, batch: TransferBatch) -> None:
        if number == 0:
            begun.set()
            assert go.wait(PATIENCE_S)

    with faulty_pool(at_client=FaultPlan(wait), lease_s=0.05) as (server, url), bench_at(url) as bench:
        store = server._store
        keys, source, target = bench.keys(1), bench.pool.spans([0]), bench.pool.spans([8])
        assert bench.put(keys, source).ok.all()
        slot = next(iter(store._entries.values())).slot
        got = bench.backend.get_into(keys, SHARD, target, hold=None, timeout=PATIENCE_S)
        assert begun.wait(PATIENCE_S)
        eventually(lambda: count(bench, "expired_leases") == 1)
        assert bench.backend.delete(keys, timeout=PATIENCE_S) == 1
        others = bench.keys(2)
        assert bench.put(others, bench.pool.spans([1, 2])).ok.all()
        assert slot in {entry.slot for entry in store._entries.values()}
        go.set()
        got.result(PATIENCE_S)
        assert got.status.tolist() == [GetStatus.MISSING]
        # The block that lies there now is a good one: what the reader says of the old one does not touch it.
        assert bench.get(others, bench.pool.spans([16, 17])).ok.all()
        assert count(bench, "dropped_wrong") == 0
        assert bytes(bench.pool.view(16)) == bytes(bench.pool.view(1))
