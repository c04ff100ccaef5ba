"""The faulty transport passes the suite, and whatever befalls a batch, the contract holds."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import pytest
import test_tcp

from kvrdma.errors import ClosedError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.memory import Lease, Memory
from kvrdma.testing.transports import PATIENCE_S, HeldLease, Side, TransportSuite, column, make_batch
from kvrdma.transports import MemoryRegion, Opcode, RemoteRegion, Transfer, Transport, negotiate, transports
from kvrdma.transports.faulty import Fault, FaultKind, FaultPlan, FaultyTransport
from kvrdma.transports.inproc import InprocTransport
from kvrdma.transports.tcp import TcpTransport

LATER = Fault(FaultKind.DELAY, seconds=0.002)
SWAPPED = Fault(FaultKind.REORDER, seconds=0.002)
SIZE = 1024


class TestWithoutFaults(test_tcp.TestTcp):
    def make_transport(self) -> Transport:
        return FaultyTransport()


class TestAroundInproc(TransportSuite):
    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = "nobody"

    def make_transport(self) -> Transport:
        return FaultyTransport(InprocTransport())


class TestDelayed(TransportSuite):
    """Every batch is posted later: whatever the suite asks for must hold all the same."""

    def make_transport(self) -> Transport:
        return FaultyTransport(TcpTransport(), FaultPlan.always(LATER))


class TestReordered(test_tcp.TestTcp):
    def make_transport(self) -> Transport:
        return FaultyTransport(TcpTransport(streams=4), FaultPlan.always(SWAPPED))


class TestDelayedAndReordered(TransportSuite):
    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = "nobody"

    def make_transport(self) -> Transport:
        return FaultyTransport(InprocTransport(), FaultPlan.seeded(7, {LATER: 0.3, SWAPPED: 0.3}))


# -- one fault at a time, around either transport


Connect = Callable[[FaultPlan], tuple[Side, Side]]


@pytest.fixture(params=["tcp", "inproc"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes two sides whose left one has the faults of a plan."""
    make: type[Transport] = {"tcp": TcpTransport, "inproc": InprocTransport}[request.param]
    suite = TransportSuite()
    with ExitStack() as stack:

        def join(plan: FaultPlan) -> tuple[Side, Side]:
            left = stack.enter_context(FaultyTransport(make(), plan))
            right = stack.enter_context(FaultyTransport(make()))
            listener = right.listen("127.0.0.1:0" if make is TcpTransport else "")
            return suite.make_sides((left, right), listener, 64 * SIZE)

        yield join


def read(here: Side, there: Side, n: int, *, timeout: float | None = None) -> tuple[Transfer, HeldLease]:
    """Post a READ of the first n KiB in ranges of 1 KiB each; its hold is the transfer's alone."""
    offsets = np.arange(n, dtype=np.int64) * SIZE
    sizes = np.full(n, SIZE, dtype=np.int64)
    held = HeldLease()
    batch = make_batch(Opcode.READ, here.region, there.export, offsets, offsets, sizes)
    transfer = here.endpoint.post(batch, hold=held.lease, timeout=timeout)
    held.lease.release()
    return transfer, held


def equal(here: Side, there: Side, row: int) -> bool:
    part = slice(row * SIZE, (row + 1) * SIZE)
    return np.array_equal(here.array[part], there.array[part])


@pytest.mark.parametrize("opcode", Opcode)
@pytest.mark.parametrize(("byte", "range_", "offset"), [(None, 2, 0), (0, 0, 0), (SIZE + 5, 1, 5), (-1, 3, SIZE - 1)])
def test_a_corrupted_batch_differs_in_one_bit(
    connect: Connect, opcode: Opcode, byte: int | None, range_: int, offset: int
) -> None:
    """A transport cannot know; the sender's own memory stays as it is."""
    plan = FaultPlan.script(Fault(FaultKind.CORRUPT, byte=byte))
    here, there = connect(plan)
    origin, goal = (there.array, here.array) if opcode is Opcode.READ else (here.array, there.array)
    sent, expected = origin.copy(), goal.copy()
    offsets = column(3, 1, 0, 2) * SIZE
    for to, start in zip(offsets, offsets[::-1], strict=True):
        expected[to : to + SIZE] = sent[start : start + SIZE]
    at = int(offsets[range_]) + offset
    expected[at] ^= 1
    local, remote = (offsets, offsets[::-1].copy()) if opcode is Opcode.READ else (offsets[::-1].copy(), offsets)
    batch = make_batch(opcode, here.region, there.export, local, remote, np.full(4, SIZE, dtype=np.int64))
    transfer = here.endpoint.post(batch)
    assert transfer.result(PATIENCE_S).all()
    assert transfer.error is None
    np.testing.assert_array_equal(goal, expected)
    np.testing.assert_array_equal(origin, sent)
    assert plan.counts == {FaultKind.CORRUPT: 1}
    assert here.endpoint.post(batch).result(PATIENCE_S).all()
    expected[at] ^= 1
    np.testing.assert_array_equal(goal, expected)


