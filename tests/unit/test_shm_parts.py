"""The shm transport's parts: what may be mapped, what a key is worth and how long, packets that make no sense."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvrdma.auth import Role
from kvrdma.errors import CapacityError, ConfigError, ProtocolError, RegionError, TransportError
from kvrdma.memory import MemfdSlabs, Memory
from kvrdma.testing.transports import PATIENCE_S, HeldLease, column, make_batch
from kvrdma.transports import Endpoint, MemoryRegion, Opcode, RemoteRegion, Rights, negotiate
from kvrdma.transports.regions import TOKEN_NBYTES, RangeStatus
from kvrdma.transports.shm import ShmTransport, copying, wire
from kvrdma.transports.shm import transport as transport_module
from kvrdma.transports.shm.keys import MAX_KEYS, LiveKeys
from kvrdma.transports.shm.mapping import map_shared, open_to_share
from kvrdma.transports.shm.transport import this_host

NBYTES = 1 << 16
BOTH = Rights.READ | Rights.WRITE


def slab(nbytes: int = NBYTES) -> Memory:
    return MemfdSlabs(lock=False, huge=False).allocate(nbytes)


class Pair:
    """Two transports of one process, connected; the right one's memory is what the left one uses."""

    def __init__(self) -> None:
        self.left, self.right = ShmTransport(threads=1), ShmTransport(threads=1)
        listener = self.right.listen("")
        self.here = self.left.connect(listener.contact_address, timeout=PATIENCE_S)
        self.there = listener.accept(timeout=PATIENCE_S)
        self.mine, self.theirs = slab(), slab()
        self.mine.array()[:] = 1
        self.theirs.array()[:] = 2
        self.local = self.left.register(self.mine)
        self.remote = self.right.register(self.theirs)

    def move(self, opcode: Opcode, key: RemoteRegion, nbytes: int = NBYTES) -> tuple[bool, Exception | None]:
        batch = make_batch(opcode, self.local, key, column(0), column(0), column(nbytes))
        transfer = self.here.post(batch)
        return bool(transfer.result(PATIENCE_S).all()), transfer.error

    def close(self) -> None:
        self.left.close()
        self.right.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.closing(Pair()) as both:
        yield both


