"""One client of the pool server: what its messages mean, on the store. Runs on the server's event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvrdma import protocol
from kvrdma.backends import PutStatus
from kvrdma.backends.blockstore import BlockStore, Entry
from kvrdma.backends.pool import read_region
from kvrdma.errors import ConfigError, KVRDMAError, ProtocolError, TransportError
from kvrdma.keys import KEY_NBYTES, KeySpace, unpack_keys
from kvrdma.layout import SHARD_NBYTES, Bitmap, Checksums, Int64s, Shard, checksum
from kvrdma.memory import Memory
from kvrdma.metrics import Metrics, Reason
from kvrdma.protocol import Message
from kvrdma.transports import Endpoint, MemoryRegion, Opcode, Priority, RemoteRegion, Transfer, TransferBatch

logger = logging.getLogger(__name__)

MAX_LEASES: Final = 1024
MAX_LEASED_KEYS: Final = 1 << 20  # of all leases of a connection
MAX_GET_KEYS: Final = 1 << 18  # the reply of more would not fit a frame
MAX_KEYSPACES: Final = 64
MAX_KEYSPACE_NBYTES: Final = 16 << 10
MAX_SHARDS: Final = 1024
MAX_LOOKUP_PAIRS: Final = 1 << 20  # of key and shard: about 0.2 s, in which nobody else is served
MAX_PUTS: Final = 1024
MAX_PUT_NBYTES: Final = 64 << 20  # of the messages that tell of puts under way
MAX_PUT_S: Final = 120.0
ATTACH_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Slabs:
    """The server's slabs as one transport knows them."""

    regions: dict[int, MemoryRegion]  # by id of the Memory
    exports: dict[int, RemoteRegion]

    def rows(self, entries: list[Entry]) -> tuple[list[Memory], Int64s, Int64s]:
        """The memories that the entries lie in, and each one's row and offset."""
        memories: list[Memory] = []
        row_of: dict[int, int] = {}
        rows = np.empty(len(entries), dtype=np.int64)
        offsets = np.empty(len(entries), dtype=np.int64)
        for i, entry in enumerate(entries):
            memory = entry.memory
            if id(memory) not in row_of:
                row_of[id(memory)] = len(memories)
                memories.append(memory)
            rows[i] = row_of[id(memory)]
            offsets[i] = entry.offset
        return memories, rows, offsets


