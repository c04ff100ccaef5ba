"""Transports: one-sided READ and WRITE between registered memory of two processes, by scheme."""

from kvrdma.transports.base import (
    Endpoint,
    Listener,
    MemoryRegion,
    Opcode,
    Priority,
    RemoteRegion,
    Rights,
    SecretOf,
    Transfer,
    TransferBatch,
    Transport,
)
from kvrdma.transports.registry import Choice, check_order, find_usable, negotiate, transports, weigh

__all__ = [
    "Choice",
    "Endpoint",
    "Listener",
    "MemoryRegion",
    "Opcode",
    "Priority",
    "RemoteRegion",
    "Rights",
    "SecretOf",
    "Transfer",
    "TransferBatch",
    "Transport",
    "check_order",
    "find_usable",
    "negotiate",
    "transports",
    "weigh",
]