def descriptors() -> Counter[str]:
    """What is open, but for sockets of earlier tests that are still being closed."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return Counter(name for name in found if "memfd" in name or "socket" in name)


# -- memory


def test_only_memory_with_a_descriptor_is_exported(pair: Pair) -> None:
    region = pair.right.register(Memory.of(bytearray(64)))
    with pytest.raises(RegionError, match="no descriptor"):
        pair.right.export(region, Rights.READ)


def test_memory_that_could_shrink_is_not_exported(pair: Pair) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    array = np.frombuffer(mmap.mmap(fd, NBYTES), dtype=np.uint8)
    region = pair.right.register(Memory(array.ctypes.data, NBYTES, keepalive=array, fd=fd))
    with pytest.raises(RegionError, match="not sealed against shrinking"):
        pair.right.export(region, Rights.READ)
    os.close(fd)


def test_a_descriptor_shorter_than_its_memory_is_not_exported(pair: Pair) -> None:
    short = slab()
    region = pair.right.register(replace(short, nbytes=2 * NBYTES))
    with pytest.raises(RegionError, match=f"has {NBYTES} bytes, {2 * NBYTES} are needed"):
        pair.right.export(region, Rights.READ)


def test_any_memory_can_be_read_into(pair: Pair) -> None:
    target = np.zeros(NBYTES, dtype=np.uint8)
    pair.local = pair.left.register(Memory.of(target))
    assert pair.move(Opcode.READ, pair.right.export(pair.remote, Rights.READ)) == (True, None)
    assert (target == 2).all()


def test_device_memory_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match="cuda:0"):
        pair.left.register(Memory(4096, 64, device="cuda:0"))


@pytest.mark.parametrize("seals", [0, 0x0004], ids=["no seal", "sealed against growing only"])
def test_a_peers_memory_that_could_shrink_is_not_mapped(seals: int) -> None:
    """Its ftruncate would be our SIGBUS."""
    fd = os.memfd_create("peer", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, NBYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(TransportError, match="not sealed against shrinking"):
        map_shared(fd, NBYTES)
    os.close(fd)


def test_a_peers_file_is_not_mapped() -> None:
    with tempfile.TemporaryFile(dir="/tmp") as file:
        file.truncate(NBYTES)
        with pytest.raises(TransportError, match=r"not that of a memfd|not sealed"):
            map_shared(file.fileno(), NBYTES)
    reading, writing = os.pipe()
    with pytest.raises(TransportError, match="not that of a memfd"):
        map_shared(reading, NBYTES)
    os.close(reading)
    os.close(writing)


def test_a_peers_memory_is_as_long_as_it_says_or_not_mapped() -> None:
    memory = slab()
    assert memory.fd is not None
    with pytest.raises(TransportError, match=f"{NBYTES} bytes, {NBYTES + 1} are needed"):
        map_shared(memory.fd, NBYTES + 1)


def test_a_key_that_reads_gives_nothing_to_write_with() -> None:
    """Neither a mapping nor the descriptor itself; and the file cannot be opened anew by other users."""
    memory = slab()
    fd = open_to_share(memory, Rights.READ)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, NBYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="descriptor"):
        os.write(fd, b"x")
    with pytest.raises(TransportError, match="Permission denied"):
        map_shared(fd, NBYTES, write=True)
    assert os.fstat(fd).st_mode & 0o077 == 0
    mapping = map_shared(fd, NBYTES)
    os.close(fd)
    assert protection_of(mapping.address).startswith("r--s")
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    place = ctypes.c_void_p(mapping.address), ctypes.c_size_t(NBYTES)
    assert protect(*place, mmap.PROT_READ | mmap.PROT_WRITE) == -1  # not even later
    assert ctypes.get_errno() == errno.EACCES


def protection_of(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, protection = line.split()[:2]
        first, last = (int(part, 16) for part in where.split("-"))
        if first <= address < last:
            return protection
    return "none"


def test_a_mapping_goes_with_its_last_view() -> None:
    memory = slab()
    assert memory.fd is not None
    mapping = map_shared(memory.fd, NBYTES)
    address, view = mapping.address, mapping.array[16:32]
    del mapping
    assert protection_of(address) == "r--s"
    assert not view.any()
    del view
    assert protection_of(address) == "none"


# -- keys


@pytest.mark.parametrize("opcode", Opcode)
@pytest.mark.parametrize("how", ["revoke", "deregister"])
def test_a_key_that_was_used_already_is_worth_nothing_once_revoked(pair: Pair, opcode: Opcode, how: str) -> None:
    """Though the memory is mapped by then."""
    key, other = pair.right.export(pair.remote, BOTH), pair.right.export(pair.remote, BOTH)
    assert pair.move(opcode, key, 64) == (True, None)
    if how == "revoke":
        pair.right.revoke(key)
    else:
        pair.right.deregister(pair.remote)
    before = pair.mine.array().copy(), pair.theirs.array().copy()
    for _ in range(2):
        ok, error = pair.move(opcode, key)
        assert not ok
        assert isinstance(error, RegionError)
    assert np.array_equal(pair.mine.array(), before[0])
    assert np.array_equal(pair.theirs.array(), before[1])
    assert pair.move(opcode, other)[0] is (how == "revoke")


def test_what_was_copied_while_its_key_ended_does_not_count(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch with two keys, one of which is revoked in the middle of the copy, the other's ranges count."""
    ending, staying = (pair.right.export(pair.remote, Rights.READ) for _ in range(2))
    memmove = ctypes.memmove

    def revoke_then_copy(target: int, source: int, nbytes: int) -> None:
        pair.right.revoke(ending)
        memmove(target, source, nbytes)

    rows, offsets = column(0, 1, 0, 1), column(0, 64, 128, 192)
    batch = make_batch(Opcode.READ, pair.local, ending, offsets, offsets, column(64, 64, 64, 64))
    batch = replace(batch, remote=[ending, staying], remote_rows=rows)
    monkeypatch.setattr(copying.ctypes, "memmove", revoke_then_copy)
    transfer = pair.here.post(batch)
    assert transfer.result(PATIENCE_S).tolist() == [False, True, False, True]
    assert isinstance(transfer.error, RegionError)


def test_keys_are_used_again_by_none_of_those_that_had_them(pair: Pair) -> None:
    """A slot of the page has another number when it is taken again."""
    old = pair.right.export(pair.remote, Rights.READ)
    assert pair.move(Opcode.READ, old)[0]
    pair.right.revoke(old)
    new = pair.right.export(pair.remote, Rights.READ)
    assert not pair.move(Opcode.READ, old)[0]
    assert pair.move(Opcode.READ, new)[0]


def test_too_many_keys(pair: Pair) -> None:
    keys = [pair.right.export(pair.remote, Rights.READ) for _ in range(MAX_KEYS)]
    with pytest.raises(CapacityError, match=f"{MAX_KEYS} keys"):
        pair.right.export(pair.remote, Rights.READ)
    pair.right.revoke(keys[17])
    assert pair.move(Opcode.READ, pair.right.export(pair.remote, Rights.READ))[0]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_a_key_lives_from_add_to_end(steps: list[tuple[bool, int]]) -> None:
    keys = LiveKeys()
    living: dict[int, int] = {}
    numbers = iter(range(1, 1000))
    for add, which in steps:
        if add:
            number = next(numbers)
            keys.add(number)
            slot = keys.slot(number)
            assert slot is not None
            assert slot not in living.values()
            living[number] = slot
        elif living:
            number = sorted(living)[which % len(living)]
            slot = living.pop(number)
            keys.end(number)
            keys.end(number)
            assert keys.slot(number) is None
            assert keys._words[slot] == 0
        assert all(keys._words[slot] == number for number, slot in living.items())
        assert np.count_nonzero(keys._words) == len(living)
    keys.close()