def test_a_corruption_of_nothing_does_not_count(connect: Connect) -> None:
    """No range arrived, so no byte of it can be wrong."""
    plan = FaultPlan.always(Fault(FaultKind.CORRUPT))
    here, there = connect(plan)
    there.transport.revoke(there.export)
    transfer, held = read(here, there, 4)
    assert not transfer.result(PATIENCE_S).any()
    assert isinstance(transfer.error, RegionError)
    assert held.ends == 1
    assert not plan.counts


def test_a_dropped_batch_ends_with_the_endpoint_only(connect: Connect) -> None:
    """Neither a cancel nor time ends it: the hold stays until `abort`."""
    plan = FaultPlan.script(Fault(FaultKind.DROP))
    here, there = connect(plan)
    before = here.array.copy()
    dropped, held = read(here, there, 4)
    other, _ = read(here, there, 1)
    assert other.result(PATIENCE_S).all()
    dropped.cancel()
    with pytest.raises(DeadlineError):
        dropped.result(0.05)
    assert held.ends == 0
    here.endpoint.abort()
    assert dropped.done()
    assert not dropped.ok.any()
    assert isinstance(dropped.error, ClosedError)
    assert held.ends == 1
    assert np.array_equal(here.array[SIZE:], before[SIZE:])
    assert plan.counts == {FaultKind.DROP: 1}


@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_dropped_batch_ends_when_the_peer_does(connect: Connect, how: str) -> None:
    here, there = connect(FaultPlan.always(Fault(FaultKind.DROP)))
    dropped, held = read(here, there, 4)
    done_first: list[bool] = []
    closed = threading.Event()
    here.endpoint.add_close_callback(lambda: (done_first.append(dropped.done()), closed.set()))
    getattr(there.endpoint, how)()
    assert closed.wait(PATIENCE_S)
    assert done_first == [True]
    assert not dropped.ok.any()
    assert dropped.error is not None
    assert held.ends == 1
    with pytest.raises(KVRDMAError):
        read(here, there, 1)


def test_the_second_time_out_ends_a_dropped_batch(connect: Connect) -> None:
    """The first one cancels, which nobody answers; the second aborts the endpoint, and with it all the rest."""
    here, there = connect(FaultPlan.script(Fault(FaultKind.DROP), Fault(FaultKind.DROP)))
    patient, patient_held = read(here, there, 1)
    dropped, held = read(here, there, 4, timeout=0.2)
    with pytest.raises(DeadlineError):
        dropped.result(0.2)
    assert not here.endpoint.closed()
    assert not dropped.result(PATIENCE_S).any()
    assert isinstance(dropped.error, DeadlineError)
    assert not patient.result(PATIENCE_S).any()
    assert held.ends == patient_held.ends == 1
    assert here.endpoint.closed()


def test_bytes_that_land_after_the_time_out(connect: Connect) -> None:
    """The time-out is no end: they land under the hold, which goes with the terminal state, and the endpoint stays."""
    there_is_time = 1.0  # between the two time-outs
    here, there = connect(FaultPlan.script(Fault(FaultKind.LATE)))
    late, held = read(here, there, 4, timeout=there_is_time)
    assert not equal(here, there, 3)
    with pytest.raises(DeadlineError):
        late.result(there_is_time / 2)
    assert held.ends == 0
    assert late.result(PATIENCE_S).all()
    assert isinstance(late.error, DeadlineError)
    assert held.ends == 1
    assert all(equal(here, there, row) for row in range(4))
    assert not here.endpoint.closed()
    again, _ = read(here, there, 4)
    assert again.result(PATIENCE_S).all()


