"""Which transports there are, and which of those that a peer offers is taken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def negotiate(offers: Sequence[tuple[str, str]], order: Sequence[str] = ()) -> list[tuple[type[Transport], str]]:
    """Order a peer's offers (scheme, address) by preference, best first.

    `order` is the user's: what it does not name is never used. Without one the default order holds: in
    process, shared memory, RDMA, TCP; transports of third parties come before TCP.

    Raises:
        ConfigError: a name in `order` that no transport has.
        TransportError: nothing that the peer offers can be used, with the reason for each.
    """
    check_order(order)
    rank = {scheme: i for i, scheme in enumerate(order or DEFAULT_ORDER)}
    candidates: list[tuple[int, type[Transport], str]] = []
    refused: list[str] = []
    for scheme, address in offers:
        why = _refusal(scheme, address, order, rank)
        if why is None:
            candidates.append((rank.get(scheme, len(rank) - 2), transports.get(scheme), address))
        else:
            refused.append(f"{scheme}: {why}")
    if not candidates:
        raise TransportError(f"no transport in common with the peer ({'; '.join(refused) or 'no offers'})")
    return [(cls, address) for _, cls, address in sorted(candidates, key=lambda c: c[0])]


def _refusal(scheme: str, address: str, order: Sequence[str], rank: Iterable[str]) -> str | None:
    if order and scheme not in rank:
        return f"not among {', '.join(order)}"
    try:
        cls = transports.get(scheme)
    except ConfigError:
        return "not known here"
    if cls.by_name_only and not order:
        return "used only where it is named"
    why = cls.usable()
    if why is None and not cls.can_reach(address):
        why = f"{address} cannot be reached from here"
    return why
