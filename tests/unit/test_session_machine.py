"""What holds for the server's leases and reservations whatever its clients do and whenever they go.

Sessions share one store, on an event loop whose clock the machine moves. A client's data connection is a held one:
the machine says when a transfer lands, what of it, and in which order; until then its memory must stay reserved.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvrdma import protocol
from kvrdma.backends import PutStatus
from kvrdma.backends.blockstore import BlockStore, Entry
from kvrdma.errors import ClosedError
from kvrdma.keys import KEY_NBYTES, KeySpace
from kvrdma.layout import Bitmap, Shard, checksum
from kvrdma.memory import MemfdSlabs, Memory
from kvrdma.policies.lru import LruPolicy
from kvrdma.protocol import Message
from kvrdma.server.session import ATTACH_TIMEOUT_S, ClientSession, Slabs
from kvrdma.transports import Endpoint, MemoryRegion, RemoteRegion, Transfer, TransferBatch

SLAB = 16 << 10
SIZES = (4 << 10, 6 << 10)  # four, and two, a slab
N_KEYS = 10
LEASE_S = 10.0
SPACE = KeySpace("m", "w", "c", "bfloat16", "a", head_size=64, layers=2, block_tokens=4)
SHARD = Shard(0, 0, 2, 0, 1).encode()
KEYS = [bytes([number]) * KEY_NBYTES for number in range(N_KEYS)]


class SteppedLoop(asyncio.SelectorEventLoop):
    """Its time passes when it is told to."""

    now = 1000.0

    def time(self) -> float:
        return self.now


class Inline(ThreadPoolExecutor):
    """Does at once what it is given."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return _Now().submit(call, *args, **kwargs)


class _Now(Executor):
    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(eq=False)
class Posted:
    """A transfer that has not landed."""

    batch: TransferBatch
    transfer: Transfer

    def ranges(self) -> list[tuple[int, int, int]]:
        """The slab (by id), first byte and size of what each row writes."""
        batch = self.batch
        rows = zip(batch.local_rows, batch.local_offsets, batch.nbytes, strict=True)
        return [(id(batch.local[row].memory), int(first), int(nbytes)) for row, first, nbytes in rows]


class HeldEndpoint(Endpoint):
    """Moves bytes when it is told to. `on_end` sees each transfer while it is not terminal yet."""

    scheme: ClassVar[str] = "held"
    peer = "client"
    ticket = b"ticket"

    def __init__(self, memories: dict[bytes, np.ndarray], on_end: Callable[[Posted], None]) -> None:
        self.memories = memories
        self.posted: list[Posted] = []
        self._on_end = on_end
        self._closed = False

    def post(self, batch: TransferBatch, **_: Any) -> Transfer:
        if self._closed:
            raise ClosedError("held: closed")
        self.posted.append(Posted(batch, Transfer(len(batch))))
        return self.posted[-1].transfer

    def land(self, pick: int, ok: Sequence[bool]) -> None:
        """Let those rows of a transfer arrive, and end it."""
        posted = self.posted.pop(pick % len(self.posted))
        batch = posted.batch
        good: Bitmap = np.resize(np.array(ok, dtype=np.bool_), len(batch))
        for i in np.flatnonzero(good):
            n, here, there = int(batch.nbytes[i]), int(batch.local_offsets[i]), int(batch.remote_offsets[i])
            source = self.memories[batch.remote[batch.remote_rows[i]].token]
            batch.local[batch.local_rows[i]].memory.array()[here : here + n] = source[there : there + n]
        self._on_end(posted)
        posted.transfer.finish(good, None if good.all() else ClosedError("held: some did not arrive"))

    def abort(self) -> None:
        self._closed = True
        while self.posted:
            self.land(0, [False])

    def close(self, *, timeout: float = 5.0) -> None:
        self.abort()

    def closed(self) -> bool:
        return self._closed

    def add_close_callback(self, callback: Callable[[], None]) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class Put:
    """What the model knows of a put that was not answered."""

    names: list[bytes]
    existed: list[bool]
    reserved: dict[bytes, Entry]
    content: dict[bytes, np.ndarray]
    checksums_fit: dict[bytes, bool]
    deadline: float
    landed: dict[bytes, bool] | None = None


@dataclass(eq=False)
class Client:
    session: ClientSession
    inbox: list[Message] = field(default_factory=list)
    keyspace: int = 0
    endpoint: HeldEndpoint | None = None
    memories: dict[bytes, np.ndarray] = field(default_factory=dict)
    puts: dict[int, Put] = field(default_factory=dict)
    gets: dict[int, tuple[float, list[bytes]]] = field(default_factory=dict)
    leases: dict[int, tuple[float, list[Entry]]] = field(default_factory=dict)