# -- who gets in


def test_another_user_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """By either end, and told why; nothing is said before."""
    with ShmTransport() as left, ShmTransport() as right:
        listener = right.listen("")
        monkeypatch.setattr(transport_module, "_CREDENTIALS", _SomebodyElse())
        with pytest.raises(TransportError, match=r"belongs to user 54321.*only processes of one user"):
            left.connect(listener.contact_address, timeout=PATIENCE_S)
        monkeypatch.undo()
        left.connect(listener.contact_address, timeout=PATIENCE_S)


class _SomebodyElse:
    size = struct.calcsize("3i")

    def unpack(self, raw: bytes) -> tuple[int, int, int]:
        return 1, 54321, 54321


@pytest.mark.parametrize("address", ["elsewhere/kvrdma-1", "127.0.0.1:7700", "", "a b", "x" * 200])
def test_an_address_of_nobody_here(address: str) -> None:
    with ShmTransport() as transport, pytest.raises((TransportError, ConfigError)):
        transport.connect(address, timeout=1.0)
    assert not ShmTransport.can_reach(address)


def test_another_host_is_not_chosen() -> None:
    """Its offer is left, with the reason; the next one is taken."""
    with ShmTransport() as transport:
        here = transport.listen("").contact_address
        assert [cls.scheme for cls, _ in negotiate([("tcp", "h:1"), ("shm", here)])] == ["shm", "tcp"]
    name = here.partition("/")[2]
    boot, _, network = this_host().rpartition(".")
    for host in (f"{boot}.{int(network) + 1}", f"00000000-{boot[9:]}.{network}"):
        offers = [("shm", f"{host}/{name}"), ("tcp", "h:1")]
        assert [cls.scheme for cls, _ in negotiate(offers)] == ["tcp"]
        with pytest.raises(TransportError, match=r"shm: .* cannot be reached from here"):
            negotiate(offers, ["shm"])


# -- packets


@given(st.binary(max_size=wire.MAX_PACKET))
def test_a_packet_is_read_or_refused(packet: bytes) -> None:
    for decode in (wire.decode, wire.Greeting.decode, wire.decode_challenge):
        with contextlib.suppress(ProtocolError):
            decode(packet)


