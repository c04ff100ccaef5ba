"""`KVCacheManager` above `memory://` and above a real pool server that dies and comes back."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import PATIENCE_S, SPACE, Program, Server, eventually
from slabs import alter

from kvrdma.coordinator import SoloCoordinator
from kvrdma.errors import CapacityError, ClosedError, ConfigError, KVRDMAError
from kvrdma.manager import KVCacheManager
from kvrdma.metrics import Reason
from kvrdma.settings import Settings

NBYTES = 4096
WIDTH = SPACE.block_tokens
MEMORY = "memory://?capacity=16MiB"


def manager_of(n_blocks: int, l2: str = "", **settings: object) -> KVCacheManager:
    given = {"l1_bytes": n_blocks * NBYTES, "l2": l2, **settings}
    return KVCacheManager(SPACE, NBYTES, Settings.read(given))


def prompt(number: int, n_blocks: int) -> list[int]:
    return list(range(number * 1000, number * 1000 + n_blocks * WIDTH))


def content(tokens: Sequence[int]) -> NDArray[np.uint8]:
    """What the blocks of a prompt hold: made of all tokens up to and with the block's, as KV is."""
    blocks = [tokens[: end + WIDTH] for end in range(0, len(tokens) // WIDTH * WIDTH, WIDTH)]
    return np.array(
        [np.random.default_rng(np.array(known)).integers(0, 256, NBYTES, dtype=np.uint8) for known in blocks]
    ).reshape(len(blocks), NBYTES)


def write(manager: KVCacheManager, tokens: Sequence[int]) -> list[int]:
    """Save what L1 has not of a prompt; the rows that it had not."""
    rows, committed = try_to_write(manager, tokens)
    assert committed
    return rows


def try_to_write(manager: KVCacheManager, tokens: Sequence[int]) -> tuple[list[int], bool]:
    whole = content(tokens)
    with manager.reserve(tokens) as reservation:
        for row, view in zip(reservation.rows, reservation.views, strict=True):
            view[:] = whole[row]
        return reservation.rows, reservation.commit(timeout=PATIENCE_S)


def read(manager: KVCacheManager, tokens: Sequence[int], *, timeout: float = PATIENCE_S) -> int:
    """How many blocks are there; all of them must be right."""
    with manager.acquire(tokens, timeout=timeout) as hit:
        assert hit.n_tokens == hit.n_blocks * WIDTH
        target = np.empty((len(hit), NBYTES), dtype=np.uint8)
        hit.copy_into(target)
        assert np.array_equal(target, content(tokens)[: len(hit)])
        return len(hit)


def account(manager: KVCacheManager) -> dict[str, int]:
    stats = manager.stats()
    misses: dict[str, int] = stats["misses"]
    assert stats.get("looked_up_blocks", 0) == stats.get("served_blocks", 0) + sum(misses.values())
    return misses


# -- L1 alone


def test_what_was_committed_is_found_and_nothing_else() -> None:
    with manager_of(16) as manager:
        tokens = prompt(1, 4)
        assert read(manager, tokens) == 0
        assert write(manager, [*tokens, 7, 7]) == [0, 1, 2, 3]  # half a block is none
        assert read(manager, tokens) == 4
        assert read(manager, [*tokens, *prompt(2, 2)]) == 4
        assert read(manager, prompt(2, 2)) == 0
        assert read(manager, []) == 0
        assert account(manager) == {"not_there": 4 + 2 + 2}


def test_only_what_l1_has_not_is_reserved() -> None:
    with manager_of(16) as manager:
        tokens = prompt(1, 6)
        write(manager, tokens[: 2 * WIDTH])
        assert write(manager, tokens) == [2, 3, 4, 5]
        assert write(manager, tokens) == []
        assert read(manager, tokens) == 6


def test_a_hole_in_the_middle_ends_the_run_until_it_is_filled() -> None:
    with manager_of(16) as manager:
        tokens = prompt(1, 6)
        write(manager, tokens)
        manager.delete(tokens[: 3 * WIDTH])
        write(manager, tokens[: 2 * WIDTH])
        assert read(manager, tokens) == 2
        assert account(manager) == {"not_there": 1, "behind_hole": 3}
        assert write(manager, tokens) == [2]
        assert read(manager, tokens) == 6


def test_a_reservation_that_is_given_up_leaves_nothing() -> None:
    with manager_of(4) as manager:
        tokens = prompt(1, 4)
        with manager.reserve(tokens) as reservation:
            assert read(manager, tokens) == 0
            with pytest.raises(CapacityError):
                manager.reserve(prompt(2, 1))
        reservation.give_up()
        with pytest.raises(RuntimeError), manager.reserve(tokens):
            raise RuntimeError("the engine failed")
        assert manager.stats()["l1_free_blocks"] == 4
        assert read(manager, tokens) == 0
        with pytest.raises(ClosedError):
            reservation.commit()
        assert write(manager, tokens) == [0, 1, 2, 3]


def test_a_reservation_without_room_takes_nothing() -> None:
    with manager_of(4) as manager:
        write(manager, prompt(1, 2))
        with pytest.raises(CapacityError, match="5 blocks"):
            manager.reserve(prompt(2, 5))
        assert read(manager, prompt(1, 2)) == 2
        assert manager.stats()["l1_free_blocks"] == 2


def test_what_a_hit_holds_is_not_evicted_and_cannot_be_written() -> None:
    with manager_of(4) as manager:
        write(manager, prompt(1, 3))
        with manager.acquire(prompt(1, 3)) as hit:
            with pytest.raises(ValueError, match="read-only"):
                hit.views[0][0] = 1
            with pytest.raises(ConfigError, match="target"):
                hit.copy_into(np.empty((3, NBYTES - 1), dtype=np.uint8))
            with pytest.raises(CapacityError):
                manager.reserve(prompt(2, 2))
        hit.close()
        write(manager, prompt(2, 2))
        assert read(manager, prompt(1, 3)) < 3
        assert manager.misses(Reason.EVICTED) > 0


def test_a_reservation_that_was_deleted_meanwhile_is_not_found() -> None:
    with manager_of(4) as manager:
        tokens = prompt(1, 2)
        with manager.reserve(tokens) as reservation:
            manager.delete(tokens)
            assert not reservation.commit()
        assert read(manager, tokens) == 0
        assert write(manager, tokens) == [0, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=NBYTES - 1)),
        lambda: KVCacheManager(SPACE, 0, Settings()),
        lambda: manager_of(4, "memori://"),
        lambda: manager_of(4, policy="lruu"),
        lambda: KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=4 * NBYTES), coordinator=TwoRanks()),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], KVCacheManager]) -> None:
    with pytest.raises(ConfigError):
        make()


