"""The policies beside libcachesim's on a real trace: equal figures mean equal decisions, 288,500 times."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import libcachesim
import pytest

from kvrdma.policies import open_policy
from kvrdma.testing.policies import nothing_is_pinned

TRACE = Path(__file__).resolve().parents[1] / "traces" / "conversation_trace.jsonl.xz"


@pytest.fixture(scope="module")
def hash_ids() -> list[int]:
    with lzma.open(TRACE, "rt") as lines:
        return [number for line in lines for number in json.loads(line)["hash_ids"]]


def our_hits(policy_name: str, capacity: int, hash_ids: list[int]) -> int:
    policy, hits = open_policy(policy_name)(capacity), 0
    for number in hash_ids:
        key = number.to_bytes(16, "big")
        if key in policy:
            policy.touch(key)
            hits += 1
            continue
        if len(policy) == capacity:
            (victim,) = policy.victims(1, is_pinned=nothing_is_pinned)
            policy.evict(victim)
        policy.insert(key)
    return hits


def their_hits(policy_name: str, capacity: int, hash_ids: list[int]) -> int:
    cls = {"lru": libcachesim.LRU, "fifo": libcachesim.FIFO, "s3fifo": libcachesim.S3FIFO}[policy_name]
    cache, request, hits = cls(cache_size=capacity), libcachesim.Request(), 0
    request.obj_size = 1
    for number in hash_ids:
        request.obj_id = number
        hits += cache.get(request)
    return hits


@pytest.mark.parametrize("capacity", [500, 2000, 8000, 20000])
@pytest.mark.parametrize("policy_name", ["lru", "fifo", "s3fifo"])
def test_hits_are_those_of_libcachesim(policy_name: str, capacity: int, hash_ids: list[int]) -> None:
    assert len(hash_ids) == 288_500
    assert our_hits(policy_name, capacity, hash_ids) == their_hits(policy_name, capacity, hash_ids)
