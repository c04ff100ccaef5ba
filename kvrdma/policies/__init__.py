"""Policies: which blocks are evicted, and which are offloaded when. Open to third parties by entry points."""

from kvrdma.policies.base import Event, EvictionPolicy, OffloadPolicy
from kvrdma.policies.registry import PolicyMaker, offload_policies, open_policy, policies

__all__ = ["Event", "EvictionPolicy", "OffloadPolicy", "PolicyMaker", "offload_policies", "open_policy", "policies"]
