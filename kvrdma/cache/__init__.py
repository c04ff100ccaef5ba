"""The cache: an index that decides and agents that move bytes."""

from kvrdma.cache.agent import TransferAgent
from kvrdma.cache.index import CacheIndex, IndexOptions
from kvrdma.cache.jobs import BlockStatus, Job, JobKind, JobReport, PoolReport, Probe, ProbeAnswer
from kvrdma.cache.lookups import Gate, OpenGate
from kvrdma.cache.prober import Prober
from kvrdma.cache.requests import Answer, Offer
from kvrdma.cache.slots import Slot, SlotState

__all__ = [
    "Answer",
    "BlockStatus",
    "CacheIndex",
    "Gate",
    "IndexOptions",
    "Job",
    "JobKind",
    "JobReport",
    "Offer",
    "OpenGate",
    "PoolReport",
    "Probe",
    "ProbeAnswer",
    "Prober",
    "Slot",
    "SlotState",
    "TransferAgent",
]
