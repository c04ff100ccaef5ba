"""Which transports there are, and which of those that a peer offers is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from kvrdma.errors import ConfigError, TransportError
from kvrdma.plugins import Registry
from kvrdma.transports.base import Transport

DEFAULT_ORDER: Final = ("inproc", "shm", "verbs", "ucx", "tcp")

transports: Registry[type[Transport]] = Registry("transport", "kvrdma.transports")
"""Every transport by scheme; third parties add theirs by an entry point of the group `kvrdma.transports`."""


def check_order(order: Sequence[str]) -> None:
    """Raise `ConfigError` where a user's order names a transport that nobody has."""
    for name in order:
        transports.get(name)


def find_usable() -> tuple[list[str], dict[str, str]]:
    """Which transports a process here could offer to others, best first; and why not the rest, by name."""
    usable: list[str] = []
    refused: dict[str, str] = {}
    for scheme in sorted(transports, key=_rank_of(DEFAULT_ORDER)):
        why = _why_not_here(scheme, named=False)
        if why is None and scheme == "inproc":
            why = "within one process only"
        if why is None:
            usable.append(scheme)
        else:
            refused[scheme] = why
    return usable, refused


def negotiate(offers: Sequence[tuple[str, str]], order: Sequence[str] = ()) -> list[tuple[type[Transport], str]]:
    """Order a peer's offers (scheme, address) by preference, best first.

    `order` is the user's: what it does not name is never used. Without one the default order holds: in
    process, shared memory, RDMA, TCP; transports of third parties come before TCP.

    Raises:
        ConfigError: a name in `order` that no transport has.
        TransportError: nothing that the peer offers can be used, with the reason for each.
    """
    check_order(order)
    rank = _rank_of(order or DEFAULT_ORDER)
    candidates: list[tuple[float, type[Transport], str]] = []
    refused: list[str] = []
    for scheme, address in offers:
        why = f"not among {', '.join(order)}" if order and scheme not in order else None
        why = why or _why_not_here(scheme, named=bool(order))
        if why is None and not transports.get(scheme).can_reach(address):
            why = f"{address} cannot be reached from here"
        if why is None:
            candidates.append((rank(scheme), transports.get(scheme), address))
        else:
            refused.append(f"{scheme}: {why}")
    if not candidates:
        raise TransportError(f"no transport in common with the peer ({'; '.join(refused) or 'no offers'})")
    return [(cls, address) for _, cls, address in sorted(candidates, key=lambda c: c[0])]


def _rank_of(order: Sequence[str]) -> Callable[[str], float]:
    """Where a scheme stands in an order; those that it does not name come before its last."""
    return lambda scheme: order.index(scheme) if scheme in order else len(order) - 1.5


def _why_not_here(scheme: str, *, named: bool) -> str | None:
    try:
        cls = transports.get(scheme)
    except ConfigError as error:
        return "not known here" if scheme not in transports else str(error)
    if cls.by_name_only and not named:
        return "used only where it is named"
    return cls.usable()
