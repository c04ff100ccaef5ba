"""Memory: slabs that are page-locked and registered once, slots, leases, and copies to and from a device."""

from kvrdma.memory.copier import BlockCopier, Copy, CpuCopier, Fence, read_slots
from kvrdma.memory.growth import PoolGrowth
from kvrdma.memory.limits import available_memory_nbytes
from kvrdma.memory.numa import node_of_device
from kvrdma.memory.pool import Lease, PinnedPool, Spans
from kvrdma.memory.reserve import SlabReserve
from kvrdma.memory.slab import MemfdSlabs, Memory, SlabSource
from kvrdma.memory.slots import SlotAllocator

__all__ = [
    "BlockCopier",
    "Copy",
    "CpuCopier",
    "Fence",
    "Lease",
    "MemfdSlabs",
    "Memory",
    "PinnedPool",
    "PoolGrowth",
    "SlabReserve",
    "SlabSource",
    "SlotAllocator",
    "Spans",
    "available_memory_nbytes",
    "node_of_device",
    "read_slots",
]
