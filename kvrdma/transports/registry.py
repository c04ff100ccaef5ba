"""Which transports there are, and which of those that a peer offers is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Choice:
    """A peer's offers as they can be used from here: those that can, best first, and why the others cannot."""

    candidates: tuple[tuple[type[Transport], str], ...]
    refused: Mapping[str, str]

    def why_none(self) -> TransportError:
        """What to raise where there is no candidate, or none of them works."""
        reasons = "; ".join(f"{scheme}: {why}" for scheme, why in self.refused.items())
        return TransportError(f"no transport in common with the peer ({reasons or 'no offers'})")


def weigh(offers: Sequence[tuple[str, str]], order: Sequence[str] = ()) -> Choice:
    """Order a peer's offers (scheme, address) by preference, best first.

    `order` is the user's: what it does not name is never used. Without one the default order holds: in
    process, shared memory, RDMA, TCP; transports of third parties come before TCP.

    Raises:
        ConfigError: a name in `order` that no transport has.
    """
    check_order(order)
    rank = _rank_of(order or DEFAULT_ORDER)
    candidates: list[tuple[float, type[Transport], str]] = []
    refused = dict.fromkeys(order, "not offered by the peer")
    for scheme, address in offers:
        refused.pop(scheme, None)
        why = f"not among {', '.join(order)}" if order and scheme not in order else None
        why = why or _why_not_here(scheme, named=bool(order))
        if why is None and not transports.get(scheme).can_reach(address):
            why = f"{address} cannot be reached from here"
        if why is None:
            candidates.append((rank(scheme), transports.get(scheme), address))
        else:
            refused[scheme] = why
    candidates.sort(key=lambda candidate: candidate[0])
    return Choice(tuple((cls, address) for _, cls, address in candidates), refused)


def negotiate(offers: Sequence[tuple[str, str]], order: Sequence[str] = ()) -> list[tuple[type[Transport], str]]:
    """The candidates of `weigh`, at least one.

    Raises:
        ConfigError: a name in `order` that no transport has.
        TransportError: nothing that the peer offers can be used, with the reason for each.
    """
    choice = weigh(offers, order)
    if not choice.candidates:
        raise choice.why_none()
    return list(choice.candidates)


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
