"""Rails: what a rail's end costs, when it comes back, what goes where, and that nothing is sent again too early."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.errors import ClosedError, ConfigError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.memory import Lease, MemfdSlabs, Memory
from kvrdma.testing.transports import PATIENCE_S, HeldLease, column, make_batch
from kvrdma.transports import (
    Endpoint,
    MemoryRegion,
    Opcode,
    Priority,
    RemoteRegion,
    Rights,
    Transfer,
    TransferBatch,
    Transport,
)
from kvrdma.transports.faulty import Fault, FaultKind, FaultPlan, FaultyTransport
from kvrdma.transports.inproc import InprocTransport
from kvrdma.transports.rails import RailsTransport
from kvrdma.transports.rails.endpoint import RailsEndpoint
from kvrdma.transports.rails.shares import MIN_SPLIT_NBYTES, Meter, split
from kvrdma.transports.rails.wire import (
    RailTicket,
    decode_address,
    decode_token,
    encode_address,
    encode_token,
)
from kvrdma.transports.shm import ShmTransport
from kvrdma.transports.tcp import TcpTransport

N, SIZE = 64, 64 << 10
BOTH = Rights.READ | Rights.WRITE
TCP = "a=127.0.0.1:0|b=127.0.0.1:0"


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "did not come to hold"
        time.sleep(0.002)


def memory_of(nbytes: int, seed: int) -> Memory:
    slab = MemfdSlabs(lock=False, huge=False).allocate(nbytes)
    slab.array()[:] = np.random.default_rng(seed).integers(0, 256, slab.nbytes, dtype=np.uint8)
    return slab


class Sides:
    """Two rails transports, connected, with memory of 64 blocks each."""

    def __init__(self, left: RailsTransport, right: RailsTransport, address: str) -> None:
        self.left, self.right = left, right
        self.listener = right.listen(address)
        self.here = left.connect(self.listener.contact_address, timeout=PATIENCE_S, ticket=b"t")
        self.there = self.listener.accept(timeout=PATIENCE_S)
        assert isinstance(self.here, RailsEndpoint)
        assert isinstance(self.there, RailsEndpoint)
        self.mine, self.theirs = memory_of(N * SIZE, 1), memory_of(N * SIZE, 2)
        self.local = left.register(self.mine)
        self.key = right.export(right.register(self.theirs), BOTH)
        offsets = np.arange(N, dtype=np.int64) * SIZE
        sizes = np.full(N, SIZE, dtype=np.int64)
        self.batch = {way: make_batch(way, self.local, self.key, offsets, offsets, sizes) for way in Opcode}

    def check_moved(self, way: Opcode, transfer: Transfer) -> None:
        assert transfer.result(PATIENCE_S).all()
        assert transfer.error is None
        assert np.array_equal(self.mine.array(), self.theirs.array())

    def move(self, way: Opcode = Opcode.READ) -> None:
        (self.mine if way is Opcode.READ else self.theirs).array()[:] = 0
        self.check_moved(way, self.here.post(self.batch[way], timeout=PATIENCE_S))

    def lose(self, name: str) -> None:
        """The peer's end of a rail goes, as at a cable that is pulled."""
        self.there._rails[name].endpoint.abort()


def pair(
    stack: ExitStack,
    make: Callable[[], dict[str, Transport]],
    address: str,
    left: Callable[[], dict[str, Transport]] | None = None,
    cool_down: float = 0.1,
) -> Sides:
    first = stack.enter_context(RailsTransport((left or make)(), cool_down=cool_down, grace=5.0))
    second = stack.enter_context(RailsTransport(make(), cool_down=cool_down, grace=5.0))
    return Sides(first, second, address)


def two_tcp() -> dict[str, Transport]:
    return {"a": TcpTransport(), "b": TcpTransport()}


def shm_and_tcp() -> dict[str, Transport]:
    return {"shm": ShmTransport(threads=1), "tcp": TcpTransport()}


