"""`RailsTransport`: registers with every rail, connects what it can, and keeps it connected."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import ClassVar, Final

from kvrdma.errors import ClosedError, ConfigError, DeadlineError, KVRDMAError, RegionError, TransportError
from kvrdma.memory import Memory
from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    RemoteRegion,
    Rights,
    SecretOf,
    Transport,
)
from kvrdma.transports.listeners import QueueListener
from kvrdma.transports.loop import IoLoop, Timer
from kvrdma.transports.parts import OpenParts
from kvrdma.transports.rails.endpoint import RailsEndpoint
from kvrdma.transports.rails.wire import (
    GROUP_NBYTES,
    RailTicket,
    check_ticket,
    decode_address,
    decode_token,
    encode_address,
    encode_token,
)
from kvrdma.transports.regions import RegionTable

logger = logging.getLogger(__name__)

COOL_DOWN_S: Final = 5.0
GRACE_S: Final = 2.0
_MAX_DOUBLINGS: Final = 6


class RailsTransport(Transport):
    """Transports by name, best first, as one; neighbours of one scheme are a tier. Closes them with itself.

    A rail that failed is tried again after `cool_down` seconds. The end that accepted waits `grace` seconds for
    the other one to bring a new rail once its last has ended. Both ends name their rails alike.

    Raises:
        ConfigError: no rail at all, or a name that cannot stand in an address.
    """

    scheme: ClassVar[str] = "rails"

    def __init__(
        self, rails: Mapping[str, Transport], *, cool_down: float = COOL_DOWN_S, grace: float = GRACE_S
    ) -> None:
        if not rails or any(not name or set(name) & set("|=") for name in rails):
            raise ConfigError(f"rails: names without | and = are needed, not {', '.join(rails) or 'none at all'}")
        self.rails = dict(rails)
        self.tiers: Sequence[Sequence[str]] = [
            list(names) for _, names in groupby(self.rails, key=lambda name: self.rails[name].scheme)
        ]
        self.cool_down = cool_down
        self.grace = grace
        self.clock = IoLoop("kvrdma-rails")
        self.workers = ThreadPoolExecutor(4, thread_name_prefix="kvrdma-rails-connect")
        self._table = RegionTable(self.scheme)
        self._inner: dict[int, dict[str, MemoryRegion]] = {}
        self._parts: OpenParts[Endpoint] = OpenParts(self.scheme)

    # -- memory

    def register(self, memory: Memory) -> MemoryRegion:
        """Make memory usable with every rail that can take it; raises what the last one says where none can."""
        inner: dict[str, MemoryRegion] = {}
        refusal: KVRDMAError | None = None
        for name, transport in self.rails.items():
            try:
                inner[name] = transport.register(memory)
            except KVRDMAError as error:
                logger.warning("rails: %s cannot use memory of %d bytes: %s", name, memory.nbytes, error)
                refusal = error
        if not inner and refusal is not None:
            raise refusal
        region = self._table.register(memory)
        self._inner[region.handle] = inner
        return region

    def deregister(self, region: MemoryRegion) -> None:
        """Forget a region and revoke its exports."""
        self._table.deregister(region)
        for name, inner in self._inner.pop(region.handle, {}).items():
            self.rails[name].deregister(inner)

    def export(self, region: MemoryRegion, rights: Rights) -> RemoteRegion:
        """Make a key for each rail that can; raises what the last one says where none can."""
        self._table.check([region])
        tokens: dict[str, bytes] = {}
        refusal: KVRDMAError | None = None
        for name, inner in self._inner[region.handle].items():
            try:
                tokens[name] = self.rails[name].export(inner, rights).token
            except KVRDMAError as error:
                logger.info("rails: %s cannot export memory of %d bytes: %s", name, region.nbytes, error)
                refusal = error
        if not tokens and refusal is not None:
            raise refusal
        return RemoteRegion(self.scheme, region.nbytes, encode_token(tokens))

    def revoke(self, remote: RemoteRegion) -> None:
        """Take the key of every rail back."""
        try:
            tokens = decode_token(remote.token)
        except RegionError:
            return
        for name, token in tokens.items():
            if name in self.rails:
                self.rails[name].revoke(self.remote(name, remote.nbytes, token))

    def check(self, regions: Sequence[MemoryRegion]) -> None:
        """Raise `RegionError` where one of them is not registered here."""
        self._table.check(regions)

    def inner(self, region: MemoryRegion) -> dict[str, MemoryRegion]:
        """A region as each rail knows it that can use it; empty where it was deregistered meanwhile."""
        return self._inner.get(region.handle, {})

    def remote(self, name: str, nbytes: int, token: bytes) -> RemoteRegion:
        """A peer's region as a rail takes it."""
        return RemoteRegion(self.rails[name].scheme, nbytes, token)

    # -- connections

    def connect(self, address: str, *, timeout: float, ticket: bytes = b"", secret: bytes = b"") -> Endpoint:
        """Connect the best rails that both ends have."""
        self._parts.check()
        check_ticket(ticket)
        addresses = {
            name: inner
            for name, inner in decode_address(address).items()
            if name in self.rails and self.rails[name].can_reach(inner)
        }
        if not addresses:
            raise TransportError(f"rails: none of {', '.join(self.rails)} reaches {address}")
        endpoint = RailsEndpoint(self, peer=address, ticket=ticket)
        connector = Connector(self, endpoint, addresses, ticket, secret, timeout)
        endpoint.keep(connector)
        connector.begin()
        self._adopt(endpoint)
        return endpoint

    def listen(self, address: str, *, secret_of: SecretOf | None = None) -> Listener:
        """Listen with every rail that the address names; an empty one is where a rail likes."""
        self._parts.check()
        addresses = decode_address(address)
        unknown = set(addresses) - set(self.rails)
        if unknown:
            raise ConfigError(f"rails: there is no rail {', '.join(sorted(unknown))}; known: {', '.join(self.rails)}")
        listener = RailsListener(self, secret_of, self._adopt)
        try:
            for name, inner in addresses.items():
                listener.open(name, inner)
        except BaseException:
            listener.close()
            raise
        return self._parts.add_listener(listener)

    def close(self) -> None:
        """Abort every endpoint, and close every rail."""
        if not self._parts.close():
            return
        self.workers.shutdown()
        self._parts.abort_endpoints()
        for transport in self.rails.values():
            transport.close()
        self.clock.close()

    def _adopt(self, endpoint: RailsEndpoint) -> None:
        self._parts.add_endpoint(endpoint)