@given(
    st.binary(min_size=TOKEN_NBYTES, max_size=TOKEN_NBYTES),
    st.sampled_from(RangeStatus),
    st.sampled_from([Rights.READ, Rights.WRITE, BOTH]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(1, 2**63),
)
def test_packets_come_back_as_they_were(
    token: bytes, status: RangeStatus, rights: Rights, slot: int, number: int, nbytes: int
) -> None:
    for packet in (wire.Ask(token), wire.Answer(token, status, rights, slot, number, nbytes)):
        assert wire.decode(packet.encode()) == packet
        with pytest.raises(ProtocolError):
            wire.decode(packet.encode() + b"\0")
        with pytest.raises(ProtocolError):
            wire.decode(packet.encode()[:-1])


class ByHand:
    """A peer whose packets a test writes: it has greeted a transport, and owns the socket."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect("\0" + address.partition("/")[2])
        greeting = wire.Greeting(b"")
        self.sock.send(greeting.encode())
        challenge = wire.decode_challenge(self.sock.recv(wire.MAX_PACKET))
        self.sock.send(greeting.prove(Role.CLIENT, b"", challenge))
        assert self.sock.recv(wire.MAX_PACKET)


class Hand:
    """A transport, its end of a connection, memory of its own, and the peer by hand."""

    def __init__(self, transport: ShmTransport) -> None:
        listener = transport.listen("")
        self.peer = ByHand(listener.contact_address)
        self.endpoint: Endpoint = listener.accept(timeout=PATIENCE_S)
        self.array: NDArray[np.uint8] = np.zeros(NBYTES, dtype=np.uint8)
        self.region: MemoryRegion = transport.register(Memory.of(self.array))
        self.gone = threading.Event()
        self.endpoint.add_close_callback(self.gone.set)


@pytest.fixture
def hand() -> Iterator[Hand]:
    with ShmTransport(threads=1) as transport:
        made = Hand(transport)
        yield made
        made.peer.sock.close()


TOKEN = b"t" * TOKEN_NBYTES


def ask_of(hand: Hand) -> tuple[HeldLease, object]:
    """Have our end ask for the memory behind a key."""
    held = HeldLease()
    remote = RemoteRegion("shm", NBYTES, TOKEN)
    batch = make_batch(Opcode.READ, hand.region, remote, column(0), column(0), column(NBYTES))
    transfer = hand.endpoint.post(batch, hold=held.lease)
    held.lease.release()
    assert wire.decode(hand.peer.sock.recv(wire.MAX_PACKET)) == wire.Ask(TOKEN)
    return held, transfer


def good_answer(slot: int = 0) -> wire.Answer:
    return wire.Answer(TOKEN, RangeStatus.OK, Rights.READ, slot, 7, NBYTES)


@pytest.mark.parametrize(
    ("answer", "fds"),
    [
        (good_answer(), []),
        (good_answer(), ["slab"]),
        (good_answer(), ["file", "keys"]),
        (good_answer(), ["slab", "file"]),
        (good_answer(), ["slab", "slab"]),
        (good_answer(), ["unsealed", "keys"]),
        (good_answer(slot=MAX_KEYS), ["slab", "keys"]),
        (replace(good_answer(), nbytes=1 << 62), ["slab", "keys"]),
        (replace(good_answer(), rights=BOTH), ["read only", "keys"]),
        (replace(good_answer(), token=b"u" * TOKEN_NBYTES), ["slab", "keys"]),
        (b"\x02short", []),
        (b"\x09" + bytes(40), []),
        (bytes(wire.MAX_PACKET + 1), []),
    ],
)
def test_an_answer_that_makes_no_sense_ends_the_connection(
    hand: Hand, answer: wire.Answer | bytes, fds: list[str]
) -> None:
    """The transfer fails, its lease is let go, nothing is written, and no descriptor stays open."""
    held, transfer = ask_of(hand)
    keys = LiveKeys()
    memory = slab(4096 if fds == ["slab", "slab"] else NBYTES)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, NBYTES)
    file = os.open("/dev/null", os.O_RDWR)
    read_only = open_to_share(memory, Rights.READ)
    known = {"slab": memory.fd, "keys": keys.fd, "file": file, "unsealed": unsealed, "read only": read_only}
    before = descriptors()
    raw = answer if isinstance(answer, bytes) else answer.encode()
    socket.send_fds(hand.peer.sock, [raw], [known[name] for name in fds])
    assert not transfer.result(PATIENCE_S).any()
    assert isinstance(transfer.error, TransportError)
    assert hand.gone.wait(PATIENCE_S)
    assert held.ends == 1
    assert not hand.array.any()
    hand.endpoint.abort()
    assert not descriptors() - before
    for fd in (unsealed, file, read_only):
        os.close(fd)
    keys.close()


def test_an_answer_by_hand_that_makes_sense(hand: Hand) -> None:
    """So that the test above fails for its own reasons."""
    _, transfer = ask_of(hand)
    keys, memory = LiveKeys(), slab()
    memory.array()[:] = 3
    keys.add(7)
    answer = good_answer(slot=keys.slot(7))
    socket.send_fds(hand.peer.sock, [answer.encode()], [memory.fd, keys.fd])
    assert transfer.result(PATIENCE_S).all()
    assert (hand.array == 3).all()
    keys.close()


def test_a_peer_that_asks_and_does_not_read_is_left(hand: Hand) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            hand.peer.sock.send(wire.Ask(TOKEN).encode())
    assert hand.gone.wait(PATIENCE_S)


@pytest.mark.parametrize("packet", [b"x", b"kvrtcp" + bytes(60), wire.Greeting(b"").encode()[:-1]])
def test_a_greeting_that_is_none(packet: bytes) -> None:
    """That peer is left; the next one is served."""
    with ShmTransport() as transport, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        listener = transport.listen("")
        sock.settimeout(PATIENCE_S)
        sock.connect("\0" + listener.contact_address.partition("/")[2])
        sock.send(packet)
        while sock.recv(wire.MAX_PACKET):
            pass
        ByHand(listener.contact_address).sock.close()


def test_nothing_is_left_open(pair: Pair) -> None:
    """Descriptors and mappings of a connection go with it."""
    before = descriptors()
    listener = pair.right.listen("")
    for _ in range(5):
        endpoint = pair.left.connect(listener.contact_address, timeout=PATIENCE_S)
        other = listener.accept(timeout=PATIENCE_S)
        key = pair.right.export(pair.remote, Rights.READ)
        batch = make_batch(Opcode.READ, pair.local, key, column(0), column(0), column(64))
        assert endpoint.post(batch).result(PATIENCE_S).all()
        endpoint.close()
        other.abort()
    listener.close()
    pair.left._loop.run(lambda: None)  # what the ends have asked of it is done
    pair.right._loop.run(lambda: None)
    assert not descriptors() - before
