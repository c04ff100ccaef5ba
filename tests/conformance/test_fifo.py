"""FIFO passes the suite, and evicts what came first."""

from typing import ClassVar

from kvrdma.policies import EvictionPolicy, policies
from kvrdma.policies.fifo import FifoPolicy
from kvrdma.testing.policies import EvictionPolicySuite, key, nothing_is_pinned


class TestFifo(EvictionPolicySuite):
    policy: ClassVar[type[EvictionPolicy]] = FifoPolicy

    def test_the_registry_has_it(self) -> None:
        assert policies.get("fifo") is FifoPolicy

    def test_a_use_changes_no_order(self) -> None:
        fifo = FifoPolicy(4)
        for i in range(4):
            fifo.insert(key(i))
        assert fifo.touch(key(0))
        assert not fifo.touch(key(0))
        assert fifo.victims(4, is_pinned=nothing_is_pinned) == [key(i) for i in range(4)]
        assert fifo.victims(2, is_pinned={key(1)}.__contains__) == [key(0), key(2)]
