"""S3-FIFO passes the suite, with its options too, and has the queues of the paper."""

from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.errors import ConfigError
from kvrdma.policies import EvictionPolicy, open_policy, policies
from kvrdma.policies.s3fifo import S3FifoOptions, S3FifoPolicy
from kvrdma.testing.policies import EvictionPolicySuite, key, nothing_is_pinned


class TestS3Fifo(EvictionPolicySuite):
    policy: ClassVar[type[EvictionPolicy]] = S3FifoPolicy

    def test_the_registry_has_it(self) -> None:
        assert policies.get("s3fifo") is S3FifoPolicy


class TestS3FifoWithLargeQueues(EvictionPolicySuite):
    policy: ClassVar[type[EvictionPolicy]] = S3FifoPolicy

    def make_policy(self, capacity: int) -> EvictionPolicy:
        return S3FifoPolicy(capacity, S3FifoOptions(small_ratio=0.5, threshold=1, ghost_ratio=3.0))


def filled(n: int, **options: float) -> S3FifoPolicy:
    """With keys 0 to n-1: the first few in the small queue, the others, by then, in the main one."""
    policy = S3FifoPolicy(n, S3FifoOptions(**options))
    for i in range(n):
        policy.insert(key(i))
    return policy


def evict_next(policy: EvictionPolicy, is_pinned: Callable[[bytes], bool] = nothing_is_pinned) -> bytes:
    (victim,) = policy.victims(1, is_pinned=is_pinned)
    policy.evict(victim)
    return victim


def test_what_is_used_once_passes_through_the_small_queue() -> None:
    policy = filled(10, small_ratio=0.3)
    assert [evict_next(policy) for _ in range(3)] == [key(0), key(1), key(2)]
    for i in range(10, 40):
        policy.insert(key(i))
        assert evict_next(policy) == key(i)
    assert all(key(i) in policy for i in range(3, 10))


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_the_threshold_moves_a_key_to_the_main_queue_and_makes_it_hot(threshold: int) -> None:
    policy = filled(10, small_ratio=0.3, threshold=threshold)
    assert [policy.touch(key(1)) for _ in range(5)] == [i == threshold - 1 for i in range(5)]
    assert [evict_next(policy) for _ in range(2)] == [key(0), key(2)]
    assert key(1) in policy
    assert not policy.touch(key(1))  # it was hot before


def test_a_ghost_comes_back_to_the_main_queue() -> None:
    policy = filled(10, small_ratio=0.3)
    ghost = evict_next(policy)
    policy.insert(ghost)  # one too many there
    assert [evict_next(policy) for _ in range(3)] == [key(3), key(1), key(2)]
    assert ghost in policy
    assert policy.touch(ghost)  # hot with its first use, in the main queue


def test_ghosts_are_forgotten_in_time() -> None:
    policy = filled(10, small_ratio=0.3, ghost_ratio=0.2)
    assert [evict_next(policy) for _ in range(3)] == [key(0), key(1), key(2)]
    for i in (20, 0, 1):  # there is room for two ghosts, so that key 0 is none any more
        policy.insert(key(i))
    assert [evict_next(policy) for _ in range(3)] == [key(3), key(20), key(0)]


def test_without_ghosts_nothing_is_remembered() -> None:
    policy = filled(10, small_ratio=0.3, ghost_ratio=0.0)
    gone = evict_next(policy)
    policy.insert(key(20))
    policy.insert(gone)
    assert [evict_next(policy) for _ in range(4)] == [key(1), key(2), key(20), gone]


def test_the_main_queue_goes_round_and_pinned_keys_keep_their_places() -> None:
    policy = filled(10, small_ratio=0.3)
    for _ in range(3):
        evict_next(policy)  # the small queue is empty now
    policy.touch(key(3))
    policy.touch(key(4))
    policy.touch(key(4))
    assert policy.victims(2, is_pinned={key(5)}.__contains__) == [key(6), key(7)]
    assert evict_next(policy, {key(5)}.__contains__) == key(6)
    assert [evict_next(policy) for _ in range(6)] == [key(i) for i in (5, 7, 8, 9, 3, 4)]


@given(
    uses=st.lists(st.integers(0, 11), max_size=40),
    gone=st.integers(0, 8),
    n=st.integers(1, 12),
    small_ratio=st.sampled_from([0.1, 0.3, 0.6, 1.0]),
)
def test_a_batch_of_victims_is_what_one_by_one_gives(uses: list[int], gone: int, n: int, small_ratio: float) -> None:
    policies_ = [filled(12, small_ratio=small_ratio) for _ in range(2)]
    for policy in policies_:
        for _ in range(gone):
            policy.insert(evict_next(policy))
        for use in uses:
            policy.touch(key(use))
    batch = policies_[0].victims(n, is_pinned=nothing_is_pinned)
    assert batch == [evict_next(policies_[1]) for _ in range(n)]


def test_options() -> None:
    policy = open_policy("s3fifo?small_ratio=0.5&threshold=1&ghost_ratio=2")(10)
    assert isinstance(policy, S3FifoPolicy)
    assert (policy._small_size, policy._threshold, policy._ghost_size) == (5, 1, 20)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("s3fio", "did you mean 's3fifo'"),
        ("s3fifo?treshold=1", "did you mean 'threshold'"),
        ("s3fifo?threshold=4", "threshold=4: must be 1 to 3"),
        ("s3fifo?threshold=0", "threshold='0': must be a whole number"),
        ("s3fifo?small_ratio=0", "small_ratio='0': must be a share"),
        ("s3fifo?ghost_ratio=-1", "ghost_ratio='-1': must be a number of at least 0"),
        ("s3fifo?ghost_ratio=nan", "ghost_ratio='nan': must be"),
        ("s3fifo?", "options must look like s3fifo"),
        ("s3fifo?threshold", "options must look like s3fifo"),
        ("s3fifo?threshold=1&threshold=2", "given twice"),
        ("lru?small_ratio=0.1", "lru has no options"),
    ],
)
def test_bad_names_and_options(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        open_policy(text)