class ClientSession:
    """Answers one client's messages. `send` queues a message for it.

    Puts and gets wait for the client's data connection, whose ticket is `ticket`.
    """

    def __init__(
        self,
        peer: str,
        ticket: bytes,
        store: BlockStore,
        slabs: Callable[[str], Slabs],
        send: Callable[[Message], None],
        *,
        lease_s: float,
        stream_secret: bytes = b"",
        metrics: Metrics | None = None,
    ) -> None:
        self.peer = peer
        self.ticket = ticket
        self.stream_secret = stream_secret
        self.name = peer
        self._store = store
        self._slabs = slabs
        self._send = send
        self._lease_s = lease_s
        self._metrics = metrics or Metrics()
        self._keyspaces: dict[int, None] = {}  # a set that knows which one is the oldest
        self._leases: dict[int, tuple[list[Entry], asyncio.TimerHandle, float]] = {}
        self._lease_numbers = itertools.count(1)
        self._endpoint: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
        self._puts: dict[asyncio.Task[None], int] = {}  # and the bytes of their columns
        self._gets: dict[asyncio.Task[None], int] = {}  # those that wait for the data connection, and their keys
        self._handlers: dict[type[Message], Callable[[Any], Message | Awaitable[None] | None]] = {
            protocol.OpenKeySpace: self._open_keyspace,
            protocol.LookupRequest: self._lookup,
            protocol.GetRequest: self._get,
            protocol.Release: self._release,
            protocol.PutRequest: self._begin_put,
            protocol.DeleteRequest: self._delete,
        }

    @property
    def busy(self) -> bool:
        """Whether puts are under way."""
        return bool(self._puts)

    @property
    def data_scheme(self) -> str | None:
        """What moves its bytes; None where nothing does yet."""
        there = self._endpoint.done() and not self._endpoint.cancelled()
        return self._endpoint.result().scheme if there else None

    @property
    def n_leases(self) -> int:
        """How many leases the client holds."""
        return len(self._leases)

    def attach(self, endpoint: Endpoint) -> None:
        """The client's data connection is here."""
        if self._endpoint.done():
            endpoint.abort()
        else:
            self._endpoint.set_result(endpoint)

    def handle(self, message: Message) -> None:
        """Answer a message; raises `ProtocolError` where the connection must end."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} is not a request")
        answer = handler(message)
        if isinstance(answer, Message):
            self._send(answer)

    async def end(self) -> None:
        """The client is gone: its leases end, its puts are given up, its data connection is aborted."""
        if self._endpoint.done() and not self._endpoint.cancelled():
            endpoint = self._endpoint.result()
            await asyncio.get_running_loop().run_in_executor(None, endpoint.abort)
        else:
            self._endpoint.cancel()
        if self._puts or self._gets:
            await asyncio.wait({*self._puts, *self._gets})
        for lease in list(self._leases):
            self._end_lease(lease)

    # -- messages

    def _open_keyspace(self, message: protocol.OpenKeySpace) -> Message:
        if sum(len(str(part)) for named in message.fields.items() for part in named) > MAX_KEYSPACE_NBYTES:
            return protocol.ErrorReply(message.seq, f"a key space has at most {MAX_KEYSPACE_NBYTES} characters")
        try:
            keyspace = KeySpace.from_fields(message.fields)
        except ConfigError as error:
            return protocol.ErrorReply(message.seq, str(error))
        if keyspace.digest != message.digest:
            return protocol.ErrorReply(message.seq, "key space: its digest does not match its fields")
        number = self._store.open_keyspace(keyspace)
        self._keyspaces.pop(number, None)
        self._keyspaces[number] = None
        if len(self._keyspaces) > MAX_KEYSPACES:  # an engine opens one more at each update of its weights
            del self._keyspaces[next(iter(self._keyspaces))]
        return protocol.KeySpaceReply(message.seq, number)

    def _lookup(self, message: protocol.LookupRequest) -> Message:
        self._check_keyspace(message.keyspace)
        keys = read_keys(message.keys)
        if not 1 <= len(message.shards) <= MAX_SHARDS or not all(
            isinstance(shard, bytes) and len(shard) == SHARD_NBYTES for shard in message.shards
        ):
            raise ProtocolError(f"lookup: 1 to {MAX_SHARDS} shards of {SHARD_NBYTES} bytes each are needed")
        if len(keys) * len(message.shards) > MAX_LOOKUP_PAIRS:
            return protocol.ErrorReply(message.seq, f"a lookup has at most {MAX_LOOKUP_PAIRS} pairs of key and shard")
        begun = self._now()
        lacking = [next((key + s for s in message.shards if not self._store.has(key + s)), None) for key in keys]
        present = bytes(name is None for name in lacking)
        differs = [] if any(present) else self._store.nearest_filled(message.keyspace)
        self._store.counts["lookup_blocks"] += len(keys)
        self._store.counts["lookup_hits"] += sum(present)
        self._count_misses([name for name in lacking if name is not None], elsewhere=bool(differs))
        self._metrics.observe("lookup", self._now() - begun)
        return protocol.LookupReply(message.seq, present, differs)

    def _get(self, message: protocol.GetRequest) -> Message | None:
        self._check_keyspace(message.keyspace)
        names = read_names(message.keys, message.shard)
        if len(self._leases) + len(self._gets) >= MAX_LEASES:
            return protocol.ErrorReply(message.seq, f"a connection holds at most {MAX_LEASES} leases")
        if len(names) > MAX_GET_KEYS:
            return protocol.ErrorReply(message.seq, f"a get names at most {MAX_GET_KEYS} keys")
        held = sum(self._gets.values()) + sum(len(entries) for entries, *_ in self._leases.values())
        if held + len(names) > MAX_LEASED_KEYS:
            return protocol.ErrorReply(message.seq, f"a connection's leases hold at most {MAX_LEASED_KEYS} blocks")
        begun = self._now()
        if self._endpoint.done():
            return self._lease(message, names, begun)
        task = asyncio.get_running_loop().create_task(self._get_later(message, names, begun))
        self._gets[task] = len(names)
        task.add_done_callback(self._gets.pop)
        return None

    async def _get_later(self, message: protocol.GetRequest, names: list[bytes], begun: float) -> None:
        """A get that overtook the news of its own data connection, which comes from the transport's thread."""
        try:
            await asyncio.wait_for(asyncio.shield(self._endpoint), ATTACH_TIMEOUT_S)
        except TimeoutError:
            self._send(protocol.ErrorReply(message.seq, "no data connection with this session's ticket"))
        except asyncio.CancelledError:
            logger.debug("%s: left before its data connection came", self.name)
        else:
            self._send(self._lease(message, names, begun))

    def _lease(self, message: protocol.GetRequest, names: list[bytes], begun: float) -> Message:
        """Pin the blocks that are there, and say where they lie."""
        pinned = self._store.pin(names)
        entries = [entry for entry in pinned if entry is not None]
        slabs = self._slabs(self._endpoint.result().scheme)
        memories, rows, offsets = slabs.rows(entries)
        nbytes = np.array([entry.nbytes for entry in entries], dtype=np.int64)
        generations = np.array([entry.generation for entry in entries], dtype=np.int64)
        checksums = np.array([entry.checksum for entry in entries], dtype="<u8")
        lease = next(self._lease_numbers)
        timer = asyncio.get_running_loop().call_later(self._lease_s, self._expire, lease)
        self._leases[lease] = (entries, timer, timer.when() - self._lease_s)
        self._store.counts["get_blocks"] += len(names)
        self._store.counts["get_hits"] += len(entries)
        self._store.counts["read_bytes"] += int(nbytes.sum())
        gone = [name for name, entry in zip(names, pinned, strict=True) if entry is None]
        elsewhere = len(gone) == len(names) and bool(self._store.nearest_filled(message.keyspace))
        self._count_misses(gone, elsewhere=elsewhere)
        self._metrics.observe("get", self._now() - begun)
        return protocol.GetReply(
            message.seq,
            lease,
            int(self._lease_s * 1000),
            bytes(entry is not None for entry in pinned),
            [wire_region(slabs.exports[id(memory)]) for memory in memories],
            protocol.pack_columns(rows, offsets, nbytes, generations),
            checksums.tobytes(),
        )

    def _release(self, message: protocol.Release) -> None:
        (bad,) = protocol.unpack_columns(message.bad, 1, what="release")
        held = self._leases.get(message.lease)
        if held is not None:
            wrong = set(bad.tolist())
            for entry in held[0]:
                if entry.generation in wrong:
                    logger.warning("a block of generation %d was found wrong by %s", entry.generation, self.name)
                    self._store.drop_wrong(entry)
        self._end_lease(message.lease)

    def _delete(self, message: protocol.DeleteRequest) -> Message:
        self._check_keyspace(message.keyspace)
        return protocol.DeleteReply(message.seq, self._store.delete(set(read_keys(message.keys))))

    def _begin_put(self, message: protocol.PutRequest) -> Message | None:
        self._check_keyspace(message.keyspace)
        if len(self._puts) >= MAX_PUTS:
            return protocol.ErrorReply(message.seq, f"a connection has at most {MAX_PUTS} puts under way")
        told_nbytes = sum(map(len, (message.keys, message.checksums, message.spans)))
        if sum(self._puts.values()) + told_nbytes > MAX_PUT_NBYTES:
            return protocol.ErrorReply(message.seq, f"puts under way are told of in at most {MAX_PUT_NBYTES} bytes")
        names = read_names(message.keys, message.shard)
        spans = protocol.unpack_columns(message.spans, 4, what="put: spans")
        checksums = np.frombuffer(message.checksums, dtype="<u8") if len(message.checksums) % 8 == 0 else None
        regions = [read_region(part) for part in message.regions]
        key_rows, region_rows, offsets, nbytes = spans
        if checksums is None or len(checksums) != len(names):
            raise ProtocolError("put: as many checksums as keys are needed")
        sizes = np.array([region.nbytes for region in regions], dtype=np.int64)
        if spans.shape[1] == 0 or (
            (np.diff(key_rows) < 0).any()
            or len(np.unique(key_rows)) != len(names)
            or key_rows[0] != 0
            or key_rows[-1] != len(names) - 1
            or (region_rows < 0).any()
            or (region_rows >= len(regions)).any()
            or (nbytes < 1).any()
            or (offsets < 0).any()
            or (nbytes > sizes[region_rows]).any()
            or (offsets > sizes[region_rows] - nbytes).any()
        ):
            raise ProtocolError("put: spans do not fit their keys and regions")
        put = _Put(message, names, spans, regions, checksums)
        task = asyncio.get_running_loop().create_task(self._put(put))
        self._puts[task] = told_nbytes
        task.add_done_callback(self._puts.pop)
        return None

    async def _put(self, put: _Put) -> None:
        """Reserve, read from the client, verify, commit: a block is there only once all of that is done."""
        begun = self._now()
        timeout = min(MAX_PUT_S, max(0.001, put.message.timeout_ms / 1000))
        present = [self._store.has(name) for name in put.names]
        sizes = np.bincount(put.spans[0], weights=put.spans[3]).astype(np.int64).tolist()
        entries = self._store.reserve(put.message.keyspace, put.names, sizes)
        status = np.where(present, PutStatus.EXISTS, PutStatus.DECLINED).astype(np.uint8)
        rows = [i for i, entry in enumerate(entries) if entry is not None]
        reserved = [entry for entry in entries if entry is not None]
        self._store.counts["put_blocks"] += len(put.names)
        self._store.counts["existing_blocks"] += sum(present)
        self._store.counts["declined_blocks"] += len(put.names) - sum(present) - len(reserved)
        committed: Bitmap = np.zeros(len(reserved), dtype=np.bool_)
        try:
            if reserved:
                endpoint = await asyncio.wait_for(asyncio.shield(self._endpoint), timeout)
                arrived = await self._read(endpoint, put, rows, reserved, timeout)
                good = await asyncio.get_running_loop().run_in_executor(
                    None, verify_entries, put, rows, reserved, arrived
                )
                self._store.counts["put_checksum_failures"] += int((arrived & ~good).sum())
                for i in np.flatnonzero(good).tolist():
                    self._store.commit(reserved[i], int(put.checksums[rows[i]]))
                committed = good
        except (KVRDMAError, TimeoutError, asyncio.CancelledError) as error:
            logger.info("a put of %s was given up: %s", self.name, error or type(error).__name__)
        except Exception:  # its client must hear of it, and would wait for its time-out otherwise
            logger.exception("a put of %s failed unexpectedly", self.name)
        finally:
            for i, entry in enumerate(reserved):
                status[rows[i]] = PutStatus.STORED if committed[i] else PutStatus.FAILED
                if not committed[i]:
                    self._store.give_up(entry)
                    self._store.counts["failed_blocks"] += 1
            self._metrics.observe("put", self._now() - begun)
        self._send(protocol.PutReply(put.message.seq, status.tobytes()))

    async def _read(
        self, endpoint: Endpoint, put: _Put, rows: list[int], reserved: list[Entry], timeout: float
    ) -> Bitmap:
        """Read the reserved blocks from the client; which of them arrived whole."""
        slabs = self._slabs(endpoint.scheme)
        memories, local_rows, local_offsets = slabs.rows(reserved)
        entry_of_key = np.full(len(put.names), -1, dtype=np.int64)
        entry_of_key[rows] = np.arange(len(rows))
        key_rows, region_rows, offsets, nbytes = put.spans
        chosen = entry_of_key[key_rows] >= 0
        owner = entry_of_key[key_rows[chosen]]
        sizes = nbytes[chosen]
        before = np.cumsum(sizes) - sizes
        within = before - before[np.searchsorted(owner, np.arange(len(rows)))][owner]
        batch = TransferBatch(
            Opcode.READ,
            [slabs.regions[id(memory)] for memory in memories],
            put.regions,
            local_rows[owner],
            local_offsets[owner] + within,
            region_rows[chosen].astype(np.int64),
            offsets[chosen].astype(np.int64),
            sizes.astype(np.int64),
        )
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        transfer = endpoint.post(batch, priority=Priority.OFFLOAD, timeout=timeout)

        def ended(_: Transfer) -> None:
            loop.call_soon_threadsafe(done.set)

        transfer.add_done_callback(ended)
        # Until it is terminal the slots may still be written: nothing here may end the wait before.
        while not transfer.done():
            try:
                await done.wait()
            except asyncio.CancelledError:
                endpoint.abort()
        self._store.counts["written_bytes"] += int(sizes[transfer.ok].sum())
        if transfer.error is not None and not transfer.ok.any():
            raise TransportError(str(transfer.error))
        arrived: Bitmap = np.bincount(owner[~transfer.ok], minlength=len(rows)) == 0
        return arrived

    # -- leases

    def _expire(self, lease: int) -> None:
        self._store.counts["expired_leases"] += 1
        self._end_lease(lease)

    def _end_lease(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None:
            entries, timer, begun = held
            timer.cancel()
            self._store.unpin(entries)
            self._metrics.observe("lease", self._now() - begun)

    def _count_misses(self, names: list[bytes], *, elsewhere: bool) -> None:
        """Count blocks that are not there; `elsewhere`: this key space is empty, and a similar one is not."""
        n_evicted = sum(map(self._store.was_evicted, names))
        self._metrics.miss(Reason.EVICTED, n_evicted)
        self._metrics.miss(Reason.OTHER_KEYSPACE if elsewhere else Reason.NOT_THERE, len(names) - n_evicted)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _check_keyspace(self, number: int) -> None:
        if number not in self._keyspaces:
            raise ProtocolError(f"key space {number} was not opened on this connection")


@dataclass(frozen=True, slots=True)
class _Put:
    message: protocol.PutRequest
    names: list[bytes]
    spans: Int64s
    regions: list[RemoteRegion]
    checksums: Checksums


def verify_entries(put: _Put, rows: list[int], reserved: list[Entry], arrived: Bitmap) -> Bitmap:
    """Of the blocks that arrived, those whose bytes have the checksum that the client gave."""
    good = arrived.copy()
    for i in np.flatnonzero(arrived):
        entry = reserved[i]
        key, shard = entry.name[:KEY_NBYTES], entry.name[KEY_NBYTES:]
        good[i] = checksum(key, shard, [entry.view()]) == int(put.checksums[rows[i]])
    return good


def read_keys(raw: bytes) -> list[bytes]:
    """The keys of a message; raises `ProtocolError` where they are not whole or none."""
    if not protocol.count_keys(raw, what="keys"):
        raise ProtocolError("keys: at least one is needed")
    return unpack_keys(np.frombuffer(raw, dtype=np.uint8).reshape(-1, KEY_NBYTES))


def read_names(raw: bytes, shard: bytes) -> list[bytes]:
    """Key and shard of each block of a message."""
    suffix = Shard.decode(shard).encode()
    return [key + suffix for key in read_keys(raw)]


def wire_region(region: RemoteRegion) -> list[Any]:
    """A region as it crosses the wire."""
    return [region.scheme, region.nbytes, region.token]
