"""The pool server: an event loop for the control plane, a transport for the bytes, a store for the blocks."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from kvrdma import protocol
from kvrdma.backends.blockstore import BlockStore, check_capacity
from kvrdma.errors import ConfigError, ProtocolError, TransportError
from kvrdma.policies import policies
from kvrdma.protocol import FrameDecoder, Hello, Message, StatsRequest
from kvrdma.server.session import ClientSession, Slabs
from kvrdma.transports import Endpoint, Listener, Rights, Transport, check_order, transports

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
MAX_CLIENTS: Final = 1024
_CHUNK: Final = 1 << 16
_DRAIN_S: Final = 5.0
_MAX_UNSENT: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a pool server needs to know.

    Raises:
        ConfigError: a value that cannot be meant.
    """

    host: str = "127.0.0.1"
    port: int = 7700
    capacity: int = 1 << 30
    policy: str = "lru"
    transports: tuple[str, ...] = ("tcp",)
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        check_capacity(self.capacity)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port: must lie in 0..65535, not {self.port}")
        if not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r}: only loopback addresses can be bound; any other needs the "
                "authentication that is planned but not built yet"
            )
        if not self.transports:
            raise ConfigError("transports: at least one is needed, such as tcp")
        policies.get(self.policy)
        check_order(self.transports)


class PoolServer:
    """Holds blocks for its clients. `start`, then `serve_until`, on one event loop.

    Raises:
        CapacityError: the host has not the memory.
        ConfigError: an unknown policy or transport.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._store = BlockStore(settings.capacity, policies.get(settings.policy))
        self._transports: dict[str, Transport] = {}
        self._listeners: list[Listener] = []
        self._slabs: dict[str, Slabs] = {}
        self._sessions: dict[bytes, ClientSession] = {}
        self._clients: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._started = time.monotonic()
        self._draining = False

    @property
    def address(self) -> tuple[str, int]:
        """Where clients connect, once started."""
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def start(self) -> None:
        """Open every listener; raises `TransportError` where an address is taken."""
        loop = asyncio.get_running_loop()
        try:
            for scheme in self.settings.transports:
                self._open_transport(scheme, loop)
            self._server = await asyncio.start_server(
                self._on_client, self.settings.host, self.settings.port, limit=_CHUNK
            )
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
        for listener in self._listeners:
            listener.close()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        self._store.close()

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name."""
        return {
            **self._store.stats(),
            "clients": len(self._sessions),
            "policy": self.settings.policy,
            "transports": list(self.settings.transports),
            "uptime_s": round(time.monotonic() - self._started, 3),
        }

    # -- transports

    def _open_transport(self, scheme: str, loop: asyncio.AbstractEventLoop) -> None:
        transport = transports.get(scheme)()
        self._transports[scheme] = transport
        slabs = Slabs({}, {})
        for memory in self._store.reserve_of_slabs.slabs:
            region = transport.register(memory)
            slabs.regions[id(memory)] = region
            slabs.exports[id(memory)] = transport.export(region, Rights.READ)
        self._slabs[scheme] = slabs
        listener = transport.listen(f"{self.settings.host}:0")

        def on_endpoint(endpoint: Endpoint) -> None:
            loop.call_soon_threadsafe(self._on_endpoint, endpoint)

        listener.on_endpoint(on_endpoint)
        self._listeners.append(listener)

    def _on_endpoint(self, endpoint: Endpoint) -> None:
        session = self._sessions.get(endpoint.ticket)
        if session is None:
            logger.warning("a data connection from %s with a ticket that is not ours", endpoint.peer)
            asyncio.get_running_loop().run_in_executor(None, endpoint.abort)
        else:
            session.attach(endpoint)

    # -- clients

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        host, port = writer.get_extra_info("peername")[:2]
        peer = f"{host}:{port}"
        session: ClientSession | None = None
        try:
            if self._draining or len(self._clients) > MAX_CLIENTS:
                return
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            writer.write(protocol.preface())
            decoder = FrameDecoder(peer=peer)

            def send(message: Message) -> None:
                if writer.transport.get_write_buffer_size() > _MAX_UNSENT:
                    writer.transport.abort()
                else:
                    writer.write(protocol.encode(message))

            session = await asyncio.wait_for(self._greet(reader, decoder, send, peer), HELLO_TIMEOUT_S)
            await self._converse(reader, decoder, send, session)
        except ProtocolError as error:
            logger.warning("%s: %s", peer, error)
            self._store.counts["protocol_errors"] += 1
            if not writer.is_closing():
                writer.write(protocol.encode(protocol.Goodbye(0, str(error))))
        except (TimeoutError, ConnectionError, EOFError) as error:
            logger.debug("%s: %s", peer, error or type(error).__name__)
        except asyncio.CancelledError:
            if not writer.is_closing():
                writer.write(protocol.encode(protocol.Goodbye(0, "the server is shutting down")))
        finally:
            if session is not None:
                await self._end(session)
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)
            writer.transport.abort()  # of a client that reads nothing: `Server.wait_closed` would wait for it
            self._clients.discard(task)

    async def _end(self, session: ClientSession) -> None:
        """End a session as a whole, even where the server stops meanwhile: its slots must be free by then."""
        self._sessions.pop(session.ticket, None)
        ending = asyncio.ensure_future(session.end())
        while not ending.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ending)
        ending.result()

    async def _greet(
        self,
        reader: asyncio.StreamReader,
        decoder: FrameDecoder,
        send: Callable[[Message], None],
        peer: str,
    ) -> ClientSession:
        """Read a client's hello, and make its session with a ticket for its data connection."""
        while True:
            data = await reader.read(_CHUNK)
            if not data:
                raise EOFError("left before its hello")
            messages = list(decoder.feed(data))
            if not messages:
                continue
            hello = messages[0]
            if not isinstance(hello, Hello) or len(messages) > 1:
                raise ProtocolError("a hello, and nothing else, must come first")
            session = ClientSession(
                peer,
                secrets.token_bytes(16),
                self._store,
                self._slabs.__getitem__,
                send,
                lease_s=self.settings.lease_s,
            )
            session.name = f"{hello.client[:128]} ({peer})"
            self._sessions[session.ticket] = session
            offers: list[Any] = [
                [scheme, listener.contact_address]
                for scheme, listener in zip(self.settings.transports, self._listeners, strict=True)
            ]
            name = f"{socket.gethostname()}:{self.settings.port}"
            send(protocol.HelloReply(hello.seq, name, session.ticket, offers))
            return session

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        decoder: FrameDecoder,
        send: Callable[[Message], None],
        session: ClientSession,
    ) -> None:
        while data := await reader.read(_CHUNK):
            for message in decoder.feed(data):
                if isinstance(message, protocol.Goodbye):
                    return
                if isinstance(message, StatsRequest):
                    send(protocol.StatsReply(message.seq, self.stats()))
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