def faulty_and_tcp(*faults: Fault | None) -> Callable[[], dict[str, Transport]]:
    return lambda: {"a": FaultyTransport(TcpTransport(), FaultPlan.script(*faults)), "b": TcpTransport()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


# -- a rail ends


@pytest.mark.parametrize("way", Opcode)
def test_both_rails_carry_a_batch(stack: ExitStack, way: Opcode) -> None:
    sides = pair(stack, two_tcp, TCP)
    assert sides.here.living == ("a", "b")
    for _ in range(4):
        sides.move(way)
    assert all(sides.here._meters[name].rate for name in "ab")


@pytest.mark.parametrize("way", Opcode)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_rail_that_ends_in_the_middle_costs_nothing_but_its_share(stack: ExitStack, way: Opcode, name: str) -> None:
    """Every transfer completes, whole and byte for byte, and every lease is let go once."""
    sides = pair(stack, two_tcp, TCP, cool_down=60.0)
    held = [HeldLease() for _ in range(20)]
    posted = []
    for i, each in enumerate(held):
        posted.append(sides.here.post(sides.batch[way], hold=each.lease, timeout=PATIENCE_S))
        each.lease.release()
        if i == 8:
            sides.lose(name)
    for transfer in posted:
        sides.check_moved(way, transfer)
    assert [each.ends for each in held] == [1] * len(held)
    eventually(lambda: sides.here.living == tuple({"a", "b"} - {name}))
    assert not sides.here.closed()
    sides.move(way)


def test_the_end_that_accepted_goes_on_too(stack: ExitStack) -> None:
    """It is the pool server, which reads what clients put."""
    sides = pair(stack, two_tcp, TCP, cool_down=60.0)
    local = sides.right.register(memory_of(N * SIZE, 3))
    key = sides.left.export(sides.local, Rights.READ)
    batch = make_batch(Opcode.READ, local, key, *(sides.batch[Opcode.READ].local_offsets,) * 2, np.full(N, SIZE))
    posted = [sides.there.post(batch, timeout=PATIENCE_S) for _ in range(10)]
    sides.here._rails["a"].endpoint.abort()
    posted += [sides.there.post(batch, timeout=PATIENCE_S) for _ in range(10)]
    assert all(transfer.result(PATIENCE_S).all() for transfer in posted)
    assert np.array_equal(local.memory.array(), sides.mine.array())


def test_both_rails_may_end_and_come_back(stack: ExitStack) -> None:
    """Where no rail is left one that failed just now is tried at once; the transfer does not notice."""
    sides = pair(stack, two_tcp, TCP, cool_down=60.0)
    for _ in range(3):
        posted = [sides.here.post(sides.batch[Opcode.READ], timeout=PATIENCE_S) for _ in range(6)]
        for name in sides.there.living:
            sides.lose(name)
        for transfer in posted:
            sides.check_moved(Opcode.READ, transfer)
        eventually(lambda: sides.here.living)


@pytest.mark.parametrize("way", Opcode)
def test_half_of_a_batch_arrives_and_the_rest_goes_elsewhere(stack: ExitStack, way: Opcode) -> None:
    sides = pair(stack, faulty_and_tcp(), TCP, faulty_and_tcp(Fault(FaultKind.RESET)), cool_down=60.0)
    sides.move(way)
    assert sides.here.living == ("b",)
    assert sides.here.resent_ranges > 0


def test_a_rail_that_comes_back_is_used_again_after_its_cool_down(stack: ExitStack) -> None:
    sides = pair(stack, two_tcp, TCP, cool_down=0.2)
    sides.lose("a")
    eventually(lambda: sides.here.living == ("b",))
    lost = time.monotonic()
    sides.move()
    eventually(lambda: sides.here.living == ("a", "b"))
    assert time.monotonic() - lost > 0.1
    sides.move()
    eventually(lambda: sides.there.living == ("a", "b"))


def test_a_rail_that_stays_away_is_tried_less_and_less(stack: ExitStack) -> None:
    sides = pair(stack, two_tcp, TCP, cool_down=0.01)
    sides.listener._inner["a"].close()
    sides.lose("a")
    eventually(lambda: sides.here._keeper._n_failures.get("a", 0) >= 4)
    rested = sides.here._keeper._not_before["a"] - time.monotonic()
    assert rested + 0.1 > 0.01 * 2**2
    sides.move()


def test_a_transport_that_fails_is_left_for_the_next_one_and_taken_again(stack: ExitStack) -> None:
    """Shared memory, then tcp, then shared memory again, under one endpoint; no transfer fails."""
    sides = pair(stack, shm_and_tcp, "shm=|tcp=127.0.0.1:0", cool_down=0.3)
    assert sides.here.living == ("shm",)
    posted = [sides.here.post(sides.batch[Opcode.READ], timeout=PATIENCE_S) for _ in range(5)]
    sides.lose("shm")
    posted += [sides.here.post(sides.batch[Opcode.READ], timeout=PATIENCE_S) for _ in range(5)]
    for transfer in posted:
        sides.check_moved(Opcode.READ, transfer)
    eventually(lambda: "tcp" in sides.here.living)
    sides.move()
    eventually(lambda: "shm" in sides.here.living)
    sides.move()


def test_an_end_for_good_ends_the_endpoint(stack: ExitStack) -> None:
    """Nothing is left to wait for: transfers fail, leases come back, close callbacks are called once."""
    sides = pair(stack, two_tcp, TCP, cool_down=0.05)
    ended: list[int] = []
    gone = threading.Event()
    sides.here.add_close_callback(lambda: (ended.append(1), gone.set()))
    held = HeldLease()
    sides.right.close()
    assert gone.wait(PATIENCE_S)
    assert ended == [1]
    with pytest.raises(ClosedError):
        sides.here.post(sides.batch[Opcode.READ], hold=held.lease)
    held.lease.release()
    assert held.ends == 1


def test_the_end_that_accepted_waits_for_a_new_rail_for_a_while_only() -> None:
    with (
        RailsTransport({"a": TcpTransport()}) as left,
        RailsTransport({"a": TcpTransport()}, grace=0.2) as right,
    ):
        sides = Sides(left, right, "a=127.0.0.1:0")
        gone = threading.Event()
        sides.there.add_close_callback(gone.set)
        left.close()
        assert gone.wait(PATIENCE_S)
        assert isinstance(sides.there._error, TransportError)
        assert not right.listen("a=127.0.0.1:0")._groups
        assert not sides.listener._groups


def test_a_connection_that_was_ended_is_not_brought_back(stack: ExitStack) -> None:
    sides = pair(stack, two_tcp, TCP)
    sides.there.abort()
    eventually(sides.here.closed)
    with pytest.raises(DeadlineError):
        sides.listener.accept(timeout=0.1)


# -- time and cancels


def test_a_silent_rail_costs_one_transfer_its_time(stack: ExitStack) -> None:
    """It is ended by that time-out, twice; what comes later goes over the other one."""
    drops = faulty_and_tcp(Fault(FaultKind.DROP))
    sides = pair(stack, faulty_and_tcp(), TCP, drops, cool_down=60.0)
    assert sides.here.living == ("a",)
    held = HeldLease()
    transfer = sides.here.post(sides.batch[Opcode.READ], hold=held.lease, timeout=0.2)
    held.lease.release()
    assert not transfer.result(PATIENCE_S).any()
    assert isinstance(transfer.error, DeadlineError)
    assert held.ends == 1
    sides.move()
    assert sides.here.living == ("b",)


def test_what_waits_for_a_rail_ends_with_its_deadline_or_its_cancel() -> None:
    endpoint, _ = by_hand()
    region, key = endpoint._owner.region, endpoint._owner.key
    batch = make_batch(Opcode.READ, region, key, column(0), column(0), column(8))
    held = [HeldLease(), HeldLease()]
    late = endpoint.post(batch, hold=held[0].lease, timeout=0.05)
    cancelled = endpoint.post(batch, hold=held[1].lease)
    for each in held:
        each.lease.release()
    assert not cancelled.done()
    cancelled.cancel()
    assert not cancelled.result(0).any()
    assert isinstance(cancelled.error, ClosedError)
    assert not late.result(PATIENCE_S).any()
    assert isinstance(late.error, DeadlineError)
    assert [each.ends for each in held] == [1, 1]
    endpoint._owner.clock.close()


# -- nothing is sent again too early


class HandRail(Endpoint):
    """A rail whose transfers end when a test says so."""

    scheme: ClassVar[str] = "hand"

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        self.posted: list[tuple[TransferBatch, Transfer]] = []
        self.over = False
        self.callbacks: list[Callable[[], None]] = []

    peer = property(lambda self: self.name)
    ticket = property(lambda self: b"")

    def post(
        self,
        batch: TransferBatch,
        *,
        hold: Lease | None = None,
        priority: Priority = Priority.LOAD,
        timeout: float | None = None,
    ) -> Transfer:
        if self.over:
            raise ClosedError("hand: closed")
        assert hold is None
        transfer = Transfer(len(batch))
        self.posted.append((batch, transfer))
        self.log.append(f"{self.name} posts {batch.local_offsets.tolist()}")
        return transfer

    def die(self) -> None:
        """The connection ends; what is under way is not terminal yet."""
        self.over = True
        for callback in self.callbacks:
            callback()

    def settle(self, ok: list[bool] | None = None, error: KVRDMAError | None = None) -> None:
        batch, transfer = self.posted.pop(0)
        self.log.append(f"{self.name} ends")
        arrived = np.ones(len(batch), dtype=np.bool_) if ok is None else np.array(ok)
        transfer.finish(arrived, error)

    def close(self, *, timeout: float = 5.0) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.over:
            self.die()
        while self.posted:
            self.settle([False] * len(self.posted[0][0]), ClosedError("hand: aborted"))

    def closed(self) -> bool:
        return self.over

    def add_close_callback(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)


class HandOwner:
    def __init__(self, names: str) -> None:
        from kvrdma.transports.loop import IoLoop

        self.tiers = [[name] for name in names]
        self.names = names
        self.clock = IoLoop("test-rails")
        self.region = MemoryRegion(Memory.of(bytearray(64)), 1)
        self.key = RemoteRegion("rails", 64, encode_token(dict.fromkeys(names, b"k")))

    def check(self, regions: object) -> None:
        pass

    def inner(self, region: MemoryRegion) -> dict[str, MemoryRegion]:
        return dict.fromkeys(self.names, region)

    def remote(self, name: str, nbytes: int, token: bytes) -> RemoteRegion:
        return RemoteRegion("hand", nbytes, token)


def by_hand(names: str = "ab") -> tuple[RailsEndpoint, list[str]]:
    return RailsEndpoint(HandOwner(names), peer="test", ticket=b""), []


def test_nothing_is_sent_again_before_the_failed_rail_is_terminal() -> None:
    """Its bytes could still land: the end of a connection is not the end of its transfers."""
    endpoint, log = by_hand()
    first, second = HandRail(log, "a"), HandRail(log, "b")
    endpoint.add("a", first)
    endpoint.add("b", second)
    batch = make_batch(
        Opcode.READ, endpoint._owner.region, endpoint._owner.key, column(0, 8, 16), column(0, 8, 16), column(8, 8, 8)
    )
    held = HeldLease()
    transfer = endpoint.post(batch, hold=held.lease)
    held.lease.release()
    assert log == ["a posts [0, 8, 16]"]
    first.die()
    assert log == ["a posts [0, 8, 16]"]
    assert not transfer.done()
    first.settle([True, False, False], TransportError("hand: lost"))
    assert log[1:] == ["a ends", "b posts [8, 16]"]
    assert held.ends == 0
    second.settle()
    assert transfer.result(0).tolist() == [True] * 3
    assert transfer.error is None
    assert held.ends == 1
    endpoint._owner.clock.close()


def test_a_rail_that_fails_a_transfer_and_stays_is_ended_first() -> None:
    endpoint, log = by_hand()
    first, second = HandRail(log, "a"), HandRail(log, "b")
    endpoint.add("a", first)
    endpoint.add("b", second)
    batch = make_batch(Opcode.READ, endpoint._owner.region, endpoint._owner.key, column(0), column(0), column(8))
    transfers = [endpoint.post(batch), endpoint.post(batch)]
    first.settle([False], TransportError("hand: retry exceeded"))
    assert first.over
    assert log == ["a posts [0]", "a posts [0]", "a ends", "a ends", "b posts [0]", "b posts [0]"]
    second.settle()
    second.settle()
    assert all(transfer.result(0).all() for transfer in transfers)
    endpoint._owner.clock.close()


def test_a_refused_range_is_not_sent_again() -> None:
    """A wrong key is wrong on every rail."""
    endpoint, log = by_hand()
    first = HandRail(log, "a")
    endpoint.add("a", first)
    endpoint.add("b", HandRail(log, "b"))
    batch = make_batch(
        Opcode.READ, endpoint._owner.region, endpoint._owner.key, column(0, 8), column(0, 8), column(8, 8)
    )
    transfer = endpoint.post(batch)
    first.settle([True, False], RegionError("hand: revoked"))
    assert transfer.result(0).tolist() == [True, False]
    assert isinstance(transfer.error, RegionError)
    assert log == ["a posts [0, 8]", "a ends"]
    endpoint._owner.clock.close()


def test_ranges_that_kill_every_rail_are_given_up() -> None:
    endpoint, log = by_hand()
    batch = make_batch(Opcode.READ, endpoint._owner.region, endpoint._owner.key, column(0), column(0), column(8))
    transfer = endpoint.post(batch)
    for _ in range(100):
        if transfer.done():
            break
        rail = HandRail(log, "a")
        endpoint.add("a", rail)
        rail.abort()
    assert not transfer.result(0).any()
    assert len(log) < 20
    endpoint._owner.clock.close()


# -- memory


def test_memory_that_the_best_rail_cannot_take_goes_over_another(stack: ExitStack) -> None:
    """In one batch with memory that it can; the rail for it is connected when it is first needed."""
    sides = pair(stack, shm_and_tcp, "shm=|tcp=127.0.0.1:0")
    foreign = np.full(SIZE, 9, dtype=np.uint8)
    key = sides.right.export(sides.right.register(Memory.of(foreign)), Rights.READ)
    assert sides.here.living == ("shm",)
    batch = TransferBatch(
        Opcode.READ, [sides.local], [sides.key, key],
        column(0, 0, 0), column(0, SIZE, 2 * SIZE), column(0, 1, 0), column(0, 0, 2 * SIZE), column(SIZE, SIZE, SIZE),
    )  # fmt: skip
    assert sides.here.post(batch, timeout=PATIENCE_S).result(PATIENCE_S).all()
    got, theirs = sides.mine.array().reshape(N, SIZE), sides.theirs.array().reshape(N, SIZE)
    assert np.array_equal(got[0], theirs[0])
    assert (got[1] == 9).all()
    assert np.array_equal(got[2], theirs[2])
    assert sides.here.living == ("shm", "tcp")


def test_the_end_that_accepted_reads_such_memory_once_it_can_be_reached(stack: ExitStack) -> None:
    sides = pair(stack, shm_and_tcp, "shm=|tcp=127.0.0.1:0")
    foreign = np.full(SIZE, 9, dtype=np.uint8)
    key = sides.left.export(sides.left.register(Memory.of(foreign)), Rights.READ)
    local = sides.right.register(memory_of(SIZE, 4))
    transfer = sides.there.post(
        make_batch(Opcode.READ, local, key, column(0), column(0), column(SIZE)), timeout=PATIENCE_S
    )
    sides.here.reach(key)
    assert transfer.result(PATIENCE_S).all()
    assert (local.memory.array() == 9).all()


def test_memory_that_no_rail_can_take_is_refused_at_once(stack: ExitStack) -> None:
    shm = {"shm": ShmTransport(threads=1)}
    sides = pair(stack, lambda: {"shm": ShmTransport(threads=1)}, "shm=", lambda: shm)
    with pytest.raises(RegionError, match="no descriptor"):
        sides.left.export(sides.left.register(Memory.of(bytearray(8))), Rights.READ)
    with pytest.raises(ConfigError, match="cuda:0"):
        sides.left.register(Memory(4096, 64, device="cuda:0"))
    only_tcp = RemoteRegion("rails", SIZE, encode_token({"tcp": bytes(20)}))
    transfer = sides.here.post(make_batch(Opcode.READ, sides.local, only_tcp, column(0), column(0), column(SIZE)))
    assert not transfer.result(PATIENCE_S).any()
    assert isinstance(transfer.error, RegionError)


def test_a_peer_that_uses_one_transport_by_itself(stack: ExitStack) -> None:
    """It gets that transport's own endpoint, and uses that transport's keys."""
    right = stack.enter_context(RailsTransport(two_tcp()))
    listener = right.listen(TCP)
    with TcpTransport() as plain:
        here = plain.connect(listener.addresses["a"], timeout=PATIENCE_S, ticket=b"plain")
        there = listener.accept(timeout=PATIENCE_S)
        assert (there.scheme, there.ticket) == ("tcp", b"plain")
        assert not here.closed()


# -- names, addresses, keys


@pytest.mark.parametrize("rails", [{}, {"": None}, {"a|b": None}, {"a=b": None}])
def test_rails_want_names(rails: dict) -> None:
    with pytest.raises(ConfigError):
        RailsTransport(rails)


@pytest.mark.parametrize("address", ["", "127.0.0.1:1", "a=x|a=y", "=x", "a", "c=127.0.0.1:1"])
def test_addresses_that_are_none(address: str) -> None:
    with RailsTransport({"a": InprocTransport()}) as transport, pytest.raises((ConfigError, TransportError)):
        transport.connect(address, timeout=1.0)
    with RailsTransport({"a": InprocTransport()}) as transport, pytest.raises(ConfigError):
        transport.listen(address)


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|="), min_size=1, max_size=8)


@given(
    st.dictionaries(
        NAMES, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|")), min_size=1, max_size=5
    )
)
def test_addresses_come_back(addresses: dict[str, str]) -> None:
    assert decode_address(encode_address(addresses)) == addresses


@given(st.binary(min_size=16, max_size=16), st.booleans(), st.binary(max_size=32))
def test_tickets_come_back(group: bytes, first: bool, ticket: bytes) -> None:
    rail = RailTicket(group, first, ticket)
    assert RailTicket.decode(rail.encode()) == rail
    assert len(rail.encode()) <= 64


@given(st.binary(max_size=64))
def test_any_other_ticket_is_none_of_ours(raw: bytes) -> None:
    rail = RailTicket.decode(raw)
    assert rail is None or rail.encode() == raw


@given(st.dictionaries(NAMES, st.binary(max_size=40), max_size=5), st.data())
def test_an_altered_key_is_refused(tokens: dict[str, bytes], data: st.DataObject) -> None:
    raw = encode_token(tokens)
    assert decode_token(raw) == tokens
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    altered = bytearray(raw)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RegionError):
        decode_token(bytes(altered))