picks = st.integers(0, 1000)
numbers = st.lists(st.integers(0, N_KEYS - 1), min_size=1, max_size=6, unique=True)
flags = st.just([True]) | st.lists(st.booleans(), min_size=1, max_size=6)
sizes = st.sampled_from(SIZES)


class SessionMachine(RuleBasedStateMachine):
    @initialize(n_slabs=st.integers(1, 3))
    def start(self, n_slabs: int) -> None:
        self.n_slabs = n_slabs
        self.loop = SteppedLoop()
        self.loop.set_default_executor(Inline(1))
        self.store = BlockStore(n_slabs * SLAB, LruPolicy, slab_nbytes=SLAB, source=MemfdSlabs(lock=False))
        memories = self.store.reserve_of_slabs.slabs
        self.slabs = Slabs(
            {id(memory): MemoryRegion(memory, i) for i, memory in enumerate(memories)},
            {id(memory): RemoteRegion("held", memory.nbytes, bytes([i])) for i, memory in enumerate(memories)},
        )
        self.memories: list[Memory] = list(memories)
        self.clients: list[Client] = []
        self.content: dict[int, np.ndarray] = {}  # by generation
        self.expired = 0
        self.leased: list[Entry] = []
        self.seq = 0
        self.connect(True)

    # -- what clients do

    @precondition(lambda self: len(self.clients) < 3)
    @rule(attached=st.booleans())
    def connect(self, attached: bool) -> None:
        async def make() -> ClientSession:
            return ClientSession("peer", b"t", self.store, lambda _: self.slabs, inbox.append, lease_s=LEASE_S)

        inbox: list[Message] = []
        client = Client(self.loop.run_until_complete(make()), inbox)
        self.clients.append(client)
        self._handle(client, protocol.OpenKeySpace(self._number(), SPACE.to_fields(), SPACE.digest))
        if attached:
            self.attach(len(self.clients) - 1)

    @precondition(lambda self: self.clients)
    @rule(pick=picks)
    def attach(self, pick: int) -> None:
        """A data connection comes; a second one is turned away."""
        client = self._client(pick)
        endpoint = HeldEndpoint(client.memories, self._still_reserved)
        client.session.attach(endpoint)
        assert endpoint.closed() == (client.endpoint is not None)
        client.endpoint = client.endpoint or endpoint
        self._drain()
        assert not client.gets

    @precondition(lambda self: self.clients)
    @rule(pick=picks, numbers=numbers, size=sizes, right=flags, timeout=st.sampled_from([2, 20, 200]))
    def put(self, pick: int, numbers: list[int], size: int, right: list[bool], timeout: int) -> None:
        client, seq = self._client(pick), self._number()
        n = len(numbers)
        content = np.full((n, size), seq % 256, dtype=np.uint8)
        content[:, 0] = numbers
        names = [KEYS[number] + SHARD for number in numbers]
        fits = np.resize(right, n).tolist()
        sums = [
            checksum(KEYS[number], SHARD, [row]) ^ (not fit)
            for number, row, fit in zip(numbers, content, fits, strict=True)
        ]
        token = seq.to_bytes(4, "big")
        client.memories[token] = content.reshape(-1)
        rows = np.arange(n, dtype=np.int64)
        before = dict(self.store._reserved)
        put = Put(
            names,
            [self.store.has(name) for name in names],
            {},
            dict(zip(names, content, strict=True)),
            dict(zip(names, fits, strict=True)),
            self.loop.now + min(timeout, 120),
        )
        client.puts[seq] = put
        message = protocol.PutRequest(
            seq,
            client.keyspace,
            SHARD,
            b"".join(KEYS[number] for number in numbers),
            np.array(sums, dtype="<u8").tobytes(),
            [["held", content.size, token]],
            protocol.pack_columns(rows, np.zeros_like(rows), rows * size, np.full_like(rows, size)),
            timeout * 1000,
        )
        self._turns(1, lambda: client.session.handle(message))  # the put has begun, and its reservation is made
        put.reserved = {name: entry for name, entry in self.store._reserved.items() if before.get(name) is not entry}
        assert put.reserved.keys() <= set(names) - before.keys()
        assert not any(existed and name in put.reserved for name, existed in zip(names, put.existed, strict=True))
        self._drain()

    @precondition(lambda self: any(client.endpoint for client in self.clients))
    @rule(pick=picks, numbers=numbers, size=sizes)
    def store_whole(self, pick: int, numbers: list[int], size: int) -> None:
        """A put that nothing comes between."""
        attached = [i for i, client in enumerate(self.clients) if client.endpoint]
        i = attached[pick % len(attached)]
        n_puts, endpoint = len(self.clients[i].puts), self.clients[i].endpoint
        self.put(i, numbers, size, [True], 200)
        if len(self.clients[i].puts) > n_puts and endpoint is not None:
            endpoint.land(-1, [True])
            self._drain()
        assert len(self.clients[i].puts) == n_puts

    @precondition(lambda self: any(client.endpoint and client.endpoint.posted for client in self.clients))
    @rule(pick=picks, which=picks, ok=flags)
    def land(self, pick: int, which: int, ok: list[bool]) -> None:
        """A transfer ends, whole or not, and the put with it."""
        busy = [client for client in self.clients if client.endpoint and client.endpoint.posted]
        client = busy[pick % len(busy)]
        n_puts = len(client.puts)
        assert client.endpoint is not None
        client.endpoint.land(which, ok)
        self._drain()
        assert len(client.puts) == n_puts - 1

    @precondition(lambda self: self.clients)
    @rule(pick=picks, numbers=numbers)
    def get(self, pick: int, numbers: list[int]) -> None:
        client, seq = self._client(pick), self._number()
        keys = [KEYS[number] for number in numbers]
        client.gets[seq] = (self.loop.now + ATTACH_TIMEOUT_S, [key + SHARD for key in keys])
        self._handle(client, protocol.GetRequest(seq, client.keyspace, SHARD, b"".join(keys)))
        assert (seq in client.gets) == (client.endpoint is None)

    @precondition(lambda self: any(client.leases for client in self.clients))
    @rule(pick=picks, which=picks, bad=st.just([False]) | flags, another=picks)
    def release(self, pick: int, which: int, bad: list[bool], another: int) -> None:
        """A lease ends, and some of its blocks are said to be wrong; of blocks not in it that says nothing."""
        readers = [client for client in self.clients if client.leases]
        client = readers[pick % len(readers)]
        lease = list(client.leases)[which % len(client.leases)]
        _, entries = client.leases.pop(lease)
        wrong = [entry for entry, is_bad in zip(entries, np.resize(bad, len(entries)), strict=True) if is_bad]
        known = sorted(entry.generation for entry in self.store._entries.values()) or [0]
        other = known[another % len(known)]
        generations = np.array([*(entry.generation for entry in wrong), other], dtype=np.int64)
        n_blocks, there = self.store.stats()["blocks"], {entry for entry in wrong if not entry.gone}
        n_dropped = len(there | {entry for entry in entries if entry.generation == other and not entry.gone})
        self._handle(client, protocol.Release(0, lease, generations.tobytes()))
        assert all(entry.gone for entry in wrong)
        assert self.store.stats()["blocks"] == n_blocks - n_dropped

    @precondition(lambda self: self.clients)
    @rule(pick=picks, lease=st.integers(0, 5), generation=st.integers(0, 50))
    def release_what_is_not_held(self, pick: int, lease: int, generation: int) -> None:
        client = self._client(pick)
        if lease not in client.leases:
            before = self.store.stats()
            self._handle(client, protocol.Release(0, lease, np.array([generation], dtype=np.int64).tobytes()))
            assert self.store.stats() == before

    @precondition(lambda self: self.clients)
    @rule(pick=picks, numbers=numbers)
    def delete(self, pick: int, numbers: list[int]) -> None:
        client = self._client(pick)
        keys = [KEYS[number] for number in numbers]
        n = sum(self.store.has(key + SHARD) for key in keys)
        self._handle(client, protocol.DeleteRequest(self._number(), client.keyspace, b"".join(keys)))
        reply = client.inbox.pop()
        assert isinstance(reply, protocol.DeleteReply)
        assert reply.count == n

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0, 130.0]))
    def pass_time(self, seconds: float) -> None:
        """Leases expire; what waits for a data connection is given up."""
        self.loop.now += seconds
        now = self.loop.now
        for client in self.clients:
            left = {n: lease for n, lease in client.leases.items() if lease[0] > now}
            self.expired += len(client.leases) - len(left)
            client.leases = left
        self._drain()
        for client in self.clients:
            assert all(deadline > now for deadline, _ in client.gets.values())
            assert client.endpoint or all(put.deadline > now for put in client.puts.values())

    @precondition(lambda self: self.clients)
    @rule(pick=picks)
    def disconnect(self, pick: int) -> None:
        """A client goes, in whatever phase it is."""
        client = self._client(pick)
        self.loop.run_until_complete(client.session.end())
        self._read(client)
        self.clients.remove(client)
        assert not client.puts  # and so, by what always holds, nothing of it is left
        assert not client.session.busy

    # -- what they are told

    def _handle(self, client: Client, message: Message) -> None:
        self._turns(1, lambda: client.session.handle(message))
        self._drain()

    def _drain(self) -> None:
        """Let everything happen that need not wait for time or for a transfer, and read the answers."""
        self._turns(12)
        for client in self.clients:
            self._read(client)

    def _turns(self, n: int, call: Callable[[], None] = lambda: None) -> None:
        async def turn() -> None:
            call()
            for _ in range(n):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    def _read(self, client: Client) -> None:
        waiting: list[Message] = []
        for message in client.inbox:
            match message:
                case protocol.KeySpaceReply():
                    client.keyspace = message.keyspace
                case protocol.GetReply():
                    self._leased(client, message)
                case protocol.PutReply():
                    self._answered(client.puts.pop(message.seq), message)
                case protocol.ErrorReply():
                    deadline, _ = client.gets.pop(message.seq)
                    assert deadline <= self.loop.now
                case _:
                    waiting.append(message)
        client.inbox[:] = waiting

    def _leased(self, client: Client, reply: protocol.GetReply) -> None:
        _, names = client.gets.pop(reply.seq)
        rows, offsets, sizes, generations = protocol.unpack_columns(reply.columns, 4, what="reply")
        there = [name for name, is_there in zip(names, reply.present, strict=True) if is_there]
        entries = [self.store._entries[name] for name in there]
        assert [entry.generation for entry in entries] == generations.tolist()
        for i, entry in enumerate(entries):
            memory = self.memories[reply.regions[rows[i]][2][0]]
            came = memory.array()[offsets[i] : offsets[i] + sizes[i]]
            assert np.array_equal(came, self.content[entry.generation])
        client.leases[reply.lease] = (self.loop.now + reply.ttl_ms / 1000, entries)
        self.leased += entries

    def _answered(self, put: Put, reply: protocol.PutReply) -> None:
        """Of each block the status that its put's course explains."""
        landed = put.landed or {}
        for name, existed, status in zip(put.names, put.existed, reply.status, strict=True):
            if existed:
                assert status == PutStatus.EXISTS
            elif name not in put.reserved:
                assert status == PutStatus.DECLINED
            elif landed.get(name) and put.checksums_fit[name]:
                assert status == PutStatus.STORED
                self.content[put.reserved[name].generation] = put.content[name]
            else:
                assert status == PutStatus.FAILED

    def _still_reserved(self, posted: Posted) -> None:
        """Until a transfer is terminal, all that it may write belongs to its put."""
        puts = {(id(e.memory), e.offset, e.nbytes): (put, e) for put in self._puts() for e in put.reserved.values()}
        for row in posted.ranges():
            put, entry = puts[row]
            assert self.store._reserved[entry.name] is entry
            put.landed = put.landed or {}
            put.landed[entry.name] = bool((entry.view() == put.content[entry.name]).all())

    # -- what always holds

    @invariant()
    def every_reservation_belongs_to_a_put(self) -> None:
        entries = [entry for put in self._puts() for entry in put.reserved.values()]
        assert {entry.name: entry for entry in entries} == self.store._reserved
        assert len(entries) == self.store.stats()["reserved_blocks"]

    @invariant()
    def every_pin_belongs_to_a_lease(self) -> None:
        held = Counter(e for client in self.clients for _, entries in client.leases.values() for e in entries)
        assert all(entry.pins == held[entry] for entry in self.leased)
        assert self.store.counts["expired_leases"] == self.expired
        assert self.store.stats()["pinned_blocks"] == sum(not entry.gone for entry in held)
        for entry in held:
            assert np.array_equal(entry.view(), self.content[entry.generation])

    def teardown(self) -> None:
        """When everybody has gone nothing is held, and all the room there is can be had."""
        if not hasattr(self, "loop"):
            return
        try:
            self._all_go()
        finally:
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    def _all_go(self) -> None:
        while self.clients:
            self.disconnect(0)
        self.every_reservation_belongs_to_a_put()
        self.every_pin_belongs_to_a_lease()
        self.store.delete(set(KEYS))
        stats = self.store.stats()
        assert (stats["blocks"], stats["free_slabs"]) == (0, self.n_slabs)
        self.store.close()

    def _client(self, pick: int) -> Client:
        return self.clients[pick % len(self.clients)]

    def _puts(self) -> list[Put]:
        return [put for client in self.clients for put in client.puts.values()]

    def _number(self) -> int:
        self.seq += 1
        return self.seq


TestSessions = SessionMachine.TestCase
