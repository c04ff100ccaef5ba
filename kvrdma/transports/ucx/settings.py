"""Over which lanes UCX runs, and the variables that a version of it needs for them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Final

INFINIBAND: Final = Path("/sys/class/infiniband")
NO_PORT: Final = "ucx: no RDMA port of this host is up (see: rdma link, or ibv_devinfo)"
_DGID_CHECK_MENDED: Final = (1, 19)


class Lanes(Enum):
    """What carries the bytes.

    LOOPBACK is UCX's own emulation over TCP within one host. It stands for RDMA where there is none, in tests and
    benchmarks, and for nothing else: UCX (1.13 to 1.19 at least) ends the process that is to answer an emulated get
    when its connection has gone meanwhile.
    """

    RDMA = "rdma"
    LOOPBACK = "loopback"

    @property
    def piece_nbytes(self) -> int:
        """A longer range goes as several operations."""
        return 4 << 20 if self is Lanes.RDMA else 32 << 10

    @property
    def window_nbytes(self) -> int:
        """How many bytes may be under way: a cancelled transfer waits for no more than these.

        In the emulation no more than a socket takes at once, so that no answer waits for room.
        """
        return 16 << 20 if self is Lanes.RDMA else 64 << 10

    @property
    def drain_s(self) -> float:
        """How long an end by force waits for what this side has under way; see above why it does at all."""
        return 0.0 if self is Lanes.RDMA else 1.0


def rdma_ports(root: Path = INFINIBAND) -> list[str]:
    """The RDMA ports of this host whose link is up, as UCX names them: device:port."""
    ports = []
    for state in sorted(root.glob("*/ports/*/state")):
        try:
            up = "ACTIVE" in state.read_text()
        except OSError:  # a device that is just going
            continue
        if up:
            ports.append(f"{state.parts[-4]}:{state.parts[-2]}")
    return ports


def lanes_here(root: Path = INFINIBAND) -> Lanes:
    """RDMA where this host has a port that is up."""
    return Lanes.RDMA if rdma_ports(root) else Lanes.LOOPBACK


def variables(lanes: Lanes, version: tuple[int, int, int], device: str = "") -> dict[str, str]:
    """What UCX is told, as names without `UCX_` and values; what the environment says of the same counts nothing.

    - No lane but those that were asked for: with another in the list UCX would take it for what it finds too
      small or too large for RDMA.
    - A peer that is gone is noticed after 0.7 s (7 tries of 100 ms); UCX's default takes 52 s.
    - One connection uses no receive buffers but a few for its set-up: UCX would register 32 MB for each.
    - UCX before 1.19 reads the kind of a RoCE packet from where only some devices put it, and drops, on others,
      every packet of the connections' set-up; then it ends the process after 30 s.
    """
    if lanes is Lanes.LOOPBACK:
        return {"TLS": "tcp", "NET_DEVICES": "lo"}
    found = {
        "TLS": "rc,ud",
        "NET_DEVICES": device or ",".join(rdma_ports()) or "all",
        "RC_RETRY_COUNT": "6",
        "RC_TIMEOUT": "100ms",
        "RC_RX_QUEUE_LEN": "256",
        "UD_RX_QUEUE_LEN": "256",
    }
    if version < _DGID_CHECK_MENDED:
        found["UD_ETH_DGID_CHECK"] = "n"
    return found
