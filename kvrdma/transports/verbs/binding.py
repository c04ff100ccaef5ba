"""What this transport needs of a library that speaks verbs, and the choice of one.

Two fill it: pyverbs, which the distribution ships for its own libibverbs, and `ibverbs` from PyPI, one wheel that
finds libibverbs at run time. Everything else here knows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple, Protocol

from kvrdma.errors import ConfigError


class Access(IntFlag):
    """`IBV_ACCESS_*`: what may be done with registered memory."""

    LOCAL_WRITE = 1
    REMOTE_WRITE = 2
    REMOTE_READ = 4


class Wr(IntEnum):
    """`IBV_WR_*`: what a request does."""

    WRITE = 0
    READ = 4


class Status(IntEnum):
    """`IBV_WC_*`: how a request ended. Those that are told apart here."""

    SUCCESS = 0
    LOC_QP_OP_ERR = 2
    LOC_PROT_ERR = 4
    FLUSHED = 5
    REM_INV_REQ_ERR = 9
    REM_ACCESS_ERR = 10
    REM_OP_ERR = 11
    RETRY_EXCEEDED = 12


class Completion(NamedTuple):
    """The end of a request."""

    wr_id: int
    status: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a device can do."""

    max_pairs: int
    max_requests: int
    max_queue: int
    max_reads: int  # that a queue pair may have under way, as the one who asks and as the one who is asked


@dataclass(frozen=True, slots=True)
class PortLimits:
    """What a port can do. MTUs as `IBV_MTU_*`: 1 is 256 bytes, 5 is 4096."""

    active_mtu: int
    max_message_nbytes: int
    lid: int


@dataclass(frozen=True, slots=True)
class PairAddress:
    """What the other end of a queue pair needs to know of this one."""

    pair: int
    psn: int
    lid: int
    gid: bytes
    mtu: int
    max_message_nbytes: int
    max_reads: int


class Region(Protocol):
    """Registered memory."""

    @property
    def lkey(self) -> int:
        """The key for our own requests."""

    @property
    def rkey(self) -> int:
        """The key for a peer's."""

    def close(self) -> None:
        """Deregister it."""


class Pair(Protocol):
    """A reliable connected queue pair. A chain's last request alone says that it ended, unless one fails."""

    @property
    def number(self) -> int:
        """Its number."""

    def connect(self, here: PairAddress, there: PairAddress, port: int, gid_index: int, is_global: bool) -> None:
        """Go to INIT, RTR and RTS."""

    def post(
        self,
        opcode: Wr,
        addresses: Sequence[int],
        nbytes: Sequence[int],
        lkeys: Sequence[int],
        remote_addresses: Sequence[int],
        rkeys: Sequence[int],
    ) -> None:
        """Post one chain. A completion's `wr_id` is its request's place, counted from the last, which has 0."""

    def fail(self) -> None:
        """Go to ERROR: what is posted ends flushed."""

    def close(self) -> None:
        """Destroy it: nothing of what it posted, or a peer posted to it, touches memory here any more."""


class Queue(Protocol):
    """A completion queue with its event channel. `fd` is readable when there is news since `arm`."""

    @property
    def fd(self) -> int:
        """The channel's descriptor."""

    def arm(self) -> None:
        """Make `fd` readable at the next completion."""

    def acknowledge(self) -> None:
        """Take the events that made `fd` readable."""

    def poll(self, n: int) -> Sequence[Completion]:
        """At most `n` completions."""

    def make_pair(self, depth: int, chain: int) -> Pair:
        """A queue pair for `depth` requests, posted in chains of at most `chain`, that end here."""

    def close(self) -> None:
        """Destroy it; its pairs must be gone."""


class Device(Protocol):
    """An open device and its protection domain."""

    @property
    def limits(self) -> Limits:
        """What it can do."""

    def port(self, number: int) -> PortLimits:
        """What a port can do now."""

    def register(self, address: int, nbytes: int, access: Access) -> Region:
        """Register memory that is mapped here."""

    def register_dmabuf(self, fd: int, offset: int, nbytes: int, address: int, access: Access) -> Region:
        """Register memory of a device that exports it as a dmabuf; peers name it by `address`."""

    def make_queue(self, depth: int) -> Queue:
        """A completion queue for `depth` requests."""

    def close(self) -> None:
        """Close it; all that was made of it must be gone."""


class Binding(Protocol):
    """A library that speaks verbs. Failures of verbs are `OSError` with their errno."""

    @property
    def name(self) -> str:
        """`pyverbs` or `ibverbs`."""

    def open(self, device: str) -> Device:
        """Open a device by name."""


TIMEOUT: Final = 16  # 4.096 us * 2**16: 0.27 s a try
RETRIES: Final = 6  # so 1.9 s to a dead peer; never 7, which some drivers take for endless
MIN_RNR_TIMER: Final = 12
HOPS: Final = 64


def _pyverbs() -> Binding:
    from kvrdma.transports.verbs.pyverbs_binding import PyverbsBinding

    return PyverbsBinding()


BINDINGS: Final[dict[str, Callable[[], Binding]]] = {"pyverbs": _pyverbs}


def load_binding(name: str = "") -> Binding:
    """The binding of that name, or else the first that can be had.

    Raises:
        ConfigError: none of that name; or none that works, with the reason for each.
    """
    if name and name not in BINDINGS:
        raise ConfigError(f"verbs: there is no binding {name!r}, only {' and '.join(BINDINGS)}")
    why = []
    for each in [name] if name else BINDINGS:
        try:
            return BINDINGS[each]()
        except ImportError as error:
            why.append(f"{each}: {error}")
    raise ConfigError(f"verbs: no binding to libibverbs works ({'; '.join(why)})")
