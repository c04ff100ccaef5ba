"""LRU passes the suite, and evicts what was not used for the longest time."""

from typing import ClassVar

from kvrdma.policies import EvictionPolicy, policies
from kvrdma.policies.lru import LruPolicy
from kvrdma.testing.policies import EvictionPolicySuite, key, nothing_is_pinned


class TestLru(EvictionPolicySuite):
    policy: ClassVar[type[EvictionPolicy]] = LruPolicy

    def test_the_registry_has_it(self) -> None:
        assert policies.get("lru") is LruPolicy

    def test_the_least_recent_goes_first(self) -> None:
        lru = LruPolicy(4)
        for i in range(4):
            lru.insert(key(i))
        assert lru.touch(key(0))
        assert not lru.touch(key(0))
        assert lru.touch(key(2))
        assert lru.victims(4, is_pinned=nothing_is_pinned) == [key(i) for i in (1, 3, 0, 2)]
        assert lru.victims(2, is_pinned={key(1)}.__contains__) == [key(3), key(0)]
