"""`UcxTransport`: connects and listens. Both ends prove themselves on a socket, and then try the lanes of UCX."""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import ClassVar, Final

from kvrdma.auth import PROOF_NBYTES, Role
from kvrdma.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    DeadlineError,
    KVRDMAError,
    ProtocolError,
    TransportError,
)
from kvrdma.memory import Memory
from kvrdma.settings import Url
from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    RemoteRegion,
    Rights,
    SecretOf,
    Transport,
    check_open,
)
from kvrdma.transports.tcp import keep_alive
from kvrdma.transports.ucx import wire
from kvrdma.transports.ucx.core import Core
from kvrdma.transports.ucx.endpoint import UcxEndpoint
from kvrdma.transports.ucx.library import load_library
from kvrdma.transports.ucx.listener import UcxListener
from kvrdma.transports.ucx.settings import NO_PORT, Lanes, rdma_ports
from kvrdma.transports.ucx.wire import Frame, Hello, Kind
from kvrdma.transports.ucx.worker import Worker

logger = logging.getLogger(__name__)

_BACKLOG: Final = 128


class UcxTransport(Transport):
    """One-sided get and put of UCX, over RDMA. `device` is one of UCX's names, such as mlx5_0:1, instead of any.

    Keys of UCX carry every right over InfiniBand and RoCE: what was exported to be read, a peer that breaks the
    rules can write.

    Raises:
        TransportError: UCX is missing, too old or twice in this process, or finds no device.
    """

    scheme: ClassVar[str] = "ucx"
    by_name_only: ClassVar[bool] = True  # until the faults of links and peers are tests in the guest
    enforces_rights: ClassVar[bool] = False

    def __init__(self, *, lanes: Lanes = Lanes.RDMA, device: str = "") -> None:
        self.lanes = lanes
        if device and self.lanes is not Lanes.RDMA:
            raise ConfigError(f"ucx: a device ({device}) is chosen for RDMA lanes only, not for {self.lanes.value}")
        self._core = Core(self.lanes, device)
        self._listeners: list[UcxListener] = []
        self._guard = threading.Lock()
        self._closed = False
        library = self._core.context.library
        logger.info(
            "ucx: %s, version %s, %s",
            library.path,
            ".".join(map(str, library.version)),
            " ".join(f"UCX_{name}={value}" for name, value in self._core.variables.items()),
        )

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable; raises `TransportError` where the host does not let it be locked."""
        if memory.device != "cpu":
            raise ConfigError(f"ucx: memory on {memory.device} cannot be registered, only CPU memory")
        check_open(self._closed, "ucx transport")
        return self._core.register(memory)

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region: peers let go of its keys, or lose their connections, before this returns.

        On the transport's own thread it does not wait for them: whoever still reads then loses its connection.
        """
        if not self._closed:
            self._core.deregister(region)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for a region."""
        return self._core.table.export(region, rights)

    def revoke(self, remote: RemoteRegion) -> None:
        """Take a key back, and wait until no peer uses it."""
        self._core.table.revoke(remote)

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Reach a listener, and read a few bytes from it over the lanes that transfers will take."""
        check_open(self._closed, "ucx transport")
        if len(ticket) > wire.MAX_TICKET:
            raise ConfigError(f"ucx: a ticket has at most {wire.MAX_TICKET} bytes, not {len(ticket)}")
        host, port, lanes = parse_address(address)
        if lanes not in {None, self.lanes}:
            raise TransportError(f"ucx: {address}: the peer runs over other lanes than this side ({self.lanes.value})")
        deadline = time.monotonic() + timeout
        sock: socket.socket | None = None
        try:
            sock = socket.create_connection((host, port), timeout=_left(deadline, address))
            if sock.getsockname() == sock.getpeername():
                # Where nobody listens on a port of the ephemeral range, TCP may meet and greet itself.
                raise TransportError(f"ucx: cannot reach {address}: nobody listens there")
            keep_alive(sock)
            _introduce(sock, wire.Greeting(ticket), secret, deadline, address)
            worker = self._core.make_worker()
            try:
                theirs = _exchange(sock, self._core.hello(worker), deadline, address)
                return self._begin(worker, sock, theirs, ticket, deadline, address)
            finally:
                self._core.give_up(worker)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError) and not isinstance(error, DeadlineError):
                raise DeadlineError(f"ucx: {address} did not answer within {timeout} s") from None
            if isinstance(error, OSError) and not isinstance(error, DeadlineError):
                raise TransportError(f"ucx: cannot reach {address}: {error.strerror or error}") from error
            raise

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Open a listener on host:port; port 0 picks a free one."""
        check_open(self._closed, "ucx transport")
        host, port, _ = parse_address(address, allow_zero=True)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise TransportError(f"ucx: cannot listen on {address}: {error.strerror or error}") from error
        try:
            listener = UcxListener(sock, host, self.lanes, self._core, secret_of)
        except ClosedError:
            sock.close()
            raise
        with self._guard:
            self._listeners.append(listener)
        if self._closed:  # meanwhile, by another thread
            listener.close()
            raise ClosedError("ucx transport: closed")
        return listener

    def close(self) -> None:
        """Abort every endpoint, end the I/O thread, and give everything back to UCX."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.close()
        self._core.close()

    @classmethod
    def usable(cls) -> str | None:
        """Why UCX cannot be used in this process, or not over RDMA, which is all it is meant for; else None."""
        if not rdma_ports():
            return NO_PORT
        try:
            load_library()
        except TransportError as error:
            return str(error)
        return None

    @classmethod
    def can_reach(cls, address: str) -> bool:
        """Whether the peer's lanes, which its address names, are RDMA."""
        try:
            return parse_address(address)[2] is Lanes.RDMA
        except ConfigError:
            return False

    def _begin(
        self, worker: Worker, sock: socket.socket, theirs: Hello, ticket: bytes, deadline: float, address: str
    ) -> Endpoint:
        """Make the endpoint, and give it once its lanes have brought the peer's probe."""
        endpoints: list[UcxEndpoint] = []
        errors: list[KVRDMAError | None] = []
        over = threading.Event()

        def conclude(error: KVRDMAError | None) -> None:
            errors.append(error)
            over.set()

        with self._core.landing_place() as landing:

            def begin() -> None:
                try:
                    endpoint = self._core.adopt(worker, theirs, sock, peer=address, ticket=ticket)
                except (TransportError, ClosedError) as error:
                    conclude(error)
                    return
                endpoints.append(endpoint)
                endpoint.add_close_callback(lambda: conclude(endpoint.why))
                try:
                    endpoint.probe(theirs, landing, conclude)
                except TransportError as error:
                    endpoint.tear_down(error)

            self._core.loop.run(begin)
            if not over.wait(max(0.0, deadline - time.monotonic())):
                conclude(DeadlineError(f"ucx: {address}: nothing came over the {self.lanes.value} lanes in time"))
            error = errors[0]
            if error is None and landing.read() != theirs.probe:
                error = TransportError(f"ucx: {address}: the {self.lanes.value} lanes brought wrong bytes")
            if error is not None:
                for endpoint in endpoints:
                    endpoint.abort()
                raise error
            return endpoints[0]


