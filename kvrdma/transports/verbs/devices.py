"""Which RDMA devices, ports and GIDs there are, from sysfs, and which of them is taken for a peer."""

from __future__ import annotations

import ipaddress
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvrdma.errors import ConfigError, TransportError

logger = logging.getLogger(__name__)

SYSFS: Final = Path("/sys/class/infiniband")
_V2: Final = "RoCE v2"
_MAX_HOLE: Final = 16  # tables have up to thousands of entries, nearly all of them empty
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Gid:
    """An entry of a port's table."""

    index: int
    raw: bytes
    kind: str

    @property
    def address(self) -> Address:
        """The IP address that it stands for; an IPv4 one is mapped into it."""
        whole = ipaddress.IPv6Address(self.raw)
        return whole.ipv4_mapped or whole

    def __str__(self) -> str:
        return f"GID {self.index} ({self.address}, {self.kind})"


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a device. `state` and `link_layer` as sysfs says them: ACTIVE, Ethernet."""

    device: str
    number: int
    state: str
    link_layer: str
    lid: int
    rate: str
    driver: str
    netdev: str = ""
    gids: tuple[Gid, ...] = field(default=(), repr=False)

    @property
    def ethernet(self) -> bool:
        """Whether this is RoCE; else it is InfiniBand, which has LIDs."""
        return self.link_layer == "Ethernet"

    def gid(self) -> Gid | None:
        """The GID to use: RoCE v2 of an IPv4 address, else of a global IPv6 address, else of a link-local one."""
        if not self.ethernet:
            return self.gids[0] if self.gids else None
        usable = [gid for gid in self.gids if gid.kind == _V2]
        return min(usable, key=lambda gid: (_worth(gid.address), gid.index), default=None)

    def why_not(self) -> str | None:
        """Why it cannot be used, or None."""
        if self.state != "ACTIVE":
            where = f" (its network device is {self.netdev})" if self.netdev else ""
            return f"port {self.number} of {self.device} is {self.state}, not ACTIVE{where}"
        if not self.ethernet:
            return None if self.lid else f"port {self.number} of {self.device} has no LID: is a subnet manager running?"
        if self.gid() is None:
            return (
                f"port {self.number} of {self.device} has no RoCE v2 GID: give {self.netdev or 'its network device'} "
                "an IP address"
            )
        return None

    def __str__(self) -> str:
        return f"{self.device} port {self.number}"


@dataclass(frozen=True, slots=True)
class Pick:
    """A port that is taken, with the GID to use, and why."""

    port: Port
    gid: Gid | None
    why: str

    def __str__(self) -> str:
        return f"{self.port}, {self.gid or f'LID {self.port.lid}'}: {self.why}"


def _worth(address: Address) -> int:
    if isinstance(address, ipaddress.IPv4Address):
        return 0
    return 2 if address.is_link_local else 1


def _read(path: Path, default: str = "") -> str:
    try:
        return path.read_text().strip()
    except OSError:  # empty entries of a GID table say EINVAL
        return default


def list_ports(sysfs: Path = SYSFS) -> list[Port]:
    """Every port of every device, in the order of their names."""
    if not sysfs.is_dir():
        return []
    return [
        _port(device, folder)
        for device in sorted(sysfs.iterdir())
        for folder in sorted((device / "ports").glob("*"), key=lambda path: int(path.name))
    ]


def _gids_of(folder: Path) -> Iterator[tuple[Gid, str]]:
    """The entries of a port's table, with their network devices. Entries are taken from the first on."""
    empty = 0
    for index in itertools.count():
        text = _read(folder / "gids" / str(index)).replace(":", "")
        if len(text) == 32 and text.strip("0"):
            kind = _read(folder / "gid_attrs" / "types" / str(index), "IB")
            yield Gid(index, bytes.fromhex(text), kind), _read(folder / "gid_attrs" / "ndevs" / str(index))
            empty = 0
        elif (empty := empty + 1) == _MAX_HOLE:
            return


def _port(device: Path, folder: Path) -> Port:
    gids = list(_gids_of(folder))
    driver = device / "device" / "driver"
    return Port(
        device.name,
        int(folder.name),
        _read(folder / "state").rpartition(":")[2].strip() or "unknown",
        _read(folder / "link_layer", "unknown"),
        int(_read(folder / "lid", "0"), 0),
        _read(folder / "rate"),
        driver.resolve().name if driver.exists() else device.name.rstrip("0123456789_"),
        next((netdev for _, netdev in gids if netdev), ""),
        tuple(gid for gid, _ in gids),
    )


def pick_port(ports: Sequence[Port], *, wanted: str = "", local_address: str = "") -> Pick:
    """Choose a port: by the user's word (a device, device:port, or a network such as 10.1.0.0/16), else by the route.

    `local_address` is where the route to the peer begins.

    Raises:
        ConfigError: `wanted` names nothing that is here.
        TransportError: what is wanted or on the route cannot be used, or there is nothing, or several without reason
            to prefer one.
    """
    pick = _by_word(ports, wanted) if wanted else _by_route(ports, local_address)
    logger.info("verbs: takes %s", pick)
    return pick


def _by_word(ports: Sequence[Port], wanted: str) -> Pick:
    try:
        network = ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        device, _, number = wanted.partition(":")
        found = [port for port in ports if port.device == device and number in {"", str(port.number)}]
        if not found:
            there = ", ".join(str(port) for port in ports) or "none"
            raise ConfigError(f"verbs: there is no RDMA device {wanted!r}; there are: {there}") from None
        return _first_usable([(port, port.gid()) for port in found], f"named as {wanted}")
    inside = [(port, gid) for port in ports for gid in port.gids if port.ethernet and gid.kind == _V2]
    inside = [(port, gid) for port, gid in inside if gid.address in network]
    if not inside:
        raise ConfigError(f"verbs: no RDMA device has a RoCE v2 GID within {wanted}; there are: {_gids(ports)}")
    return _first_usable(list(inside), f"within {wanted}")


def _by_route(ports: Sequence[Port], local_address: str) -> Pick:
    address = ipaddress.ip_address(local_address.partition("%")[0]) if local_address else None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    on_route = [(port, gid) for port in ports for gid in port.gids if gid.kind == _V2 and gid.address == address]
    if on_route:
        return _first_usable(list(on_route), f"the route to the peer begins at {address}")
    usable = [port for port in ports if port.why_not() is None]
    if not usable:
        why = "; ".join(why for port in ports if (why := port.why_not())) or "this host has no RDMA device"
        raise TransportError(f"verbs: {why}")
    if len(usable) == 1:
        return Pick(usable[0], usable[0].gid(), "the only one that can be used")
    if address is None or address.is_loopback:
        return Pick(usable[0], usable[0].gid(), "the first one: the peer is on this host")
    raise TransportError(
        f"verbs: the route to the peer begins at {address}, which is no RDMA device's address, and several could be "
        f"used: name one of {', '.join(str(port) for port in usable)}"
    )


def _first_usable(candidates: Sequence[tuple[Port, Gid | None]], why: str) -> Pick:
    refused = []
    for port, gid in candidates:
        why_not = port.why_not()
        if why_not is None:
            return Pick(port, gid, why)
        refused.append(why_not)
    raise TransportError(f"verbs: {'; '.join(refused)}")


def _gids(ports: Sequence[Port]) -> str:
    return ", ".join(f"{port} {gid.address}" for port in ports for gid in port.gids if gid.kind == _V2) or "none"
