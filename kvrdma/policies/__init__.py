"""Policies: which blocks are evicted, and which are offloaded when. Open to third parties by entry points."""

from kvrdma.policies.base import CacheListener, Event, EvictionPolicy, OffloadPolicy, Removal
from kvrdma.policies.registry import PolicyMaker, offload_policies, open_policy, policies

__all__ = [
    "CacheListener",
    "Event",
    "EvictionPolicy",
    "OffloadPolicy",
    "PolicyMaker",
    "Removal",
    "offload_policies",
    "open_policy",
    "policies",
]