def parse_address(address: str, *, allow_zero: bool = False) -> tuple[str, int, Lanes | None]:
    """Split host:port or host:port?lanes=rdma; raises `ConfigError`."""
    place, _, _ = address.partition("?")
    if allow_zero and place.endswith(":0"):
        host, _, lanes = parse_address(address.replace(":0", ":1", 1) if "?" in address else place[:-1] + "1")
        return host, 0, lanes
    url = Url.parse(f"ucx://{address}")
    named = dict(url.options)
    lanes_text = named.pop("lanes", None)
    if len(url.hosts) != 1 or url.hosts[0][1] is None or url.path or named:
        raise ConfigError(f"ucx: {address!r} is not host:port or host:port?lanes=rdma")
    try:
        lanes = None if lanes_text is None else Lanes(lanes_text)
    except ValueError:
        raise ConfigError(
            f"ucx: {address!r}: lanes are one of {', '.join(lane.value for lane in Lanes)}, not {lanes_text!r}"
        ) from None
    return url.hosts[0][0], url.hosts[0][1], lanes


def _introduce(sock: socket.socket, greeting: wire.Greeting, secret: bytes, deadline: float, address: str) -> None:
    sock.sendall(greeting.encode())
    challenge = wire.decode_challenge(_receive_exactly(sock, wire.CHALLENGE_NBYTES, deadline, address))
    sock.sendall(greeting.prove(Role.CLIENT, secret, challenge))
    proof = _receive_exactly(sock, PROOF_NBYTES, deadline, address)
    if not greeting.check(proof, Role.SERVER, secret, challenge):
        raise AuthenticationError(f"ucx: {address} did not prove that it knows the secret of this ticket")


def _exchange(sock: socket.socket, ours: Hello, deadline: float, address: str) -> Hello:
    """Tell each other where the workers are. READY says that the listener has handed its end over."""
    sock.sendall(Frame(Kind.HELLO, 0, ours.encode()).encode())
    theirs = Hello.decode(_receive_frame(sock, Kind.HELLO, deadline, address))
    _receive_frame(sock, Kind.READY, deadline, address)
    return theirs


def _receive_frame(sock: socket.socket, kind: Kind, deadline: float, address: str) -> bytes:
    found, _, nbytes = wire.decode_header(_receive_exactly(sock, wire.HEADER_NBYTES, deadline, address))
    if found is not kind:
        raise ProtocolError(f"ucx: {address} sent {found.name} where {kind.name} was due")
    return _receive_exactly(sock, nbytes, deadline, address)


def _left(deadline: float, address: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineError(f"ucx: {address} did not answer in time")
    return left


def _receive_exactly(sock: socket.socket, n: int, deadline: float, address: str) -> bytes:
    raw = b""
    while len(raw) < n:
        sock.settimeout(_left(deadline, address))
        part = sock.recv(n - len(raw))
        if not part:
            raise TransportError(
                f"ucx: {address} turned us away: another version, a ticket or secret that it does not know"
            )
        raw += part
    return raw
