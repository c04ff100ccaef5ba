"""The pool server: an event loop for the control plane, a transport for the bytes, a store for the blocks."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Final

from kvrdma import protocol
from kvrdma.backends.blockstore import BlockStore, check_capacity
from kvrdma.errors import AuthenticationError, ConfigError, KVRDMAError, ProtocolError, TransportError
from kvrdma.logs import LimitedLog
from kvrdma.memory import Memory
from kvrdma.metrics import Metrics
from kvrdma.policies import open_policy
from kvrdma.protocol import StatsRequest
from kvrdma.server.connection import CHUNK_NBYTES, Connection
from kvrdma.server.exporter import Exporter
from kvrdma.server.session import ClientSession, Slabs
from kvrdma.settings import TOKEN_VARIABLE, host_and_port
from kvrdma.transports import Endpoint, Listener, Rights, Transport, check_order, find_usable, transports

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
MAX_STRANGERS: Final = 256  # connections that have not proved themselves yet
_DRAIN_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a pool server needs to know. Without `transports` it offers every one that can be used here.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    host: str = "127.0.0.1"
    port: int = 7700
    capacity: int = 1 << 30
    policy: str = "lru"
    transports: tuple[str, ...] | None = None
    token: bytes | None = field(default=None, repr=False)
    data_port: int = 0
    metrics_port: int | None = None
    max_clients: int = 1024
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        check_capacity(self.capacity)
        for name in ("port", "data_port", "metrics_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65535:
                raise ConfigError(f"{name}: must lie in 0..65535, not {getattr(self, name)}")
        if self.max_clients < 1:
            raise ConfigError(f"max_clients: must be at least 1, not {self.max_clients}")
        if not self.lease_s > 0:
            raise ConfigError(f"lease_s: must be above 0, not {self.lease_s}")
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r}: without a token only loopback addresses are bound, such as 127.0.0.1; "
                f"give a token by --token-file or {TOKEN_VARIABLE}"
            )
        open_policy(self.policy)
        named = ("tcp",) if self.transports is None else self.transports
        if not named:
            raise ConfigError("transports: at least one is needed, such as tcp")
        check_order(named)
        networked = [scheme for scheme in named if not transports.get(scheme).same_host]
        if self.data_port and (self.data_port == self.port or len(networked) > 1):
            raise ConfigError(f"data_port: {self.data_port} cannot serve several listeners; 0 picks free ports")


class PoolServer:
    """Holds blocks for its clients. `start`, then `serve_until`, on one event loop.

    Raises:
        CapacityError: the host has not the memory.
        ConfigError: an unknown policy or transport.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._store = BlockStore(settings.capacity, open_policy(settings.policy), in_background=True)
        self._transports: dict[str, Transport] = {}
        self._listeners: dict[str, Listener] = {}
        self._slabs: dict[str, Slabs] = {}
        self._sessions: dict[bytes, ClientSession] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._exporter: Exporter | None = None
        self._metrics = Metrics()
        self._turned_away = LimitedLog(logger)
        self._started = time.monotonic()
        self._draining = False

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect, once started."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    @property
    def metrics_port(self) -> int | None:
        """Where the counters are served for Prometheus, once started; None where they are not."""
        return None if self._exporter is None else self._exporter.port

    async def start(self) -> None:
        """Open every listener; raises `TransportError` where an address is taken."""
        loop = asyncio.get_running_loop()
        try:
            self._open_transports(loop)
            self._server = await asyncio.start_server(
                self._on_client, self.settings.host, self.settings.port, limit=CHUNK_NBYTES
            )
            if self.settings.metrics_port is not None:
                self._exporter = Exporter(self.stats)
                await self._exporter.start(self.settings.host, self.settings.metrics_port)
            self._store.reserve_of_slabs.grow(self._register)
        except OSError as error:
            await self.stop()
            raise TransportError(
                f"cannot listen on {self.settings.host}:{self.settings.port}: {error.strerror or error}"
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def serve_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain: no new clients, puts under way may end, then goodbye."""
        await stop.wait()
        await self.stop()

    async def stop(self) -> None:
        """Drain and close. Idempotent."""
        self._draining = True
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + _DRAIN_S
        while any(s.busy for s in self._sessions.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for task in list(self._clients):
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)
        if self._server is not None:
            await self._server.wait_closed()
        if self._exporter is not None:
            self._exporter.close()
            self._exporter = None
        for listener in self._listeners.values():
            listener.close()
        self._store.reserve_of_slabs.stop_growing()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        self._turned_away.close()
        self._store.close()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name; misses by reason under `misses`, durations by operation under `seconds`."""
        return {
            **self._store.stats(),
            **self._metrics.snapshot(),
            "clients": len(self._sessions),
            "leases": sum(session.n_leases for session in self._sessions.values()),
            "policy": self.settings.policy,
            "transports": list(self._listeners),
            "data_connections": self._data_connections(),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }

    def _data_connections(self) -> dict[str, int]:
        """How many clients' bytes each transport moves."""
        counts = dict.fromkeys(self._listeners, 0)
        for session in self._sessions.values():
            scheme = session.data_scheme
            if scheme is not None:
                counts[scheme] += 1
        return counts

    # -- transports

    def _open_transports(self, loop: asyncio.AbstractEventLoop) -> None:
        """Those that the settings name; else all that can be used, and tcp in any case."""
        if self.settings.transports is not None:
            for scheme in self.settings.transports:
                self._open_transport(scheme, loop, self.settings.data_port)
            return
        usable, refused = find_usable()
        for scheme in usable:
            try:
                self._open_transport(scheme, loop, self.settings.data_port if scheme == "tcp" else 0)
            except KVRDMAError as error:
                if scheme == "tcp":
                    raise
                refused[scheme] = str(error)
                self._slabs.pop(scheme, None)
                transport = self._transports.pop(scheme, None)
                if transport is not None:
                    transport.close()
        reasons = "; ".join(f"{scheme}: {why}" for scheme, why in refused.items())
        logger.info("transports offered: %s (not: %s)", ", ".join(self._listeners), reasons or "none")

    def _open_transport(self, scheme: str, loop: asyncio.AbstractEventLoop, port: int) -> None:
        transport = transports.get(scheme)()
        self._transports[scheme] = transport
        self._slabs[scheme] = Slabs({}, {})
        for memory in self._store.reserve_of_slabs.slabs:
            self._register_with(scheme, memory)
        address = "" if transport.same_host else host_and_port(self.settings.host, port)
        listener = transport.listen(address, secret_of=self._secret_of)

        def on_endpoint(endpoint: Endpoint) -> None:
            loop.call_soon_threadsafe(self._on_endpoint, endpoint)

        listener.on_endpoint(on_endpoint)
        self._listeners[scheme] = listener

    def _register(self, memory: Memory) -> None:
        """A slab has come, which nobody has yet; on the thread that makes them."""
        for scheme in self._transports:
            self._register_with(scheme, memory)

    def _register_with(self, scheme: str, memory: Memory) -> None:
        transport, slabs = self._transports[scheme], self._slabs[scheme]
        slabs.regions[id(memory)] = region = transport.register(memory)
        slabs.exports[id(memory)] = transport.export(region, Rights.READ)

    def _secret_of(self, ticket: bytes) -> bytes | None:
        """On a transport's thread."""
        session = self._sessions.get(ticket)
        return None if session is None else session.stream_secret

    def _on_endpoint(self, endpoint: Endpoint) -> None:
        session = self._sessions.get(endpoint.ticket)
        if session is None:
            self._turned_away.warning("a data connection from %s with a ticket that is not ours", endpoint.peer)
            asyncio.get_running_loop().run_in_executor(None, endpoint.abort)
        else:
            session.attach(endpoint)

    # -- clients

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        connection = Connection(reader, writer)
        session: ClientSession | None = None
        try:
            if self._draining or len(self._clients) - len(self._sessions) > MAX_STRANGERS:
                self._store.counts["refused_clients"] += 1
                return
            session = await asyncio.wait_for(self._greet(connection), HELLO_TIMEOUT_S)
            if session is not None:
                await self._converse(connection, session)
        except AuthenticationError as error:
            self._turned_away.warning("%s: %s", connection.peer, error)
            self._store.counts["refused_proofs"] += 1
        except ProtocolError as error:
            log = self._turned_away if session is None else logger
            log.warning("%s: %s", connection.peer, error)
            self._store.counts["protocol_errors"] += 1
            connection.send(protocol.Goodbye(0, str(error)))
        except (OSError, EOFError) as error:  # time-outs among them
            logger.debug("%s: %s", connection.peer, error or type(error).__name__)
        except asyncio.CancelledError:
            connection.send(protocol.Goodbye(0, "the server is shutting down"))
        finally:
            if session is not None:
                await self._end(session)
            await connection.close()
            self._clients.discard(task)

    async def _end(self, session: ClientSession) -> None:
        """End a session as a whole, even where the server stops meanwhile: its slots must be free by then."""
        self._sessions.pop(session.ticket, None)
        ending = asyncio.ensure_future(session.end())
        while not ending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ending)
        ending.result()

    async def _greet(self, connection: Connection) -> ClientSession | None:
        """Let a client in that proves itself: its session, with a ticket and a secret for its data streams."""
        proved = await connection.authenticate(self.settings.token)
        if len(self._sessions) >= self.settings.max_clients:
            self._store.counts["refused_clients"] += 1
            connection.send(protocol.Goodbye(0, f"{self.settings.max_clients} clients are here: no more are let in"))
            return None
        session = ClientSession(
            connection.peer,
            secrets.token_bytes(16),
            self._store,
            self._slabs.__getitem__,
            connection.send,
            lease_s=self.settings.lease_s,
            stream_secret=proved.stream_secret,
            metrics=self._metrics,
        )
        printable = "".join(c if c.isprintable() else "?" for c in proved.client[:128])
        session.name = f"{printable} ({connection.peer})"
        self._sessions[session.ticket] = session
        offers: list[Any] = [[scheme, listener.contact_address] for scheme, listener in self._listeners.items()]
        name = f"{socket.gethostname()}:{self.settings.port}"
        connection.send(protocol.HelloReply(proved.seq, proved.proof, name, session.ticket, offers))
        return session

    async def _converse(self, connection: Connection, session: ClientSession) -> None:
        async for message in connection.messages():
            if isinstance(message, protocol.Goodbye):
                return
            if isinstance(message, StatsRequest):
                connection.send(protocol.StatsReply(message.seq, self.stats()))
            else:
                session.handle(message)


def is_loopback(host: str) -> bool:
    """Whether a host to bind is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