class TwoRanks(SoloCoordinator):
    @property
    def world(self) -> int:
        return 2


# -- with an L2


def test_what_l1_lost_comes_back_from_l2() -> None:
    with manager_of(4, MEMORY) as manager:
        for number in range(4):
            write(manager, prompt(number, 4))
            assert manager.flush(timeout=PATIENCE_S)
        for number in range(4):
            assert read(manager, prompt(number, 2)) == 2
        assert manager.stats()["l2_fetched_blocks"] >= 6
        account(manager)


def test_deleted_is_deleted_in_both_tiers() -> None:
    with manager_of(8, MEMORY) as manager:
        tokens = prompt(1, 4)
        write(manager, tokens)
        manager.delete(tokens[: 2 * WIDTH])
        assert read(manager, tokens) == 0
        write(manager, tokens[:WIDTH])
        assert read(manager, tokens) == 1
        assert manager.flush(timeout=PATIENCE_S)


def test_many_threads_never_see_a_wrong_byte() -> None:
    n_threads, failures = 4, []
    with manager_of(24, MEMORY) as manager:

        def work(seed: int) -> None:
            chance = random.Random(seed)
            try:
                for _ in range(40):
                    tokens = prompt(chance.randrange(6), chance.randint(1, 6))
                    match chance.randrange(8):
                        case 0 | 1 | 2:
                            with contextlib.suppress(CapacityError):
                                try_to_write(manager, tokens)
                        case 3:
                            manager.prefetch(tokens)
                        case 4:
                            manager.delete(tokens[:WIDTH])
                        case _:
                            read(manager, tokens)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert manager.flush(timeout=PATIENCE_S)
        eventually(lambda: manager.stats()["requests"] == 0)  # the prefetches are over
        stats = manager.stats()
        assert (stats["zombies"], stats["jobs"], stats["waiting_slots"]) == (0, 0, 0)
        account(manager)


