"""NUMA: which node a device is on, and how memory is placed there. Without libnuma; on one node it does nothing."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path
from typing import Any, Final

from kvrdma.memory.procfs import ROOT, read_text

logger = logging.getLogger(__name__)

_MBIND: Final = {"x86_64": 237, "aarch64": 235}
_MPOL_PREFERRED: Final = 1  # rather than bind: a full node must not end anybody
_libc = ctypes.CDLL(None, use_errno=True)


def nodes_with_memory(root: Path = ROOT) -> list[int]:
    """The host's nodes that have memory; empty where the kernel does not say."""
    return parse_list(read_text(root / "sys/devices/system/node/has_memory"))


def parse_list(text: str) -> list[int]:
    """Read the kernel's list of numbers, such as `0-1,4`; raises `ValueError` where it is none."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def node_of_pci(address: str, root: Path = ROOT) -> int | None:
    """The node of a PCI device, by its address, such as 0000:3b:00.0; None where it is not known."""
    text = read_text(root / "sys/bus/pci/devices" / address.lower() / "numa_node").strip()
    return int(text) if text.isdigit() else None  # -1 on a host that does not say


def node_of_device(device: str, root: Path = ROOT) -> int | None:
    """The node of a device, by torch's name for it (`cuda:1`); None for CPUs, and where it is not known."""
    if not device.startswith("cuda"):
        return None
    import torch

    found: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    except AttributeError:  # torch before 2.6
        return None
    return node_of_pci(address, root)


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Have pages that are not there yet come from a node, while it has any; True where the kernel agreed."""
    number = _MBIND.get(platform.machine())
    if number is None:
        return False
    words = (ctypes.c_ulong * (node // 64 + 1))()
    words[node // 64] = 1 << node % 64
    refused = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_void_p(address),
        ctypes.c_size_t(nbytes),
        ctypes.c_int(_MPOL_PREFERRED),
        words,
        ctypes.c_ulong(64 * len(words) + 1),  # the kernel reads one bit less
        ctypes.c_uint(0),
    )
    if refused:
        logger.debug("memory is not placed on node %d: %s", node, os.strerror(ctypes.get_errno()))
    return not refused