def test_bytes_that_land_after_a_cancel(connect: Connect) -> None:
    here, there = connect(FaultPlan.script(Fault(FaultKind.LATE)))
    late, held = read(here, there, 4)
    with pytest.raises(DeadlineError):
        late.result(0.02)
    late.cancel()
    late.cancel()
    assert late.result(PATIENCE_S).all()
    assert late.error is not None
    assert all(equal(here, there, row) for row in range(4))
    assert held.ends == 1


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_reset_in_the_middle(connect: Connect, n: int) -> None:
    """What it says has arrived did, the rest did not; everything else on the endpoint is terminal too."""
    plan = FaultPlan.script(Fault(FaultKind.DROP), Fault(FaultKind.RESET))
    here, there = connect(plan)
    before = here.array.copy()
    waiting, waiting_held = read(here, there, 1)
    reset, held = read(here, there, n)
    ok = reset.result(PATIENCE_S)
    assert ok.tolist() == [row < n // 2 for row in range(n)]
    assert all(equal(here, there, row) for row in np.flatnonzero(ok))
    assert isinstance(reset.error, TransportError)
    assert not waiting.result(PATIENCE_S).any()
    assert held.ends == waiting_held.ends == 1
    assert here.endpoint.closed()
    if n == 1:  # half of the only range: neither what was there nor what was asked for
        assert np.array_equal(here.array[: SIZE // 2], there.array[: SIZE // 2])
        assert np.array_equal(here.array[SIZE // 2 : SIZE], before[SIZE // 2 : SIZE])


def test_completions_in_another_order(connect: Connect) -> None:
    here, there = connect(FaultPlan.script(Fault(FaultKind.REORDER, seconds=PATIENCE_S)))
    order: list[str] = []
    batch = make_batch(Opcode.READ, here.region, there.export, column(0), column(0), column(SIZE))
    posted = []
    for name in ("first", "second"):
        with Lease(np.zeros(1, dtype=np.int64), on_last=lambda name=name: order.append(name)) as lease:  # type: ignore[misc]
            posted.append(here.endpoint.post(batch, hold=lease))
        if name == "first":
            with pytest.raises(DeadlineError):
                posted[0].result(0.05)
    assert all(transfer.result(PATIENCE_S).all() for transfer in posted)
    assert order == ["second", "first"]


def test_a_held_completion_ends_by_itself(connect: Connect) -> None:
    """Nobody follows: it ends after its time; or with the endpoint, as what it is."""
    here, there = connect(FaultPlan.script(SWAPPED, Fault(FaultKind.REORDER, seconds=PATIENCE_S)))
    alone, _ = read(here, there, 4)
    assert alone.result(PATIENCE_S).all()
    held_back, held = read(here, there, 4)
    with pytest.raises(DeadlineError):
        held_back.result(0.05)
    here.endpoint.abort()
    assert held_back.ok.all()
    assert held.ends == 1


def test_a_delayed_batch_that_is_cancelled_never_begins(connect: Connect) -> None:
    here, there = connect(FaultPlan.script(Fault(FaultKind.DELAY, seconds=PATIENCE_S)))
    before = here.array.copy()
    for how in ("cancel", "timeout"):
        delayed, held = read(here, there, 4, timeout=0.1 if how == "timeout" else None)
        if how == "cancel":
            delayed.cancel()
            assert not delayed.result(PATIENCE_S).any()
            assert isinstance(delayed.error, ClosedError)
            assert np.array_equal(here.array, before)
        else:
            delayed.result(PATIENCE_S)
        assert held.ends == 1
    assert not here.endpoint.closed()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens(connect: Connect, seed: int) -> None:
    """Any mixture: each transfer is terminal, each hold ends once and under it, and what is said to be there is."""
    shares = {Fault(kind, seconds=0.001): 0.12 for kind in FaultKind if kind is not FaultKind.CORRUPT}
    plan = FaultPlan.seeded(seed, shares)
    for _ in range(6):
        here, there = connect(plan)
        posted = []
        for _ in range(20):
            held = HeldLease()
            array = np.zeros(4 * SIZE, dtype=np.uint8)
            region = here.transport.register(Memory.of(array))
            offsets = np.arange(4, dtype=np.int64) * SIZE
            batch = make_batch(Opcode.READ, region, there.export, offsets, offsets, np.full(4, SIZE, dtype=np.int64))
            try:
                posted.append((here.endpoint.post(batch, hold=held.lease, timeout=0.1), held, array))
            except ClosedError:
                assert here.endpoint.closed()
            held.lease.release()
        for transfer, held, array in posted:
            ok = transfer.result(PATIENCE_S)
            assert held.ends == 1
            assert ok.all() or transfer.error is not None
            for row in np.flatnonzero(ok):
                part = slice(row * SIZE, (row + 1) * SIZE)
                assert np.array_equal(array[part], there.array[part])
    assert set(plan.counts) == {fault.kind for fault in shares}


# -- plans, and who may choose it


def test_a_seeded_plan_repeats() -> None:
    """By the number of the post alone, in the shares that were asked for."""
    memory = Memory.of(bytearray(8))
    batch = make_batch(
        Opcode.READ, MemoryRegion(memory, 1), RemoteRegion("faulty", 8, b""), column(0), column(0), column(8)
    )
    shares = {Fault(FaultKind.DROP): 0.25, Fault(FaultKind.DELAY): 0.5}

    def kinds(seed: int) -> list[Fault | None]:
        plan = FaultPlan.seeded(seed, shares)
        return [plan.next(batch) for _ in range(2000)]

    assert kinds(1) == kinds(1)
    assert kinds(1) != kinds(2)
    plan = FaultPlan.seeded(3, shares)
    for _ in range(2000):
        plan.next(batch)
    assert 400 < plan.counts[FaultKind.DROP] < 600
    assert 900 < plan.counts[FaultKind.DELAY] < 1100


def test_it_is_never_chosen_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not unless code has put it into the registry and an order names it."""
    assert "faulty" not in set(transports)
    monkeypatch.setattr(transports, "_loaded", dict(transports._loaded))
    transports.add("faulty", FaultyTransport.with_plan(FaultPlan.none()))
    offers = [("faulty", "h:1"), ("tcp", "h:1")]
    assert [cls.scheme for cls, _ in negotiate(offers)] == ["tcp"]
    with pytest.raises(TransportError, match="faulty: used only where it is named"):
        negotiate(offers[:1])
    assert [cls.scheme for cls, _ in negotiate(offers, ("faulty", "tcp"))] == ["faulty", "tcp"]
