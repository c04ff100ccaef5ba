"""A lane: a queue pair with its completion queue, and the chains of requests that are under way on it."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvrdma.transports.verbs.binding import Completion, PairAddress, Status, Wr
from kvrdma.transports.verbs.rail import Rail

logger = logging.getLogger(__name__)

DEPTH: Final = 64
CHAIN: Final = 16
_DRAIN_S: Final = 2.0


@dataclass(slots=True, eq=False)
class Chain:
    """Requests that were posted together. `owner` gets them back with how many of them, from the first, are done."""

    owner: Any
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Failure:
    """The first request that failed: the place in its chain, and how."""

    chain: Chain
    place: int
    status: int


class Lane:
    """One connection's requests. Only for the thread of its transport.

    Every request has room in the completion queue, so that it cannot overflow even where all fail. Requests end in
    the order in which they were posted: the end of a chain's last one is that of all of it.
    """

    def __init__(self, rail: Rail, on_done: Callable[[Chain, int], None]) -> None:
        self._rail = rail
        self._on_done = on_done
        self.depth = min(DEPTH, rail.device.limits.max_requests, rail.device.limits.max_queue - 1)
        self.chain = min(CHAIN, self.depth)
        self._queue = rail.make_queue(self.depth + 1)
        try:
            self._pair = rail.make_pair(self._queue, self.depth, self.chain)
        except BaseException:
            rail.close_queue(self._queue)
            raise
        self._chains: deque[Chain] = deque()
        self.in_flight = 0
        self._psn = secrets.randbits(24)
        self._closing = False
        self._gone = False

    @property
    def fd(self) -> int:
        """Readable when there are completions."""
        return self._queue.fd

    @property
    def room(self) -> int:
        """How many requests may be posted now."""
        return self.depth - self.in_flight

    def address(self) -> PairAddress:
        """How the other end reaches this one."""
        limits = self._rail.limits
        return PairAddress(
            self._pair.number,
            self._psn,
            limits.lid,
            self._rail.gid,
            limits.active_mtu,
            limits.max_message_nbytes,
            min(255, self._rail.device.limits.max_reads),
        )

    def connect(self, there: PairAddress) -> None:
        """Connect to the other end; raises `OSError`."""
        pick = self._rail.pick
        is_global = pick.port.ethernet or there.lid == 0
        index = 0 if pick.gid is None else pick.gid.index
        self._pair.connect(self.address(), there, pick.port.number, index, is_global)
        self._queue.arm()

    def post(
        self,
        owner: Any,
        first: int,
        opcode: Wr,
        addresses: Sequence[int],
        nbytes: Sequence[int],
        lkeys: Sequence[int],
        remote_addresses: Sequence[int],
        rkeys: Sequence[int],
    ) -> None:
        """Post one chain of at most `chain` requests, for which there is room; raises `OSError`."""
        self._pair.post(opcode, addresses, nbytes, lkeys, remote_addresses, rkeys)
        self._chains.append(Chain(owner, first, len(addresses)))
        self.in_flight += len(addresses)

    def progress(self, *, signalled: bool) -> Failure | None:
        """Take completions; the first failure, after which only `close` is of use."""
        if signalled:
            self._queue.acknowledge()
            self._queue.arm()
        while not self._gone and (completions := self._queue.poll(self.depth)):
            for completion in completions:
                failure = self._take(completion)
                if failure is not None or self._gone:
                    return failure
        return None

    def _take(self, completion: Completion) -> Failure | None:
        chain = self._chains[0]
        if completion.status != Status.SUCCESS:
            return Failure(chain, chain.count - 1 - completion.wr_id, completion.status)
        self._chains.popleft()
        self.in_flight -= chain.count
        self._on_done(chain, chain.count)
        return None

    def close(self, failure: Failure | None = None) -> list[tuple[Chain, int]]:
        """Go to ERROR, drain, destroy. Gives the chains that did not end well, with how many requests of each did.

        When it returns neither what was posted nor what the peer posted touches memory here any more. A WRITE that
        is on its way may still land at the peer, until that closes its own end.
        """
        if self._closing:
            return []
        self._closing = True
        if failure is None:
            failure = self._fail_and_drain()
        ended, self._chains = list(self._chains), deque()
        self.in_flight = 0
        self._gone = True
        self._rail.close_pair(self._pair)
        self._rail.close_queue(self._queue)
        return [(chain, failure.place if failure and chain is failure.chain else 0) for chain in ended]

    def _fail_and_drain(self) -> Failure | None:
        try:
            self._pair.fail()
        except OSError as error:
            logger.debug("verbs: a queue pair did not go to ERROR: %s", error)
            return None
        deadline = time.monotonic() + _DRAIN_S
        while self._chains:
            failure = self.progress(signalled=False)
            if failure is not None:
                return failure  # those that ended well before it have been told
            if time.monotonic() > deadline:
                logger.warning("verbs: a queue pair in ERROR did not flush its requests within %s s", _DRAIN_S)
                return None
            time.sleep(0.0005)
        return None