# -- with a real pool


def stores_again(manager: KVCacheManager) -> int:
    """Write one prompt after the other until one of them is offloaded; its number."""
    numbers = itertools.count(10)
    newest = 0

    def stored() -> bool:
        nonlocal newest
        newest = next(numbers)
        before = manager.stats()["l2_put_blocks"]
        write(manager, prompt(newest, 4))
        assert manager.flush(timeout=PATIENCE_S)
        return bool(manager.stats()["l2_put_blocks"] > before)

    eventually(stored)
    return newest


def test_two_managers_share_a_pool(server: Server) -> None:
    tokens = prompt(1, 8)
    with manager_of(32, server.url) as first, manager_of(32, server.url) as second:
        write(first, tokens)
        assert first.flush(timeout=PATIENCE_S)
        assert read(second, [*tokens, *prompt(2, 1)]) == 8
        assert account(second) == {"not_there": 1}
        assert second.stats()["l2_fetched_blocks"] == 8
        write(second, [*tokens, *prompt(2, 1)])
        assert second.flush(timeout=PATIENCE_S)
        assert read(first, [*tokens, *prompt(2, 1)]) == 9


def test_prefetched_blocks_are_there_without_l2(server: Server) -> None:
    tokens = prompt(1, 8)
    with manager_of(16, server.url) as first, manager_of(16, server.url) as second:
        write(first, tokens)
        assert first.flush(timeout=PATIENCE_S)
        second.prefetch(tokens)
        eventually(lambda: second.stats().get("l2_fetched_blocks") == 8)
        server.signal(signal.SIGKILL)
        server.ended()
        assert read(second, tokens) == 8
        assert account(second) == {}


def test_a_hole_in_the_pool_shortens_the_hit(server: Server) -> None:
    tokens = prompt(1, 6)
    with manager_of(16, server.url) as first, manager_of(16, server.url) as second:
        write(first, tokens)
        first.delete(tokens[: 3 * WIDTH])
        write(first, tokens[: 2 * WIDTH])
        assert first.flush(timeout=PATIENCE_S)
        assert read(second, tokens) == 2
        assert account(second) == {"not_there": 1, "behind_hole": 3}


def test_a_byte_altered_in_the_pool_is_a_miss_and_the_block_is_stored_again(server: Server) -> None:
    tokens = prompt(1, 6)
    with manager_of(16, server.url) as first, manager_of(16, server.url) as second:
        write(first, tokens)
        assert first.flush(timeout=PATIENCE_S)
        alter(server.process.pid, content(tokens)[2].tobytes())
        assert read(second, tokens) == 2
        assert account(second) == {"checksum": 1, "behind_hole": 3}
        eventually(lambda: server.stats()["blocks"] == 5)
        assert write(second, tokens) == [2]
        assert second.flush(timeout=PATIENCE_S)
        with manager_of(16, server.url) as third:
            assert read(third, tokens) == 6


def test_a_pool_that_is_not_there_is_a_miss_and_l1_works() -> None:
    with Server() as server:
        port = server.port
    with manager_of(16, f"kvrdma://127.0.0.1:{port}") as manager:
        tokens = prompt(1, 4)
        assert read(manager, tokens) == 0
        assert account(manager) == {"tier_down": 4}
        write(manager, tokens)
        assert manager.flush(timeout=PATIENCE_S)  # in vain, but over
        assert read(manager, tokens) == 4
        assert manager.stats()["l2_put_failed_blocks"] == 4
        with pytest.raises(KVRDMAError):
            manager.delete(tokens)
        assert read(manager, tokens) == 0  # in L1 it is deleted


