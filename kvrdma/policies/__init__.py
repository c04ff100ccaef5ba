"""Policies: which blocks are evicted, and which are offloaded when. Open to third parties by entry points."""

from kvrdma.plugins import Registry
from kvrdma.policies.base import Event, EvictionPolicy, OffloadPolicy

policies: Registry[type[EvictionPolicy]] = Registry("policy", "kvrdma.policies")
offload_policies: Registry[type[OffloadPolicy]] = Registry("offload mode", "kvrdma.offload")

__all__ = ["Event", "EvictionPolicy", "OffloadPolicy", "offload_policies", "policies"]
