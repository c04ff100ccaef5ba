"""What every eviction policy does: `EvictionPolicySuite`."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from typing import Any, ClassVar, Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvrdma.policies import EvictionPolicy

_CAPACITY: Final = 12
_BLOCKS: Final = st.integers(0, 39)


def key(number: int) -> bytes:
    """A key of 16 bytes."""
    return number.to_bytes(16, "big")


def nothing_is_pinned(_: bytes) -> bool:
    """Say that no key is pinned."""
    return False


class EvictionPolicySuite:
    """Tests that an eviction policy inherits. `policy` is needed."""

    policy: ClassVar[type[EvictionPolicy]]
    """The policy under test."""

    def make_policy(self, capacity: int) -> EvictionPolicy:
        """Make one."""
        return self.policy(capacity)

    def test_it_has_a_name(self) -> None:
        """By which settings find it."""
        assert self.policy.name

    def test_a_capacity_below_one_is_refused(self) -> None:
        """There is no cache of no blocks."""
        for capacity in (0, -1):
            with pytest.raises(ValueError, match="capacity"):
                self.make_policy(capacity)

    def test_what_is_in(self) -> None:
        """Exactly what was inserted and neither evicted nor removed."""
        policy = self.make_policy(8)
        for i in range(8):
            policy.insert(key(i), parent=key(i - 1) if i else None, cost=float(i))
        policy.remove(key(3))
        (victim,) = policy.victims(1, is_pinned=nothing_is_pinned)
        policy.evict(victim)
        gone = {key(3), victim}
        assert len(policy) == 6
        assert [key(i) in policy for i in range(8)] == [key(i) not in gone for i in range(8)]
        policy.clear()
        assert len(policy) == 0
        assert not any(key(i) in policy for i in range(8))
        assert policy.victims(1, is_pinned=nothing_is_pinned) == []
        policy.insert(key(3))
        assert key(3) in policy

    def test_misuse_is_refused(self) -> None:
        """A key that is in is not inserted again; one that is not in is not touched, evicted or removed."""
        policy = self.make_policy(4)
        policy.insert(key(1))
        with pytest.raises(KeyError):
            policy.insert(key(1))
        for call in (policy.touch, policy.evict, policy.remove):
            with pytest.raises(KeyError):
                call(key(2))
        assert len(policy) == 1
        assert key(1) in policy
        assert key(2) not in policy

    def test_a_key_becomes_hot_once(self) -> None:
        """However often it is touched."""
        policy = self.make_policy(4)
        policy.insert(key(1))
        assert sum(policy.touch(key(1)) for _ in range(20)) <= 1

    @pytest.mark.parametrize("how", ["remove", "clear"])
    def test_what_was_forgotten_is_new(self, how: str) -> None:
        """What made a key hot makes it hot again; only of an evicted one may a policy remember anything."""
        policy = self.make_policy(4)
        policy.insert(key(1))
        before = [policy.touch(key(1)) for _ in range(20)]
        if how == "remove":
            policy.remove(key(1))
        else:
            policy.clear()
        policy.insert(key(1))
        assert any(policy.touch(key(1)) for _ in range(20)) == any(before)

    @pytest.mark.parametrize("n", [0, -1])
    def test_no_victims_wanted(self, n: int) -> None:
        """None given."""
        policy = self.make_policy(4)
        policy.insert(key(1))
        assert policy.victims(n, is_pinned=nothing_is_pinned) == []

    def test_all_or_none(self) -> None:
        """Fewer than n that can go: none, and all that are in stay; exactly n: those."""
        policy = self.make_policy(8)
        for i in range(8):
            policy.insert(key(i))
        pinned = {key(i) for i in (0, 2, 4)}
        assert policy.victims(6, is_pinned=pinned.__contains__) == []
        assert policy.victims(9, is_pinned=nothing_is_pinned) == []
        assert len(policy) == 8
        chosen = policy.victims(5, is_pinned=pinned.__contains__)
        assert set(chosen) == {key(i) for i in (1, 3, 5, 6, 7)}
        assert len(chosen) == 5
        assert policy.victims(1, is_pinned=lambda _: True) == []

    def test_nothing_goes_by_itself(self) -> None:
        """Only the caller knows what is in the cache: more than `capacity` keys stay until it lets them go."""
        policy = self.make_policy(4)
        for i in range(20):
            policy.insert(key(i))
        assert len(policy) == 20
        assert all(key(i) in policy for i in range(20))
        assert set(policy.victims(20, is_pinned=nothing_is_pinned)) == {key(i) for i in range(20)}

    @pytest.mark.parametrize("parents", ["none", "one of all", "the block before"])
    def test_state_is_bounded(self, parents: str) -> None:
        """A policy that has seen 300 times its capacity is not larger than one that has seen 30 times of it."""
        capacity = 64
        policy = self.make_policy(capacity)

        def parent(i: int) -> bytes | None:
            return None if parents == "none" or i == 0 else key(0 if parents == "one of all" else i - 1)

        def churn(first: int, n: int) -> int:
            for i in range(first, first + n):
                if len(policy) == capacity:
                    (victim,) = policy.victims(1, is_pinned=nothing_is_pinned)
                    policy.evict(victim)
                policy.insert(key(i), parent=parent(i))
                if i % 3 == 0:
                    policy.touch(key(i))
                if i % 7 == 0:
                    policy.remove(key(i))
            return reachable(policy)

        early = churn(0, 30 * capacity)
        late = churn(30 * capacity, 270 * capacity)
        assert late <= early + 4 * capacity
        policy.clear()
        assert reachable(policy) <= early

    def test_any_sequence_of_calls(self) -> None:
        """A state machine: size and membership, pins, all or none, and that choosing victims changes nothing."""
        make = self.make_policy

        class Machine(PolicyMachine):
            def make_policy(self, capacity: int) -> EvictionPolicy:
                return make(capacity)

        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=3 * settings().max_examples // 5,
                stateful_step_count=60,
                deadline=None,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


class PolicyMachine(RuleBasedStateMachine):
    """Drives a policy, a set of what must be in it, and a twin that is never asked for victims in vain."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = self.make_policy(_CAPACITY)
        self.twin = self.make_policy(_CAPACITY)
        self.inside: set[bytes] = set()
        self.pinned: set[bytes] = set()

    def make_policy(self, capacity: int) -> EvictionPolicy:
        """Make the policy under test."""
        raise NotImplementedError

    def both(self, call: Callable[[EvictionPolicy], Any]) -> None:
        """Do the same with both, which must answer the same."""
        assert call(self.policy) == call(self.twin)

    @rule(number=_BLOCKS, parent=st.none() | _BLOCKS, cost=st.floats(0, 100))
    def insert(self, number: int, parent: int | None, cost: float) -> None:
        """Take in a new key where there is room."""
        new = key(number)
        if new not in self.inside and len(self.inside) < _CAPACITY:
            above = None if parent is None else key(parent)
            self.both(lambda policy: policy.insert(new, parent=above, cost=cost))
            self.inside.add(new)

    @rule(number=_BLOCKS)
    def touch(self, number: int) -> None:
        """Use a key that is in."""
        if key(number) in self.inside:
            self.both(lambda policy: policy.touch(key(number)))

    @rule(number=_BLOCKS)
    def pin(self, number: int) -> None:
        """Pin a key, or let go of it."""
        if key(number) in self.inside:
            self.pinned ^= {key(number)}

    @rule(number=_BLOCKS)
    def remove(self, number: int) -> None:
        """Take a key out."""
        if key(number) in self.inside:
            self.both(lambda policy: policy.remove(key(number)))
            self.inside.discard(key(number))
            self.pinned.discard(key(number))

    @rule(n=st.integers(0, _CAPACITY + 2), asked=st.integers(1, 3))
    def choose(self, n: int, asked: int) -> None:
        """Ask for victims and let none go: nothing changes, so the answer is the same each time."""
        answers = [self.policy.victims(n, is_pinned=self.pinned.__contains__) for _ in range(asked)]
        free = self.inside - self.pinned
        assert len(answers[0]) == (n if n <= len(free) else 0)
        assert len(set(answers[0])) == len(answers[0])
        assert set(answers[0]) <= free
        assert all(answer == answers[0] for answer in answers)

    @rule(n=st.integers(1, _CAPACITY))
    def make_room(self, n: int) -> None:
        """Evict n keys, in the order in which they were chosen."""
        if n > len(self.inside - self.pinned):
            return
        chosen = self.policy.victims(n, is_pinned=self.pinned.__contains__)
        assert chosen == self.twin.victims(n, is_pinned=self.pinned.__contains__)
        for victim in chosen:
            self.both(lambda policy, victim=victim: policy.evict(victim))  # type: ignore[misc]
            self.inside.discard(victim)

    @precondition(lambda self: len(self.inside) == _CAPACITY)
    @rule()
    def clear(self) -> None:
        """Forget everything."""
        self.both(lambda policy: policy.clear())
        self.inside.clear()
        self.pinned.clear()

    @invariant()
    def holds_what_it_should(self) -> None:
        """Size and membership."""
        assert len(self.policy) == len(self.inside)
        assert all(name in self.policy for name in self.inside)
        assert not any(key(i) in self.policy for i in range(40) if key(i) not in self.inside)

    def teardown(self) -> None:
        """Both let their keys go in the same order."""
        while self.inside:
            (victim,) = self.policy.victims(1, is_pinned=nothing_is_pinned)
            assert [victim] == self.twin.victims(1, is_pinned=nothing_is_pinned)
            self.both(lambda policy, victim=victim: policy.evict(victim))  # type: ignore[misc]
            self.inside.remove(victim)


def reachable(root: object) -> int:
    """How many keys and containers an object holds on to, itself or through others; shared constants excluded."""
    seen: dict[int, object] = {}
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType, int, float, str)):
            continue
        seen[id(thing)] = thing
        waiting += gc.get_referents(thing)
    return len(seen)