def test_a_pool_that_is_killed_and_comes_back_is_used_again(server: Server) -> None:
    with manager_of(16, server.url) as manager:
        write(manager, prompt(1, 4))
        assert manager.flush(timeout=PATIENCE_S)
        server.signal(signal.SIGKILL)
        server.ended()
        assert read(manager, prompt(9, 4)) == 0
        assert read(manager, prompt(1, 4)) == 4
        with Server(port=server.port):
            newest = stores_again(manager)
            with manager_of(16, server.url) as other:
                assert read(other, prompt(newest, 4)) == 4
                assert read(other, prompt(1, 4)) == 0  # that was lost with the first server


def test_a_pool_that_is_stopped_keeps_nobody_waiting(server: Server) -> None:
    limits = {"fetch_timeout": 0.5, "put_timeout": 0.5, "lookup_timeout": 0.2, "connect_timeout": 0.5}
    with manager_of(16, server.url, **limits) as manager:
        write(manager, prompt(1, 4))
        assert manager.flush(timeout=PATIENCE_S)
        server.signal(signal.SIGSTOP)
        assert read(manager, prompt(2, 4)) == 0
        assert read(manager, prompt(1, 4)) == 4
        write(manager, prompt(3, 4))
        assert manager.flush(timeout=PATIENCE_S)
        assert set(account(manager)) <= {"not_yet", "tier_down"}
        server.signal(signal.SIGCONT)
        newest = stores_again(manager)
        with manager_of(16, server.url) as other:
            assert read(other, prompt(newest, 4)) == 4


# -- the end


def test_closed_with_things_held() -> None:
    manager = manager_of(16, MEMORY)
    write(manager, prompt(1, 4))
    hit, reservation = manager.acquire(prompt(1, 4)), manager.reserve(prompt(2, 4))
    manager.prefetch(prompt(3, 4))
    manager.close()
    manager.close()
    with pytest.raises(ClosedError):
        reservation.commit()
    reservation.give_up()
    hit.close()
    hit.close()
    for call in (
        lambda: manager.acquire(prompt(1, 4)),
        lambda: manager.reserve(prompt(1, 4)),
        lambda: manager.prefetch(prompt(1, 4)),
        lambda: manager.delete(prompt(1, 4)),
        manager.flush,
    ):
        with pytest.raises(ClosedError):
            call()
    assert manager.stats()["l1_capacity_blocks"] == 16


def test_the_views_of_a_hit_outlive_the_manager() -> None:
    script = """
import sys
from kvrdma.keys import KeySpace
from kvrdma.manager import KVCacheManager
from kvrdma.settings import Settings
space = KeySpace("m", "w", "c", "bfloat16", "a", 64, 2, 4)
manager = KVCacheManager(space, 1 << 20, Settings(l1_bytes=8 << 20))
with manager.reserve(range(16)) as reservation:
    for view in reservation.views:
        view[:] = 5
    reservation.commit()
hit, reservation = manager.acquire(range(16)), manager.reserve(range(16, 24))
manager.close()
reservation.views[0][:] = 6
print("sum", sum(int(view.min()) for view in hit.views), file=sys.stderr)
"""
    with Program("-c", script) as program:
        assert program.says("sum ") == "20"
        assert program.ended() == 0


def test_closed_in_the_middle_of_an_acquire(server: Server) -> None:
    manager = manager_of(16, server.url, lookup_timeout=2, connect_timeout=2)
    assert read(manager, prompt(1, 4)) == 0
    server.signal(signal.SIGSTOP)
    ended: list[type[BaseException] | int] = []

    def acquire() -> None:
        try:
            ended.append(read(manager, prompt(2, 4)))
        except KVRDMAError as error:
            ended.append(type(error))

    thread = threading.Thread(target=acquire)
    thread.start()
    eventually(lambda: manager.stats()["requests"] == 1)
    manager.close()
    thread.join(PATIENCE_S)
    assert ended == [ClosedError]


def test_closed_while_the_pool_is_stopped_in_the_middle_of_a_put(server: Server) -> None:
    manager = manager_of(16, server.url)
    write(manager, prompt(1, 1))
    assert manager.flush(timeout=PATIENCE_S)
    server.signal(signal.SIGSTOP)
    write(manager, prompt(2, 8))
    manager.close(timeout=0.1)  # everything comes back, though the put had 30 s