@given(st.binary(max_size=80))
def test_a_key_that_is_none_is_refused(raw: bytes) -> None:
    with pytest.raises(RegionError):
        decode_token(raw)


# -- shares


SIZES = st.lists(st.integers(1, 1 << 22), min_size=1, max_size=200)
METERS = st.lists(st.tuples(st.integers(0, 1 << 30), st.none() | st.floats(1e3, 1e11)), min_size=1, max_size=5)


@given(SIZES, METERS)
def test_every_range_goes_to_one_rail(sizes: list[int], known: list[tuple[int, float | None]]) -> None:
    meters = []
    for outstanding, rate in known:
        meter = Meter()
        meter.outstanding, meter.rate = outstanding, rate
        meters.append(meter)
    runs = split(np.array(sizes, dtype=np.int64), meters)
    assert len(runs) == len(meters)
    assert [i for run in runs for i in range(len(sizes))[run]] == list(range(len(sizes)))


@given(st.lists(st.floats(1e8, 1e10), min_size=2, max_size=4))
def test_each_gets_what_its_speed_allows(rates: list[float]) -> None:
    n, size = 4096, 64 << 10
    meters = [Meter() for _ in rates]
    for meter, rate in zip(meters, rates, strict=True):
        meter.rate = rate
    runs = split(np.full(n, size, dtype=np.int64), meters)
    counted = np.maximum(rates, 0.05 * max(rates))
    for run, rate in zip(runs, counted, strict=True):
        assert abs(len(range(n)[run]) - n * rate / counted.sum()) <= 2


