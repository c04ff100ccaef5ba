"""What every transport does: `TransportSuite`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.layout import Int64s
from kvrdma.memory import Lease, Memory
from kvrdma.transports import (
    Endpoint,
    Listener,
    MemoryRegion,
    Opcode,
    Priority,
    RemoteRegion,
    Rights,
    Transfer,
    TransferBatch,
    Transport,
)

PATIENCE_S: Final = 30.0  # a wait that takes this long has hung
_BOTH: Final = Rights.READ | Rights.WRITE
_GUARD: Final = np.arange(4096, dtype=np.uint8)  # lies before and behind the memory of `make_array`
Bytes = NDArray[np.uint8]


@dataclass(slots=True)
class Side:
    """One of two processes: its transport, its end of a connection, and memory that the other may use."""

    transport: Transport
    endpoint: Endpoint
    array: Bytes
    region: MemoryRegion
    export: RemoteRegion


@dataclass(slots=True)
class HeldLease:
    """A lease that counts how often it came to its end, for tests of who holds it how long."""

    lease: Lease = field(init=False)
    ends: int = 0

    def __post_init__(self) -> None:
        self.lease = Lease(np.zeros(1, dtype=np.int64), on_last=self._end)

    def _end(self) -> None:
        self.ends += 1


def column(*values: int) -> Int64s:
    """An int64 column."""
    return np.array(values, dtype=np.int64)


def make_batch(
    opcode: Opcode,
    local: MemoryRegion,
    remote: RemoteRegion,
    local_offsets: Int64s,
    remote_offsets: Int64s,
    nbytes: Int64s,
) -> TransferBatch:
    """A batch between one region here and one there."""
    rows = np.zeros(len(nbytes), dtype=np.int64)
    return TransferBatch(opcode, [local], [remote], rows, local_offsets, rows.copy(), remote_offsets, nbytes)


def apart(rng: np.random.Generator, n: int, size: int) -> tuple[Int64s, Int64s]:
    """Offsets and lengths of n ranges that do not overlap, in random order; some touch."""
    cuts = np.sort(rng.choice(np.arange(1, size), 2 * n - 1, replace=False))
    edges = np.concatenate([[0], cuts, [size]])
    starts, ends = edges[0:-1:2], edges[1::2].copy()
    touching = rng.random(n - 1) < 0.3
    ends[:-1][touching] = starts[1:][touching]
    order = rng.permutation(n)
    return starts[order].astype(np.int64), (ends - starts)[order].astype(np.int64)


class TransportSuite:
    """Tests that a transport inherits. `make_transport` is needed; the addresses where they differ."""

    address: ClassVar[str] = "127.0.0.1:0"
    """Where to listen; any number of listeners may."""

    nowhere: ClassVar[str] = "127.0.0.1:1"
    """Where nobody listens."""

    nbytes: ClassVar[int] = 1 << 20
    """How much memory either side has in most tests."""

    def make_transport(self) -> Transport:
        """Make a transport; the suite closes it."""
        raise NotImplementedError

    def make_array(self, nbytes: int) -> tuple[Bytes, Memory]:
        """Make memory that can be exported, and its bytes; for transports that cannot export just any."""
        around = np.concatenate([_GUARD, np.zeros(nbytes, dtype=np.uint8), _GUARD])
        self._guards().append((around[: len(_GUARD)], around[-len(_GUARD) :]))
        array = around[len(_GUARD) : -len(_GUARD)]
        return array, Memory.of(array)

    def silent_peer(self) -> AbstractContextManager[str]:
        """Give the address of a peer that accepts a connection and then serves nothing.

        What no correct peer does cannot be asked of every transport: without one these tests are skipped.
        """
        pytest.skip(f"{type(self).__name__} gives no silent peer: override silent_peer to run this")

    @pytest.fixture(autouse=True)
    def guards_stay_whole(self) -> Iterator[None]:
        """Whatever a test does, the bytes around what was registered are nobody's, also when all has ended."""
        yield
        for before, behind in self._guards():
            np.testing.assert_array_equal(before, _GUARD, "bytes before a region were written")
            np.testing.assert_array_equal(behind, _GUARD, "bytes behind a region were written")

    @pytest.fixture
    def transports(self) -> Iterator[tuple[Transport, Transport]]:
        """Two transports, as of two processes."""
        with ExitStack() as stack:
            yield stack.enter_context(self.make_transport()), stack.enter_context(self.make_transport())

    @pytest.fixture
    def listener(self, transports: tuple[Transport, Transport]) -> Listener:
        """The right transport's listener."""
        return transports[1].listen(self.address)

    @pytest.fixture
    def sides(self, transports: tuple[Transport, Transport], listener: Listener) -> tuple[Side, Side]:
        """Both ends of a connection, with random bytes that either may read and write."""
        return self.make_sides(transports, listener, self.nbytes)

    def make_sides(self, transports: tuple[Transport, Transport], listener: Listener, nbytes: int) -> tuple[Side, Side]:
        """Connect, and register memory filled with random bytes at both ends."""
        rng = np.random.default_rng(nbytes)
        left = transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=b"the ticket")
        right = listener.accept(timeout=PATIENCE_S)
        sides = []
        for transport, endpoint in zip(transports, (left, right), strict=True):
            array, memory = self.make_array(nbytes)
            array[:] = np.frombuffer(rng.bytes(nbytes), dtype=np.uint8)
            region = transport.register(memory)
            sides.append(Side(transport, endpoint, array, region, transport.export(region, _BOTH)))
        return sides[0], sides[1]

    def _guards(self) -> list[tuple[Bytes, Bytes]]:
        """What lies before and behind each array of this test."""
        guards: list[tuple[Bytes, Bytes]] = vars(self).setdefault("_guards_of_test", [])
        return guards

    # -- bytes

    @pytest.mark.parametrize("opcode", Opcode)
    @pytest.mark.parametrize("seed", range(4))
    def test_random_ranges_are_byte_exact_in_both_directions(
        self, sides: tuple[Side, Side], opcode: Opcode, seed: int
    ) -> None:
        """Every byte that was asked for arrives, and no other changes; either end may post."""
        rng = np.random.default_rng(seed)
        for here, there in (sides, sides[::-1]):
            n = int(rng.integers(1, 400))
            target, nbytes = apart(rng, n, self.nbytes)
            source = np.array([rng.integers(0, self.nbytes - size + 1) for size in nbytes], dtype=np.int64)
            read = opcode is Opcode.READ
            local, remote = (target, source) if read else (source, target)
            origin, goal = (there.array, here.array) if read else (here.array, there.array)
            expected, unchanged = goal.copy(), origin.copy()
            for to, start, size in zip(target, source, nbytes, strict=True):
                expected[to : to + size] = origin[start : start + size]
            batch = make_batch(opcode, here.region, there.export, local, remote, nbytes)
            ok = here.endpoint.post(batch).result(PATIENCE_S)
            assert ok.shape == (n,)
            assert ok.all()
            np.testing.assert_array_equal(goal, expected)
            np.testing.assert_array_equal(origin, unchanged)

    @pytest.mark.parametrize("opcode", Opcode)
    def test_neighbours_on_one_side_only(self, sides: tuple[Side, Side], opcode: Opcode) -> None:
        """Ranges that touch locally, remotely, or both may be merged, but not mixed up."""
        here, there = sides
        n, size = 64, 512
        ascending = np.arange(n, dtype=np.int64) * size
        origin, goal = (there.array, here.array) if opcode is Opcode.READ else (here.array, there.array)
        layouts = [
            (ascending, ascending),
            (ascending, ascending[::-1].copy()),
            (ascending * 3, ascending),
            (ascending, ascending * 3),
        ]
        nbytes = np.full(n, size, dtype=np.int64)
        for target, source in layouts:
            expected = goal.copy()
            for to, start in zip(target, source, strict=True):
                expected[to : to + size] = origin[start : start + size]
            local, remote = (target, source) if opcode is Opcode.READ else (source, target)
            batch = make_batch(opcode, here.region, there.export, local, remote, nbytes)
            assert here.endpoint.post(batch).result(PATIENCE_S).all()
            np.testing.assert_array_equal(goal, expected)

    @pytest.mark.parametrize("opcode", Opcode)
    def test_one_huge_range(self, transports: tuple[Transport, Transport], listener: Listener, opcode: Opcode) -> None:
        """A range of 20 MiB and some bytes, at odd offsets."""
        nbytes = (20 << 20) + 12345
        here, there = self.make_sides(transports, listener, nbytes + 8)
        origin, goal = (there.array, here.array) if opcode is Opcode.READ else (here.array, there.array)
        expected = goal.copy()
        expected[5 : 5 + nbytes] = origin[3 : 3 + nbytes]
        local, remote = (5, 3) if opcode is Opcode.READ else (3, 5)
        batch = make_batch(opcode, here.region, there.export, column(local), column(remote), column(nbytes))
        assert here.endpoint.post(batch).result(PATIENCE_S).all()
        assert np.array_equal(goal, expected)

    @pytest.mark.parametrize("opcode", Opcode)
    def test_thousands_of_tiny_ranges(self, sides: tuple[Side, Side], opcode: Opcode) -> None:
        """20,000 ranges of 1 to 7 bytes in one batch, scattered."""
        rng = np.random.default_rng(7)
        here, there = sides
        n = 20_000
        cells = rng.permutation(self.nbytes // 8)[:n].astype(np.int64) * 8
        source = rng.permutation(self.nbytes // 8)[:n].astype(np.int64) * 8
        nbytes = rng.integers(1, 8, n)
        origin, goal = (there.array, here.array) if opcode is Opcode.READ else (here.array, there.array)
        expected = goal.copy()
        for to, start, size in zip(cells.tolist(), source.tolist(), nbytes.tolist(), strict=True):
            expected[to : to + size] = origin[start : start + size]
        local, remote = (cells, source) if opcode is Opcode.READ else (source, cells)
        batch = make_batch(opcode, here.region, there.export, local, remote, nbytes)
        assert here.endpoint.post(batch).result(PATIENCE_S).all()
        assert np.array_equal(goal, expected)

    def test_several_regions_in_one_batch(self, sides: tuple[Side, Side]) -> None:
        """Each range names its own region, here and there."""
        here, there = sides
        arrays = [np.zeros(1000, dtype=np.uint8) for _ in range(3)]
        local = [here.transport.register(Memory.of(array)) for array in arrays]
        remote = []
        for i in range(2):
            origin, memory = self.make_array(500)
            origin[:] = i + 1
            remote.append(there.transport.export(there.transport.register(memory), Rights.READ))
        batch = TransferBatch(
            Opcode.READ,
            local,
            remote,
            column(2, 0, 1, 2),
            column(0, 10, 20, 500),
            column(1, 0, 1, 0),
            column(0, 0, 0, 0),
            column(500, 5, 6, 7),
        )
        assert here.endpoint.post(batch).result(PATIENCE_S).all()
        assert arrays[0].tolist() == [0] * 10 + [1] * 5 + [0] * 985
        assert arrays[1].tolist() == [0] * 20 + [2] * 6 + [0] * 974
        assert arrays[2].tolist() == [2] * 500 + [1] * 7 + [0] * 493

    def test_an_empty_batch_is_done(self, sides: tuple[Side, Side]) -> None:
        """Nothing to move: terminal, with an empty `ok` and the hold let go."""
        here, there = sides
        held = HeldLease()
        empty = np.zeros(0, dtype=np.int64)
        batch = make_batch(Opcode.READ, here.region, there.export, empty, empty, empty)
        transfer = here.endpoint.post(batch, hold=held.lease, timeout=PATIENCE_S)
        assert transfer.result(PATIENCE_S).shape == (0,)
        assert transfer.error is None
        held.lease.release()
        assert held.ends == 1

    @pytest.mark.parametrize("timeout", [None, PATIENCE_S])
    def test_every_priority_is_served(self, sides: tuple[Side, Side], timeout: float | None) -> None:
        """No priority starves where there is room for all, with a time-out or without."""
        here, there = sides
        posted = [
            here.endpoint.post(self.read_all(here, there), priority=priority, timeout=timeout)
            for priority in (*reversed(Priority), *Priority)
        ]
        assert all(transfer.result(PATIENCE_S).all() for transfer in posted)
        assert all(transfer.error is None for transfer in posted)

    def test_many_threads_post_at_once(self, sides: tuple[Side, Side]) -> None:
        """`post` may be called from any thread, at both ends at the same time."""
        n, size = 8, self.nbytes // 16
        snapshot = [side.array[self.nbytes // 2 :].copy() for side in sides]
        failures: list[str] = []

        def work(number: int, here: Side, there: Side, origin: Bytes) -> None:
            to, start = number * size, self.nbytes // 2 + number * size
            for _ in range(10):
                batch = make_batch(Opcode.READ, here.region, there.export, column(to), column(start), column(size))
                ok = here.endpoint.post(batch).result(PATIENCE_S)
                got = here.array[to : to + size]
                if not ok.all() or not np.array_equal(got, origin[start - self.nbytes // 2 :][:size]):
                    failures.append(f"thread {number}")

        threads = [
            threading.Thread(target=work, args=(number, here, there, origin))
            for number in range(n)
            for here, there, origin in ((*sides, snapshot[1]), (*sides[::-1], snapshot[0]))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not failures
        assert not any(thread.is_alive() for thread in threads)

    def test_several_endpoints_of_two_transports(
        self, transports: tuple[Transport, Transport], listener: Listener
    ) -> None:
        """Connections are apart: the end of one leaves the others alone."""
        first, *others = [self.make_sides(transports, listener, 4096) for _ in range(3)]
        first[0].endpoint.abort()
        for here, there in others:
            assert here.endpoint.post(self.read_all(here, there)).result(PATIENCE_S).all()
            np.testing.assert_array_equal(here.array, there.array)

    # -- bounds, keys, rights

    def test_a_local_range_outside_its_region_is_refused(self, sides: tuple[Side, Side]) -> None:
        """No batch can be made that reaches outside our own memory, whatever the numbers."""
        here, there = sides
        huge = np.iinfo(np.int64).max
        for offset, nbytes in [(-1, 1), (self.nbytes, 1), (0, self.nbytes + 1), (huge, 1), (1, huge), (0, 0), (0, -1)]:
            with pytest.raises(RegionError):
                make_batch(Opcode.READ, here.region, there.export, column(offset), column(0), column(nbytes))
        for row in (-1, 1, huge):
            with pytest.raises(RegionError):
                TransferBatch(
                    Opcode.READ, [here.region], [there.export], column(row), column(0), column(0), column(0), column(1)
                )

    @pytest.mark.parametrize("opcode", Opcode)
    def test_a_remote_range_out_of_bounds_fails_alone(self, sides: tuple[Side, Side], opcode: Opcode) -> None:
        """A peer's region said to be larger than it is: those ranges are False, in their places; others arrive."""
        here, there = sides
        lied = RemoteRegion(there.export.scheme, np.iinfo(np.int64).max, there.export.token)
        size = 100
        target = np.arange(6, dtype=np.int64) * size
        outside = column(0, self.nbytes, size, self.nbytes - size + 1, np.iinfo(np.int64).max - size, 2 * size)
        nbytes = np.full(6, size, dtype=np.int64)
        before = here.array.copy(), there.array.copy()
        transfer = here.endpoint.post(make_batch(opcode, here.region, lied, target, outside, nbytes))
        good = [True, False, True, False, False, True]
        assert transfer.result(PATIENCE_S).tolist() == good
        assert isinstance(transfer.error, RegionError)
        self.check_moved(opcode, sides, before, target, outside, size, good)
        self.check_works(sides)

    @pytest.mark.parametrize("opcode", Opcode)
    def test_a_wrong_key_moves_nothing(self, sides: tuple[Side, Side], opcode: Opcode) -> None:
        """A key with any bit flipped is worth nothing."""
        here, there = sides
        token = there.export.token
        before = here.array.copy(), there.array.copy()
        for byte in range(0, len(token), max(1, len(token) // 8)):
            forged = token[:byte] + bytes([token[byte] ^ 1]) + token[byte + 1 :]
            remote = RemoteRegion(there.export.scheme, self.nbytes, forged)
            transfer = here.endpoint.post(make_batch(opcode, here.region, remote, column(0), column(0), column(64)))
            assert not transfer.result(PATIENCE_S).any()
            assert isinstance(transfer.error, RegionError)
        assert np.array_equal(here.array, before[0])
        assert np.array_equal(there.array, before[1])
        self.check_works(sides)

    def test_a_token_that_is_none_is_an_error(self, sides: tuple[Side, Side]) -> None:
        """What is no token at all, or another scheme's, is refused or fails; it does no harm, and nothing hangs."""
        here, there = sides
        for remote in (
            RemoteRegion(there.export.scheme, 64, b""),
            RemoteRegion(there.export.scheme, 64, b"x" * 300),
            RemoteRegion("another-scheme", 64, there.export.token),
        ):
            held = HeldLease()
            with contextlib.suppress(RegionError):
                transfer = here.endpoint.post(
                    make_batch(Opcode.READ, here.region, remote, column(0), column(0), column(64)), hold=held.lease
                )
                assert not transfer.result(PATIENCE_S).any()
            held.lease.release()
            assert held.ends == 1
        self.check_works(sides)

    @pytest.mark.parametrize("opcode", Opcode)
    def test_a_revoked_key_moves_nothing(self, sides: tuple[Side, Side], opcode: Opcode) -> None:
        """After `revoke` that key is worth nothing, another of the same region still is."""
        here, there = sides
        second = there.transport.export(there.region, _BOTH)
        there.transport.revoke(second)
        there.transport.revoke(second)
        before = here.array.copy(), there.array.copy()
        transfer = here.endpoint.post(make_batch(opcode, here.region, second, column(0), column(0), column(64)))
        assert not transfer.result(PATIENCE_S).any()
        assert isinstance(transfer.error, RegionError)
        assert np.array_equal(here.array, before[0])
        assert np.array_equal(there.array, before[1])
        self.check_works(sides)

    @pytest.mark.parametrize(("granted", "opcode"), [(Rights.READ, Opcode.WRITE), (Rights.WRITE, Opcode.READ)])
    def test_a_right_that_was_not_granted(self, sides: tuple[Side, Side], granted: Rights, opcode: Opcode) -> None:
        """A key that reads cannot write, and the other way round; the target stays as it was."""
        here, there = sides
        if not here.transport.enforces_rights:
            pytest.skip(f"{here.transport.scheme} does not enforce rights itself (enforces_rights is False)")
        remote = there.transport.export(there.region, granted)
        before = here.array.copy(), there.array.copy()
        transfer = here.endpoint.post(make_batch(opcode, here.region, remote, column(0), column(0), column(4096)))
        assert not transfer.result(PATIENCE_S).any()
        assert isinstance(transfer.error, RegionError)
        assert np.array_equal(here.array, before[0])
        assert np.array_equal(there.array, before[1])
        self.check_works(sides)

    def test_good_and_bad_keys_in_one_batch(self, sides: tuple[Side, Side]) -> None:
        """Each range stands for itself."""
        here, there = sides
        revoked = there.transport.export(there.region, _BOTH)
        there.transport.revoke(revoked)
        rows = np.arange(40, dtype=np.int64) % 2
        offsets = np.arange(40, dtype=np.int64) * 64
        before = here.array.copy(), there.array.copy()
        batch = TransferBatch(
            Opcode.WRITE,
            [here.region],
            [there.export, revoked],
            np.zeros(40, dtype=np.int64),
            offsets,
            rows,
            offsets,
            np.full(40, 64, dtype=np.int64),
        )
        good = (rows == 0).tolist()
        assert here.endpoint.post(batch).result(PATIENCE_S).tolist() == good
        self.check_moved(Opcode.WRITE, sides, before, offsets, offsets, 64, good)

    def test_a_deregistered_region_is_gone(self, sides: tuple[Side, Side]) -> None:
        """Neither its owner's posts nor a peer's use it any longer."""
        here, there = sides
        here.transport.deregister(here.region)
        held = HeldLease()
        with pytest.raises(RegionError):
            here.endpoint.post(self.read_all(here, there), hold=held.lease)
        held.lease.release()
        assert held.ends == 1
        with pytest.raises(RegionError):
            here.transport.export(here.region, Rights.READ)
        transfer = there.endpoint.post(self.read_all(there, here))
        assert not transfer.result(PATIENCE_S).any()
        assert isinstance(transfer.error, RegionError)
        array = np.zeros(self.nbytes, dtype=np.uint8)
        again = here.transport.register(Memory.of(array))
        batch = make_batch(Opcode.READ, again, there.export, column(0), column(0), column(self.nbytes))
        assert here.endpoint.post(batch).result(PATIENCE_S).all()
        np.testing.assert_array_equal(array, there.array)

    def test_another_transports_region_is_refused(self, sides: tuple[Side, Side]) -> None:
        """A region belongs to the transport that it was registered with."""
        here, there = sides
        with pytest.raises(RegionError):
            here.endpoint.post(make_batch(Opcode.READ, there.region, there.export, column(0), column(0), column(64)))

    # -- transfers

    def test_the_hold_lasts_until_the_bytes_are_there(self, sides: tuple[Side, Side]) -> None:
        """A lease is kept until every byte has arrived, let go once, and is gone when `result` returns."""
        here, there = sides
        expected = there.array.copy()
        seen: list[bool] = []
        lease = Lease(np.zeros(1, dtype=np.int64), on_last=lambda: seen.append(np.array_equal(here.array, expected)))
        transfer = here.endpoint.post(self.read_all(here, there), hold=lease)
        lease.release()
        assert transfer.result(PATIENCE_S).all()
        assert seen == [True]
        assert not lease.alive

    def test_a_lease_that_ended_holds_nothing(self, sides: tuple[Side, Side]) -> None:
        """Posting with a lease that nobody holds is refused: its memory may be somebody else's by now."""
        here, there = sides
        before = here.array.copy()
        held = HeldLease()
        held.lease.release()
        with pytest.raises(ClosedError):
            here.endpoint.post(self.read_all(here, there), hold=held.lease)
        self.check_works((there, here))
        assert np.array_equal(here.array[128:], before[128:])

    def test_done_callbacks_are_called_once_each(self, sides: tuple[Side, Side]) -> None:
        """Those added before the end and those added after it."""
        here, there = sides
        called: list[int] = []
        first = threading.Event()
        transfer = here.endpoint.post(self.read_all(here, there))

        def before(done: Transfer) -> None:
            assert done.done()
            called.append(1)
            first.set()

        transfer.add_done_callback(before)
        assert transfer.result(PATIENCE_S).all()
        assert first.wait(PATIENCE_S)
        transfer.add_done_callback(lambda done: called.append(2 if done is transfer else 3))
        assert called == [1, 2]

    def test_a_callback_that_raises_disturbs_nobody(
        self, sides: tuple[Side, Side], caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged; other callbacks, other transfers and the connection go on."""
        here, there = sides
        others = threading.Semaphore(0)

        def fail(_: Transfer) -> None:
            raise RuntimeError("a callback of the test's")

        posted = []
        for _ in range(4):
            transfer = here.endpoint.post(self.read_all(here, there))
            with contextlib.suppress(RuntimeError):  # it may be done already
                transfer.add_done_callback(fail)
            transfer.add_done_callback(lambda _: others.release())
            posted.append(transfer)
        assert all(transfer.result(PATIENCE_S).all() for transfer in posted)
        for _ in posted:
            assert others.acquire(timeout=PATIENCE_S)
        self.check_works(sides)

    def test_a_callback_may_post(self, sides: tuple[Side, Side]) -> None:
        """What is done on the transport's own thread must not wait for that thread."""
        here, there = sides
        follow: list[Transfer] = []
        posted = threading.Event()

        def again(_: Transfer) -> None:
            follow.append(here.endpoint.post(self.read_all(here, there)))
            posted.set()

        here.endpoint.post(self.read_all(here, there)).add_done_callback(again)
        assert posted.wait(PATIENCE_S)
        assert follow[0].result(PATIENCE_S).all()

    def test_cancel_ends_a_transfer(self, sides: tuple[Side, Side]) -> None:
        """It becomes terminal soon, the ranges that it says arrived did, and its neighbours do not notice."""
        here, there = sides
        size = self.nbytes // 64
        offsets = np.arange(64, dtype=np.int64) * size
        batch = make_batch(Opcode.READ, here.region, there.export, offsets, offsets, np.full(64, size, dtype=np.int64))
        for _ in range(20):
            held = HeldLease()
            here.array[:] = 0
            cancelled = here.endpoint.post(batch, hold=held.lease, priority=Priority.OFFLOAD)
            kept = here.endpoint.post(batch, priority=Priority.OFFLOAD)
            cancelled.cancel()
            cancelled.cancel()
            ok = cancelled.result(PATIENCE_S)
            assert ok.all() or cancelled.error is not None
            assert kept.result(PATIENCE_S).all()
            held.lease.release()
            assert held.ends == 1
            cancelled.cancel()
            np.testing.assert_array_equal(here.array, there.array)
        self.check_works(sides)

    def test_a_silent_peer_does_not_hold_a_transfer_for_ever(self) -> None:
        """A post with a time-out becomes terminal: cancelled first, and then the endpoint is aborted."""
        with self.silent_peer() as address, self.make_transport() as transport:
            endpoint = transport.connect(address, timeout=PATIENCE_S)
            region = transport.register(self.make_array(4096)[1])
            remote = transport.export(region, Rights.READ)
            held = HeldLease()
            batch = make_batch(Opcode.READ, region, remote, column(0), column(0), column(4096))
            transfer = endpoint.post(batch, hold=held.lease, timeout=0.2)
            held.lease.release()
            with pytest.raises(DeadlineError):
                transfer.result(0.01)
            assert held.ends == 0
            assert not transfer.result(PATIENCE_S).any()
            assert isinstance(transfer.error, DeadlineError)
            assert held.ends == 1
            assert endpoint.closed()

    @pytest.mark.parametrize("timeout", [1e-9, 1e-5, 1e-3])
    def test_a_time_out_leaves_nothing_behind(
        self, transports: tuple[Transport, Transport], listener: Listener, timeout: float
    ) -> None:
        """However early it comes: the transfer ends, its hold is let go once, and nothing lands afterwards."""
        for _ in range(10):
            here, there = self.make_sides(transports, listener, self.nbytes)
            held = [HeldLease() for _ in range(4)]
            posted = []
            for each in held:
                with contextlib.suppress(ClosedError):  # a time-out that nothing answers ends the endpoint
                    posted.append(here.endpoint.post(self.read_all(here, there), hold=each.lease, timeout=timeout))
                each.lease.release()
            for transfer in posted:
                assert transfer.result(PATIENCE_S).all() or transfer.error is not None
            assert [each.ends for each in held] == [1] * 4
            here.array[:] = 0
            there.endpoint.close()
            here.endpoint.close()
            assert not here.array.any()

    def test_a_time_out_that_was_met_is_forgotten(self, sides: tuple[Side, Side]) -> None:
        """Neither it nor twice of it ends anything once the transfer is terminal."""
        here, there = sides
        timeout = 0.2
        batch = make_batch(Opcode.READ, here.region, there.export, column(0), column(0), column(64))
        while here.endpoint.post(batch, timeout=timeout).result(PATIENCE_S).tolist() != [True]:
            pass  # a machine that was busy for so long
        until = time.monotonic() + 3 * timeout
        while time.monotonic() < until:
            self.check_works(sides)

    def test_cancel_without_an_answer_keeps_the_hold(self) -> None:
        """To ask for an end is not the end: only `abort` rules out that bytes still land."""
        with self.silent_peer() as address, self.make_transport() as transport:
            endpoint = transport.connect(address, timeout=PATIENCE_S)
            region = transport.register(self.make_array(4096)[1])
            remote = transport.export(region, Rights.READ)
            held = HeldLease()
            batch = make_batch(Opcode.READ, region, remote, column(0), column(0), column(4096))
            transfer = endpoint.post(batch, hold=held.lease)
            held.lease.release()
            transfer.cancel()
            with pytest.raises(DeadlineError):
                transfer.result(0.05)
            assert held.ends == 0
            endpoint.abort()
            assert transfer.done()
            assert not transfer.ok.any()
            assert transfer.error is not None
            assert held.ends == 1

    # -- ends

    def test_close_drains(self, sides: tuple[Side, Side]) -> None:
        """What was posted before `close` arrives."""
        here, there = sides
        posted = [here.endpoint.post(self.read_all(here, there)) for _ in range(16)]
        here.endpoint.close(timeout=PATIENCE_S)
        assert all(transfer.done() for transfer in posted)
        assert all(transfer.ok.all() for transfer in posted)
        np.testing.assert_array_equal(here.array, there.array)
        here.endpoint.close()
        here.endpoint.abort()

    def test_abort_ends_every_transfer_at_once(
        self, transports: tuple[Transport, Transport], listener: Listener
    ) -> None:
        """When it returns all are terminal and every lease is let go; nothing lands afterwards."""
        here, there = self.make_sides(transports, listener, 8 << 20)
        held = [HeldLease() for _ in range(12)]
        posted = [here.endpoint.post(self.read_all(here, there), hold=each.lease) for each in held]
        for each in held:
            each.lease.release()
        here.endpoint.abort()
        assert all(transfer.done() for transfer in posted)
        assert all(transfer.ok.all() or transfer.error is not None for transfer in posted)
        assert [each.ends for each in held] == [1] * 12
        here.array[:] = 0
        there.endpoint.close()
        assert not here.array.any()

    def test_abort_by_two_threads(self, transports: tuple[Transport, Transport], listener: Listener) -> None:
        """Whoever comes second may count on the same: all are terminal when either call returns."""
        here, there = self.make_sides(transports, listener, 8 << 20)
        busy, free = threading.Event(), threading.Event()
        caller = threading.current_thread()
        seen: list[list[bool]] = []

        def block(_: Transfer) -> None:
            if threading.current_thread() is not caller:
                busy.set()
                free.wait(PATIENCE_S)

        for _ in range(100):  # until it is called on the transport's thread, in the middle of its work
            transfer = here.endpoint.post(self.read_all(here, there))
            at_once = transfer.done()
            transfer.add_done_callback(block)
            if not at_once and busy.wait(0.1):
                break
        posted = [here.endpoint.post(self.read_all(here, there)) for _ in range(4)]

        def abort() -> None:
            here.endpoint.abort()
            seen.append([transfer.done() for transfer in posted])

        threads = [threading.Thread(target=abort) for _ in range(2)]
        for thread in threads:
            thread.start()
        threads[1].join(0.1)  # time enough to come back too early
        free.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert seen == [[True] * 4] * 2

    def test_post_after_the_end_is_refused(self, sides: tuple[Side, Side]) -> None:
        """`ClosedError`, and the lease is not kept."""
        here, there = sides
        here.endpoint.close()
        held = HeldLease()
        with pytest.raises(ClosedError):
            here.endpoint.post(self.read_all(here, there), hold=held.lease)
        held.lease.release()
        assert held.ends == 1

    @pytest.mark.parametrize("how", ["close", "abort"])
    def test_the_peers_end_is_ours(self, sides: tuple[Side, Side], how: str) -> None:
        """When one end goes, the other's transfers are terminal and it is closed; close callbacks come once."""
        here, there = sides
        ended: list[int] = []
        gone = threading.Event()

        def note() -> None:
            ended.append(1)
            gone.set()

        here.endpoint.add_close_callback(note)
        posted = [here.endpoint.post(self.read_all(here, there)) for _ in range(4)]
        getattr(there.endpoint, how)()
        assert gone.wait(PATIENCE_S)
        assert here.endpoint.closed()
        for transfer in posted:
            ok = transfer.result(PATIENCE_S)
            assert ok.all() or transfer.error is not None
        with pytest.raises(KVRDMAError):
            here.endpoint.post(self.read_all(here, there))
        here.endpoint.close()
        here.endpoint.abort()
        assert ended == [1]
        here.endpoint.add_close_callback(note)
        assert ended == [1, 1]

    def test_a_close_callback_that_raises_disturbs_nobody(self, sides: tuple[Side, Side]) -> None:
        """It is logged, and the others are called."""
        here, _ = sides
        ended = threading.Event()

        def fail() -> None:
            raise RuntimeError("a callback of the test's")

        here.endpoint.add_close_callback(fail)
        here.endpoint.add_close_callback(ended.set)
        here.endpoint.abort()
        assert ended.wait(PATIENCE_S)

    def test_abort_from_a_callback(self, sides: tuple[Side, Side]) -> None:
        """On the transport's own thread, in the middle of its work."""
        here, there = sides
        ended = threading.Event()
        here.endpoint.add_close_callback(ended.set)
        posted = [here.endpoint.post(self.read_all(here, there)) for _ in range(6)]
        posted[0].add_done_callback(lambda _: here.endpoint.abort())
        assert ended.wait(PATIENCE_S)
        for transfer in posted:
            ok = transfer.result(PATIENCE_S)
            assert ok.all() or transfer.error is not None

    def test_as_a_context_manager(self, sides: tuple[Side, Side]) -> None:
        """It drains at a good end, and aborts at a bad one."""
        here, there = sides
        with here.endpoint as endpoint:
            transfer = endpoint.post(self.read_all(here, there))
        assert transfer.done()
        assert transfer.ok.all()
        assert endpoint.closed()

    # -- connections

    def test_the_ticket_arrives(self, sides: tuple[Side, Side]) -> None:
        """What the end that connected said of itself is known at both ends."""
        assert sides[0].endpoint.ticket == sides[1].endpoint.ticket == b"the ticket"
        assert sides[0].endpoint.peer
        assert sides[1].endpoint.peer
        assert sides[0].endpoint.scheme == sides[0].transport.scheme

    @pytest.mark.parametrize("ticket", [b"", b"\0", b"\0" * 16, b"tail\0\0", bytes(range(32))])
    def test_a_ticket_is_bytes(
        self, transports: tuple[Transport, Transport], listener: Listener, ticket: bytes
    ) -> None:
        """Any bytes, up to 32 of them; zeros at its end are part of it."""
        transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=ticket)
        assert listener.accept(timeout=PATIENCE_S).ticket == ticket

    def test_who_knows_the_secret_gets_in(self, transports: tuple[Transport, Transport]) -> None:
        """`secret_of` is asked with the ticket, and both ends can then move bytes."""
        secrets = {b"one": b"1" * 32, b"two": b"2" * 32}
        listener = transports[1].listen(self.address, secret_of=secrets.get)
        for ticket, secret in secrets.items():
            transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=ticket, secret=secret).close()
            assert listener.accept(timeout=PATIENCE_S).ticket == ticket

    @pytest.mark.parametrize(
        ("ticket", "secret"),
        [(b"one", b"2" * 32), (b"one", b""), (b"one", b"1" * 31), (b"other", b"1" * 32), (b"", b"")],
        ids=["the secret of another ticket", "no secret", "half a secret", "a ticket of nobody", "nothing"],
    )
    def test_who_does_not_know_the_secret_is_turned_away(
        self, transports: tuple[Transport, Transport], ticket: bytes, secret: bytes
    ) -> None:
        """`TransportError`; nothing is handed to `accept`, and the next one is served."""
        secrets = {b"one": b"1" * 32, b"two": b"2" * 32}
        listener = transports[1].listen(self.address, secret_of=secrets.get)
        with pytest.raises(TransportError):
            transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=ticket, secret=secret)
        with pytest.raises(DeadlineError):
            listener.accept(timeout=0.05)
        transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=b"two", secret=b"2" * 32)
        assert listener.accept(timeout=PATIENCE_S).ticket == b"two"

    def test_a_listener_that_does_not_know_the_secret_is_refused(
        self, transports: tuple[Transport, Transport], listener: Listener
    ) -> None:
        """Whoever gives a secret wants to be sure of the other end, too."""
        with pytest.raises(TransportError):
            transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=b"one", secret=b"1" * 32)

    def test_connect_to_nobody(self, transports: tuple[Transport, Transport]) -> None:
        """`TransportError` or `DeadlineError`, and the transport can go on."""
        with pytest.raises((TransportError, DeadlineError)):
            transports[0].connect(self.nowhere, timeout=1.0)
        listener = transports[1].listen(self.address)
        self.check_works(self.make_sides(transports, listener, 4096))

    def test_connect_means_that_the_other_end_is_there(
        self, transports: tuple[Transport, Transport], listener: Listener
    ) -> None:
        """When `connect` returns the listener has handed its end over: a control plane may count on it."""
        tickets: list[bytes] = []
        listener.on_endpoint(lambda endpoint: tickets.append(endpoint.ticket))
        for i in range(40):
            ticket = i.to_bytes(2, "little")
            transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=ticket)
            assert tickets[-1:] == [ticket]

    def test_who_came_before_the_callback_is_handed_to_it(
        self, transports: tuple[Transport, Transport], listener: Listener
    ) -> None:
        """Each endpoint goes to `accept` or to the callback, and none to neither."""
        connected = threading.Semaphore(0)
        tickets: list[bytes] = []
        for ticket in (b"0", b"1", b"2"):
            transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=ticket)
        assert listener.accept(timeout=PATIENCE_S).ticket == b"0"

        def take(endpoint: Endpoint) -> None:
            tickets.append(endpoint.ticket)
            connected.release()

        listener.on_endpoint(take)
        transports[0].connect(listener.contact_address, timeout=PATIENCE_S, ticket=b"3")
        for _ in range(3):
            assert connected.acquire(timeout=PATIENCE_S)
        assert sorted(tickets) == [b"1", b"2", b"3"]
        with pytest.raises(DeadlineError):
            listener.accept(timeout=0.01)

    def test_accept_has_an_end(self, listener: Listener) -> None:
        """`DeadlineError` where nobody comes, `ClosedError` after `close`."""
        with pytest.raises(DeadlineError):
            listener.accept(timeout=0.01)
        listener.close()
        listener.close()
        with pytest.raises(ClosedError):
            listener.accept(timeout=PATIENCE_S)

    def test_close_wakes_everybody_who_accepts(self, listener: Listener) -> None:
        """Not only the first of them."""
        woken = threading.Semaphore(0)
        waiting = threading.Barrier(4)

        def wait() -> None:
            waiting.wait(PATIENCE_S)
            with contextlib.suppress(ClosedError):
                listener.accept(timeout=2 * PATIENCE_S)
                return
            woken.release()

        threads = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        waiting.wait(PATIENCE_S)
        listener.close()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert not any(thread.is_alive() for thread in threads)
        for _ in threads:
            assert woken.acquire(timeout=0)

    def test_a_closed_listener_leaves_its_endpoints(
        self, sides: tuple[Side, Side], listener: Listener, transports: tuple[Transport, Transport]
    ) -> None:
        """They live on; nobody new gets in."""
        listener.close()
        self.check_works(sides)
        with pytest.raises((TransportError, DeadlineError)):
            transports[0].connect(listener.contact_address, timeout=1.0)

    def test_an_address_is_taken_once(self, transports: tuple[Transport, Transport], listener: Listener) -> None:
        """`TransportError`, from another transport too."""
        for transport in transports:
            with pytest.raises(TransportError):
                transport.listen(listener.contact_address)

    def test_a_transport_ends_with_all_that_is_its(self) -> None:
        """`close` makes transfers terminal, ends endpoints, listeners and threads, and may be called twice."""
        before = set(threading.enumerate())
        left, right = self.make_transport(), self.make_transport()
        listener = right.listen(self.address)
        here, there = self.make_sides((left, right), listener, self.nbytes)
        extra = left.connect(listener.contact_address, timeout=PATIENCE_S)  # never accepted
        posted = [here.endpoint.post(self.read_all(here, there)) for _ in range(4)]
        left.close()
        right.close()
        left.close()
        assert all(transfer.done() for transfer in posted)
        assert here.endpoint.closed()
        assert there.endpoint.closed()
        assert extra.closed()
        for call in (
            lambda: here.endpoint.post(self.read_all(here, there)),
            lambda: left.connect(listener.contact_address, timeout=1.0),
            lambda: left.listen(self.address),
            lambda: listener.accept(timeout=1.0),
        ):
            with pytest.raises(KVRDMAError):
                call()
        here.endpoint.close()
        there.endpoint.abort()
        posted[0].cancel()
        listener.close()
        assert not set(threading.enumerate()) - before

    @pytest.mark.parametrize("turn", range(6))
    def test_post_while_the_transport_closes(self, turn: int) -> None:
        """Whoever loses that race gets a `KVRDMAError` or a terminal transfer, and keeps no lease."""
        left, right = self.make_transport(), self.make_transport()
        here, there = self.make_sides((left, right), right.listen(self.address), 64)
        batch = self.read_all(here, there)
        started = threading.Event()
        held: list[HeldLease] = []
        posted: list[Transfer] = []
        wrong: list[BaseException] = []

        def work() -> None:
            try:
                while True:
                    held.append(HeldLease())
                    try:
                        posted.append(here.endpoint.post(batch, hold=held[-1].lease))
                    finally:
                        held[-1].lease.release()
                        started.set()
            except KVRDMAError:
                return
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert started.wait(PATIENCE_S)
        left.close()
        thread.join(PATIENCE_S)
        right.close()
        assert not thread.is_alive()
        assert not wrong
        for transfer in posted:
            transfer.result(PATIENCE_S)
        assert all(each.ends == 1 for each in held)

    def test_listen_while_the_transport_closes(self) -> None:
        """Whoever loses that race gets a `KVRDMAError`; no listener stays open."""
        for _ in range(20):
            transport = self.make_transport()
            listeners = [transport.listen(self.address)]
            started = threading.Event()

            def work(transport: Transport, listeners: list[Listener], started: threading.Event) -> None:
                with contextlib.suppress(KVRDMAError):
                    for _ in range(200):
                        listeners.append(transport.listen(self.address))
                        started.set()

            thread = threading.Thread(target=work, args=(transport, listeners, started))
            thread.start()
            assert started.wait(PATIENCE_S)
            transport.close()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
            for listener in listeners:
                with pytest.raises(ClosedError):
                    listener.accept(timeout=0.01)

    def test_connect_while_the_transport_closes(self) -> None:
        """Whoever loses that race gets a `KVRDMAError`; no endpoint stays open."""
        for _ in range(10):
            left, right = self.make_transport(), self.make_transport()
            listener = right.listen(self.address)
            listener.on_endpoint(lambda _: None)
            endpoints: list[Endpoint] = []
            started = threading.Event()

            def work(left: Transport, address: str, endpoints: list[Endpoint], started: threading.Event) -> None:
                with contextlib.suppress(KVRDMAError):
                    for _ in range(100):
                        endpoints.append(left.connect(address, timeout=PATIENCE_S))
                        started.set()

            thread = threading.Thread(target=work, args=(left, listener.contact_address, endpoints, started))
            thread.start()
            assert started.wait(PATIENCE_S)
            left.close()
            thread.join(PATIENCE_S)
            right.close()
            assert not thread.is_alive()
            assert all(endpoint.closed() for endpoint in endpoints)

    # -- helpers

    def read_all(self, here: Side, there: Side) -> TransferBatch:
        """A batch that reads all of a peer's memory."""
        return make_batch(Opcode.READ, here.region, there.export, column(0), column(0), column(len(here.array)))

    def check_works(self, sides: tuple[Side, Side]) -> None:
        """The connection moves bytes in both directions."""
        for here, there in (sides, sides[::-1]):
            batch = make_batch(Opcode.READ, here.region, there.export, column(0), column(64), column(64))
            assert here.endpoint.post(batch).result(PATIENCE_S).all()
            assert np.array_equal(here.array[:64], there.array[64:128])

    def check_moved(
        self,
        opcode: Opcode,
        sides: tuple[Side, Side],
        before: tuple[Bytes, Bytes],
        local: Int64s,
        remote: Int64s,
        size: int,
        good: list[bool],
    ) -> None:
        """Exactly the good ranges moved, and of a READ a bad one's target may not be anything else."""
        here, there = sides
        expected = [array.copy() for array in before]
        for to, at, fine in zip(local.tolist(), remote.tolist(), good, strict=True):
            if not fine:
                continue
            if opcode is Opcode.READ:
                expected[0][to : to + size] = before[1][at : at + size]
            else:
                expected[1][at : at + size] = before[0][to : to + size]
        np.testing.assert_array_equal(here.array, expected[0])
        np.testing.assert_array_equal(there.array, expected[1])
