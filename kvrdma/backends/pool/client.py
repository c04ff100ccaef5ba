"""`kvrdma://host:port`: blocks in the memory of a pool server, over whatever transport both ends have.

The receiver reads: a get leases the blocks and reads them from the server's slabs, a put exports our slabs
and has the server read them. No key that can write is ever sent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np

from kvrdma import protocol
from kvrdma.backends.base import (
    GetStatus,
    GetTransfer,
    Lookup,
    PutStatus,
    PutTransfer,
    StorageBackend,
    check_batch,
    verify,
)
from kvrdma.backends.pool.session import Deadline, Session
from kvrdma.errors import (
    BackendError,
    ClosedError,
    DeadlineError,
    KVRDMAError,
    ProtocolError,
    RegionError,
)
from kvrdma.keys import KeyBatch, KeySpace
from kvrdma.layout import Checksums, Int64s, Shard
from kvrdma.memory import Lease, Memory, Spans
from kvrdma.settings import Settings, Url, find_token, host_and_port, option, parse_count, parse_names, parse_text
from kvrdma.transports import (
    Choice,
    Endpoint,
    MemoryRegion,
    Opcode,
    Priority,
    RemoteRegion,
    Rights,
    TransferBatch,
    Transport,
    check_order,
    weigh,
)
from kvrdma.transports.tcp import TcpTransport

logger = logging.getLogger(__name__)

DEFAULT_PORT: Final = 7700
_WORKERS: Final = 4
_GRACE_S: Final = 2.0
T = TypeVar("T", GetTransfer, PutTransfer)


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """The options of a `kvrdma://` URL. They win over the settings of the same name."""

    transports: tuple[str, ...] = option((), parse_names, "order of transports; others are never used")
    streams: int = option(0, parse_count, "connections a peer for the tcp transport")
    token_file: str = option("", parse_text, "file with the pool's token")


class PoolBackend(StorageBackend):
    """A client of one pool server. Connects at the first use, and again after a failure."""

    def __init__(self, url: Url, settings: Settings) -> None:
        options = url.read_options(PoolOptions)
        self._host, self._port = url.one_host(default_port=DEFAULT_PORT)
        self._order = options.transports or settings.transports
        self._streams = options.streams or settings.streams
        self._token = find_token(options.token_file or settings.token_file)
        self._connect_timeout = settings.connect_timeout
        self._guard = threading.Lock()
        self._session_guard = threading.Lock()
        self._session: Session | None = None
        self._keyspace: KeySpace | None = None
        self._memories: list[Memory] = []
        self._transports: dict[str, Transport] = {}
        self._chosen: dict[str, Any] = {}  # what moves the bytes, as `stats` says it
        self._unfit: dict[str, KVRDMAError] = {}  # transports that cannot take memory of ours, and why
        self._regions: dict[tuple[str, int], tuple[MemoryRegion, RemoteRegion]] = {}
        # A put keeps its thread until the server has read it: gets have threads of their own.
        self._getters = ThreadPoolExecutor(_WORKERS, thread_name_prefix="kvrdma-get")
        self._putters = ThreadPoolExecutor(_WORKERS, thread_name_prefix="kvrdma-put")
        self._closed = False
        check_order(self._order)

    # -- the interface

    def register(self, memory: Memory) -> None:
        """Make memory usable with every transport that is, or will be, in use."""
        with self._guard:
            self._memories.append(memory)
            for transport in list(self._transports.values()):
                with contextlib.suppress(KVRDMAError):  # the next connection is made by another one
                    self._register(transport, memory)

    def use_keyspace(self, keyspace: KeySpace) -> None:
        """Say which key space the keys that follow belong to."""
        self._keyspace = keyspace

    def lookup(self, keys: KeyBatch, shards: Sequence[Shard], *, timeout: float) -> Lookup:
        """Say what is there."""
        if not len(keys):
            return Lookup(np.zeros(0, dtype=np.bool_))
        deadline = Deadline(timeout)
        session, keyspace = self._ready(self._keyspace, deadline)
        names: list[Any] = [shard.encode() for shard in shards]
        answer = session.call(
            lambda seq: protocol.LookupRequest(seq, keyspace, keys.tobytes(), names),
            protocol.LookupReply,
            timeout=deadline.left(),
        )
        present = np.frombuffer(answer.present, dtype=np.uint8)
        if len(present) != len(keys):
            raise ProtocolError(f"{len(keys)} keys were looked up, {len(present)} answers came")
        return Lookup(present == 1, differs=tuple(str(name) for name in answer.differs))

    def get_into(
        self, keys: KeyBatch, shard: Shard, target: Spans, *, hold: Lease | None, timeout: float
    ) -> GetTransfer:
        """Fetch blocks into the target."""
        check_batch(keys, target)
        transfer = GetTransfer(len(keys), hold=hold)
        keyspace = self._keyspace  # now: whichever is named later is that of the calls that follow
        self._start(transfer, lambda: self._get(transfer, keyspace, keys, shard, target, hold, timeout))
        return transfer

    def put(
        self,
        keys: KeyBatch,
        shard: Shard,
        source: Spans,
        checksums: Checksums,
        *,
        hold: Lease | None,
        timeout: float,
    ) -> PutTransfer:
        """Have the server read blocks that it has not yet."""
        check_batch(keys, source, checksums)
        transfer = PutTransfer(len(keys), hold=hold)
        keyspace = self._keyspace
        self._start(transfer, lambda: self._put(transfer, keyspace, keys, shard, source, checksums, timeout))
        return transfer

    def delete(self, keys: KeyBatch, *, timeout: float) -> int:
        """Drop every shard of the keys."""
        if not len(keys):
            return 0
        deadline = Deadline(timeout)
        session, keyspace = self._ready(self._keyspace, deadline)
        answer = session.call(
            lambda seq: protocol.DeleteRequest(seq, keyspace, keys.tobytes()),
            protocol.DeleteReply,
            timeout=deadline.left(),
        )
        return answer.count

    def stats(self, *, timeout: float) -> dict[str, Any]:
        """The server's counters, and once bytes have moved by which transport, and why by no other."""
        deadline = Deadline(timeout)
        session = self._connected(deadline)
        found = session.call(protocol.StatsRequest, protocol.StatsReply, timeout=deadline.left()).stats
        return found | self._chosen

    def close(self) -> None:
        """End what is under way and let go of connections."""
        with self._session_guard:
            if self._closed:
                return
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.close()
        self._getters.shutdown()
        self._putters.shutdown()
        for transport in self._transports.values():
            transport.close()

    # -- connections

    def _ready(self, keyspace: KeySpace | None, deadline: Deadline) -> tuple[Session, int]:
        if keyspace is None:
            raise BackendError("kvrdma:// backend: use_keyspace must come before the first call")
        session = self._connected(deadline)
        return session, session.keyspace(keyspace, timeout=deadline.left())

    def _connected(self, deadline: Deadline) -> Session:
        with self._session_guard:
            if self._closed:
                raise ClosedError("kvrdma:// backend: closed")
            if self._session is None or self._session.broken:
                if self._session is not None:
                    self._session.close()
                    self._session = None
                self._session = Session(
                    self._host,
                    self._port,
                    name=f"{socket.gethostname()}:{os.getpid()}",
                    token=self._token,
                    timeout=min(deadline.left(), self._connect_timeout),
                )
            return self._session

    def _connect_data(self, session: Session, timeout: float) -> Endpoint:
        """Connect by the best transport that works: the hook of negotiation and its fallback."""
        offers = []
        for offer in session.hello.offers:
            if not isinstance(offer, list) or len(offer) != 2 or not all(isinstance(x, str) for x in offer):
                raise ProtocolError("pool server: an offer must be [scheme, address]")
            offers.append((offer[0], with_host(offer[1], self._host)))
        choice = weigh(offers, self._order)
        others = dict(choice.refused)
        failures: list[KVRDMAError] = []
        for cls, address in choice.candidates:
            try:
                if cls.scheme in self._unfit:
                    raise self._unfit[cls.scheme]
                transport = self._transport(cls)
                endpoint = transport.connect(
                    address, timeout=timeout, ticket=session.hello.ticket, secret=session.stream_secret
                )
            except KVRDMAError as error:
                logger.warning("transport %s to %s failed: %s", cls.scheme, address, error)
                failures.append(error)
                others[cls.scheme] = str(error)
                continue
            later = {each.scheme: f"{cls.scheme} comes first" for each, _ in choice.candidates}
            others = {scheme: why for scheme, why in (later | others).items() if scheme != cls.scheme}
            self._tell(session, cls.scheme, others)
            return endpoint
        if failures and all(isinstance(failure, DeadlineError) for failure in failures):
            raise DeadlineError(f"no transport reaches the pool server: {'; '.join(map(str, failures))}")
        raise Choice((), others).why_none()

    def _tell(self, session: Session, scheme: str, others: dict[str, str]) -> None:
        """Say once, and whenever it changes, what moves the bytes and why nothing else does."""
        chosen = {"data_transport": scheme, "other_transports": others}
        if chosen != self._chosen:
            reasons = "; ".join(f"{other}: {why}" for other, why in others.items())
            logger.info("pool server %s: bytes go over %s (not %s)", session.peer, scheme, reasons or "any other")
        self._chosen = chosen

    def _transport(self, cls: type[Transport]) -> Transport:
        with self._guard:
            transport = self._transports.get(cls.scheme)
            if transport is None:
                transport = TcpTransport(streams=self._streams) if cls is TcpTransport else cls()
                self._transports[cls.scheme] = transport
                for memory in self._memories:
                    self._register(transport, memory)
            return transport

    def _register(self, transport: Transport, memory: Memory) -> None:
        """Make memory known to a transport; one that cannot take it is not used from now on."""
        try:
            region = transport.register(memory)
            self._regions[transport.scheme, id(memory)] = (region, transport.export(region, Rights.READ))
        except KVRDMAError as error:
            logger.warning("transport %s is not used: %s", transport.scheme, error)
            self._unfit[transport.scheme] = error
            del self._transports[transport.scheme]
            transport.close()  # and with it whatever is under way
            raise

    def _region(self, scheme: str, memory: Memory) -> tuple[MemoryRegion, RemoteRegion]:
        found = self._regions.get((scheme, id(memory)))
        if found is None:
            raise RegionError("kvrdma:// backend: a span lies in memory that was never registered")
        return found

    # -- transfers, on a worker

    def _start(self, transfer: T, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                if len(transfer.ok):
                    work()
                else:
                    transfer.conclude()
            except KVRDMAError as error:
                transfer.conclude(error)
            except Exception as error:  # a worker's exception would be lost, and the lease with it
                logger.exception("kvrdma:// backend: a transfer failed unexpectedly")
                transfer.conclude(BackendError(f"{type(error).__name__}: {error}"))

        try:
            workers = self._getters if isinstance(transfer, GetTransfer) else self._putters
            workers.submit(run)
        except RuntimeError:
            transfer.conclude(ClosedError("kvrdma:// backend: closed"))

    def _get(
        self,
        transfer: GetTransfer,
        keyspace: KeySpace | None,
        keys: KeyBatch,
        shard: Shard,
        target: Spans,
        hold: Lease | None,
        timeout: float,
    ) -> None:
        deadline = Deadline(timeout)
        session, number = self._ready(keyspace, deadline)
        endpoint = session.endpoint(self._connect_data, timeout=min(deadline.left(), self._connect_timeout))
        asked = time.monotonic()
        reply = session.call(
            lambda seq: protocol.GetRequest(seq, number, shard.encode(), keys.tobytes()),
            protocol.GetReply,
            timeout=deadline.left(),
        )
        bad: Int64s = np.zeros(0, dtype=np.int64)
        error: KVRDMAError | None = None
        try:
            present, columns, checksums, regions = read_get_reply(reply, target)
            transfer.status[:] = np.where(present, GetStatus.FAILED, GetStatus.MISSING)
            if present.any():
                wanted = target.select(present)
                batch = self._read_batch(endpoint.scheme, wanted, columns, regions)
                read = endpoint.post(batch, hold=hold, priority=Priority.LOAD, timeout=deadline.left())
                ranges_ok = read.result()  # ends: its own time-out aborts the endpoint
                arrived = np.bincount(wanted.key_row[~ranges_ok], minlength=wanted.n_keys) == 0
                good = verify(keys[present], shard, wanted, checksums, arrived)
                wrong = arrived & ~good
                rows = np.flatnonzero(present)
                transfer.status[rows[good]] = GetStatus.OK
                if time.monotonic() < asked + reply.ttl_ms / 1000:
                    bad = columns[3][wrong]
                    transfer.status[rows[wrong]] = GetStatus.CHECKSUM
                else:  # the lease may be over: another block lies there by now, and nothing is corrupt
                    transfer.status[rows[wrong]] = GetStatus.MISSING
                transfer.checksums[rows] = checksums
                error = read.error
        finally:
            if not session.broken:
                session.send(protocol.Release(0, reply.lease, bad.astype("<i8").tobytes()))
        transfer.conclude(error)

    def _read_batch(self, scheme: str, wanted: Spans, columns: Int64s, regions: list[RemoteRegion]) -> TransferBatch:
        """One READ a span: an object lies in one piece at the server, its spans here may be several."""
        region_rows, offsets, _, _ = columns
        before = np.cumsum(wanted.nbytes) - wanted.nbytes
        first_of_key = np.searchsorted(wanted.key_row, np.arange(wanted.n_keys))
        within = before - before[first_of_key][wanted.key_row]
        return TransferBatch(
            Opcode.READ,
            [self._region(scheme, memory)[0] for memory in wanted.memories],
            regions,
            wanted.memory_row,
            wanted.offset,
            region_rows[wanted.key_row],
            offsets[wanted.key_row] + within,
            wanted.nbytes,
        )

    def _put(
        self,
        transfer: PutTransfer,
        keyspace: KeySpace | None,
        keys: KeyBatch,
        shard: Shard,
        source: Spans,
        checksums: Checksums,
        timeout: float,
    ) -> None:
        deadline = Deadline(timeout)
        session, number = self._ready(keyspace, deadline)
        endpoint = session.endpoint(self._connect_data, timeout=min(deadline.left(), self._connect_timeout))
        used, names = np.unique(source.memory_row, return_inverse=True)
        regions: list[Any] = []
        for row in used:
            remote = self._region(endpoint.scheme, source.memories[row])[1]
            regions.append([remote.scheme, remote.nbytes, remote.token])
        spans = protocol.pack_columns(source.key_row, names.astype(np.int64), source.offset, source.nbytes)
        left = deadline.left()
        try:
            reply = session.call(
                lambda seq: protocol.PutRequest(
                    seq,
                    number,
                    shard.encode(),
                    keys.tobytes(),
                    checksums.astype("<u8").tobytes(),
                    regions,
                    spans,
                    int(left * 1000),
                ),
                protocol.PutReply,
                timeout=left + _GRACE_S,
            )
            status = np.frombuffer(reply.status, dtype=np.uint8)
            if len(status) != len(keys) or (status > PutStatus.FAILED).any():
                raise ProtocolError(f"{len(keys)} keys were put, the reply makes no sense of them")
        except KVRDMAError as error:
            # The server may still be reading from our slots: only the end of the endpoint rules that out.
            session.end(error)
            raise
        transfer.status[:] = status
        n_failed = int((status == PutStatus.FAILED).sum())
        wrong = f"pool server {session.peer}: {n_failed} of {len(keys)} blocks could not be read, or arrived altered"
        transfer.conclude(BackendError(wrong) if n_failed else None)


def with_host(address: str, host: str) -> str:
    """A contact address; where a server that listens everywhere names no host, the one it was reached by."""
    for everywhere in ("0.0.0.0:", "[::]:"):
        if address.startswith(everywhere):
            return host_and_port(host, address.removeprefix(everywhere))
    return address


def read_get_reply(reply: protocol.GetReply, target: Spans) -> tuple[np.ndarray, Int64s, Checksums, list[RemoteRegion]]:
    """What a server says of the blocks it leases: present, columns, checksums, regions.

    Raises `ProtocolError` where lengths, rows or sizes do not fit what was asked for: a client reads only as
    many bytes as it has room for, whatever the server says.
    """
    present = np.frombuffer(reply.present, dtype=np.uint8) == 1
    if len(present) != target.n_keys:
        raise ProtocolError(f"{target.n_keys} keys were asked for, {len(present)} answers came")
    columns = protocol.unpack_columns(reply.columns, 4, what="get reply")
    checksums = np.frombuffer(reply.checksums, dtype="<u8") if len(reply.checksums) % 8 == 0 else None
    n = int(present.sum())
    if columns.shape[1] != n or checksums is None or len(checksums) != n:
        raise ProtocolError(f"{n} blocks are there, the columns are of another length")
    regions = [read_region(part) for part in reply.regions]
    rows, offsets, nbytes, _ = columns
    if n and ((rows < 0) | (rows >= len(regions)) | (offsets < 0)).any():
        raise ProtocolError("get reply: a row names no region")
    # A block of another size than the target's is not the one that was asked for.
    fits = nbytes == target.key_nbytes()[present]
    if not fits.all():
        keep = present.copy()
        keep[np.flatnonzero(present)[~fits]] = False
        return keep, columns[:, fits], checksums[fits], regions
    return present, columns, checksums, regions


def read_region(part: Any) -> RemoteRegion:
    """A region as it crosses the wire: [scheme, nbytes, token]."""
    if (
        not isinstance(part, list)
        or len(part) != 3
        or not isinstance(part[0], str)
        or type(part[1]) is not int
        or not isinstance(part[2], bytes)
        or not 1 <= part[1] < 1 << 63
    ):
        raise ProtocolError("a region must be [scheme, nbytes, token]")
    return RemoteRegion(part[0], part[1], part[2])