class Connector:
    """Keeps the rails of an endpoint connected, on the end that connected it."""

    def __init__(
        self,
        transport: RailsTransport,
        endpoint: RailsEndpoint,
        addresses: Mapping[str, str],
        ticket: bytes,
        secret: bytes,
        timeout: float,
    ) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._addresses = addresses
        self._ticket = RailTicket(secrets.token_bytes(GROUP_NBYTES), True, ticket)
        self._secret = secret
        self._timeout = timeout
        self._guard = threading.Lock()
        self._not_before: dict[str, float] = {}
        self._n_failures: dict[str, int] = {}
        self._wanted: set[str] = set()
        self._working = False
        self._again = False
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Connect the best tier that can be; raises what went wrong where none can."""
        deadline = time.monotonic() + self._timeout
        failures: dict[str, KVRDMAError] = {}
        for tier in self._transport.tiers:
            for name in tier:
                if name in self._addresses:
                    self._try(name, failures, deadline - time.monotonic())
            if self._endpoint.living:
                break
        if not self._endpoint.living:
            self._endpoint.abort()
            if len(failures) == 1:
                raise next(iter(failures.values()))
            if all(isinstance(failure, DeadlineError) for failure in failures.values()):
                raise DeadlineError(f"rails: {_reasons(failures)}")
            raise TransportError(f"rails: {_reasons(failures)}")
        self._plan()

    def lost(self, name: str) -> None:
        """Leave a rail alone for a while, and see what else there is."""
        with self._guard:
            self._rest(name)
        self._work()

    def wanted(self, names: set[str]) -> None:
        """Connect one of these, too, though better rails may live: they cannot take some memory."""
        with self._guard:
            self._wanted |= names & self._addresses.keys()
        self._work()

    def _work(self) -> None:
        with self._guard:
            self._again = True
            if self._working:
                return
            self._working = True
        try:
            self._transport.workers.submit(self._run)
        except RuntimeError:  # the transport is being closed
            with self._guard:
                self._working = False

    def _run(self) -> None:
        while True:
            with self._guard:
                if not self._again or self._endpoint.closed():
                    self._working = False
                    break
                self._again = False
                wanted, self._wanted = self._wanted, set()
            number, parked = self._endpoint.waiting()
            try:
                self._restore(wanted | parked, number)
            except Exception:
                logger.exception("rails endpoint to %s: its rails could not be restored", self._endpoint.peer)
        self._plan()

    def _restore(self, wanted: set[str], number: int) -> None:
        """Connect what can be; what was parked up to a number and still finds no rail has failed."""
        failures: dict[str, KVRDMAError] = {}
        for patient in (True, False):  # without a cool-down only where nothing else is left
            for tier in self._transport.tiers:
                for name in tier:
                    rested = self._not_before.get(name, 0.0) <= time.monotonic()
                    if name in self._addresses and name not in self._endpoint.living and (rested or not patient):
                        self._try(name, failures, self._timeout)
                if set(tier) & set(self._endpoint.living):
                    break
            if self._endpoint.living:
                break
        for name in self._addresses:  # what the living ones cannot take
            if name in wanted and not wanted & set(self._endpoint.living):
                self._try(name, failures, self._timeout)
        if not self._endpoint.living:
            self._endpoint.end(TransportError(f"rails: none is left: {_reasons(failures)}"))
        else:
            why = TransportError(f"rails: none that could take this: {_reasons(failures)}")
            self._endpoint.resume(why, until=number)

    def _try(self, name: str, failures: dict[str, KVRDMAError], timeout: float) -> None:
        """Connect one rail."""
        transport = self._transport.rails[name]
        try:
            inner = transport.connect(
                self._addresses[name],
                timeout=max(0.001, timeout),
                ticket=self._ticket.encode(),
                secret=self._secret,
            )
        except KVRDMAError as error:
            failures[name] = error
            with self._guard:
                self._rest(name)
            logger.info("rails endpoint to %s: no %s: %s", self._endpoint.peer, name, error)
            return
        self._n_failures.pop(name, None)
        self._ticket = RailTicket(self._ticket.group, False, self._ticket.ticket)
        self._endpoint.add(name, inner)

    def _rest(self, name: str) -> None:
        """Leave a rail alone: for the cool-down, and each time that it fails again for twice as long."""
        n = self._n_failures.get(name, 0)
        self._n_failures[name] = n + 1
        self._not_before[name] = time.monotonic() + self._transport.cool_down * 2 ** min(n, _MAX_DOUBLINGS)

    def _plan(self) -> None:
        """Have rails that are as good as the living ones, or better, tried again when they have rested."""
        living = set(self._endpoint.living)
        missing: list[str] = []
        for tier in self._transport.tiers:
            missing += [name for name in tier if name in self._addresses and name not in living]
            if living & set(tier):
                break
        if not missing or self._endpoint.closed():
            return
        when = min(self._not_before.get(name, 0.0) for name in missing)

        def set_timer() -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._transport.clock.call_at(when, self._work)

        try:
            self._transport.clock.call_soon(set_timer)
        except ClosedError:
            logger.debug("rails endpoint to %s: closed", self._endpoint.peer)


class Waiter:
    """What the end that accepted does about its rails: it waits for the other one, for a while."""

    def __init__(self, transport: RailsTransport, endpoint: RailsEndpoint) -> None:
        self._transport = transport
        self._endpoint = endpoint

    def lost(self, name: str) -> None:
        """Give the other end time to bring another one."""
        if self._endpoint.living:
            return
        try:
            self._transport.clock.call_soon(self._start)
        except ClosedError:
            logger.debug("rails endpoint to %s: closed", self._endpoint.peer)

    def wanted(self, names: set[str]) -> None:
        """Nothing to do: the other end knows what it exported, and brings the rail."""

    def _start(self) -> None:
        self._transport.clock.call_at(time.monotonic() + self._transport.grace, self._look)

    def _look(self) -> None:
        if not self._endpoint.living and not self._endpoint.closed():
            self._endpoint.end(TransportError("rails: the last one ended, and the peer brought no other"))


class RailsListener(QueueListener):
    """Puts the rails of one connection together. A peer that uses one transport alone gets its endpoint as it is."""

    def __init__(
        self, transport: RailsTransport, secret_of: SecretOf | None, adopt: Callable[[RailsEndpoint], None]
    ) -> None:
        super().__init__("rails")
        self._transport = transport
        self._secret_of = secret_of
        self._adopt = adopt
        self._inner: dict[str, Listener] = {}
        self._groups: dict[bytes, RailsEndpoint] = {}

    def open(self, name: str, address: str) -> None:
        """Listen with one more rail; raises as that rail's `listen`."""
        inner = self._transport.rails[name].listen(address, secret_of=self._secret)
        self._inner[name] = inner
        inner.on_endpoint(lambda endpoint: self._on_inner(name, endpoint))

    @property
    def contact_address(self) -> str:
        """What a peer gives to `RailsTransport.connect`."""
        return encode_address(self.addresses)

    @property
    def addresses(self) -> dict[str, str]:
        """The address of each rail, for a peer that uses one by itself."""
        return {name: inner.contact_address for name, inner in self._inner.items()}

    def _shut(self) -> None:
        for inner in self._inner.values():
            inner.close()

    def _secret(self, ticket: bytes) -> bytes | None:
        rail = RailTicket.decode(ticket)
        if rail is None:
            return b"" if self._secret_of is None else self._secret_of(ticket)
        if not rail.first and rail.group not in self._groups:
            return None  # of a connection that this end has ended
        return b"" if self._secret_of is None else self._secret_of(rail.ticket)

    def _on_inner(self, name: str, inner: Endpoint) -> None:
        rail = RailTicket.decode(inner.ticket)
        if rail is None:
            self.deliver(inner)
            return
        with self._guard:
            known = self._groups.get(rail.group)
            endpoint = known or RailsEndpoint(self._transport, peer=inner.peer, ticket=rail.ticket)
            if known is None and rail.first:
                self._groups[rail.group] = endpoint
        if known is None:
            try:
                if not rail.first:
                    raise ClosedError("rails: a rail of a connection that has ended")
                endpoint.keep(Waiter(self._transport, endpoint))
                endpoint.add_close_callback(lambda: self._forget(rail.group))
                self._adopt(endpoint)
            except ClosedError as error:
                logger.debug("rails listener: %s: %s", inner.peer, error)
                inner.abort()
                return
        endpoint.add(name, inner)
        if known is None:
            self.deliver(endpoint)

    def _forget(self, group: bytes) -> None:
        with self._guard:
            self._groups.pop(group, None)


def _reasons(failures: Mapping[str, KVRDMAError]) -> str:
    return "; ".join(f"{name}: {error}" for name, error in failures.items()) or "no rail answers"