def test_who_has_much_under_way_gets_less() -> None:
    idle, busy = Meter(), Meter()
    idle.rate = busy.rate = 1e9
    sizes = np.full(100, 1 << 20, dtype=np.int64)
    busy.outstanding = 50 << 20
    first, second = (len(range(100)[run]) for run in split(sizes, [idle, busy]))
    assert (first, second) == (75, 25)
    busy.outstanding = 200 << 20
    assert split(sizes, [idle, busy]) == [slice(0, 100), slice(100, 100)]


def test_little_is_not_split() -> None:
    slow, fast = Meter(), Meter()
    slow.rate, fast.rate = 1e8, 1e9
    sizes = np.full(4, MIN_SPLIT_NBYTES // 8, dtype=np.int64)
    assert [len(range(4)[run]) for run in split(sizes, [slow, fast])] == [0, 4]


def test_a_rate_is_that_of_the_time_at_work() -> None:
    """What waited behind others is not slow for that."""
    now = [0.0]
    meter = Meter(lambda: now[0])
    first, second = meter.begin(1000), meter.begin(1000)
    now[0] = 1.0
    meter.end(1000, first, whole=True)
    now[0] = 2.0
    meter.end(1000, second, whole=True)
    assert meter.rate == pytest.approx(1000)
    assert meter.outstanding == 0
    failed = meter.begin(10_000)
    now[0] = 2.1
    meter.end(10_000, failed, whole=False)
    assert meter.rate == pytest.approx(1000)
