"""The manager above a store that answers when the test says so; what it does with a real one: tests/process."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
from holding import PATIENCE_S, HoldingBackend
from paced import PacedSlabs

from kvrdma.errors import CapacityError, ClosedError, DeadlineError, TransportError
from kvrdma.keys import KeySpace, block_keys
from kvrdma.manager import KVCacheManager
from kvrdma.memory import Memory
from kvrdma.settings import Settings

NBYTES = 256
SPACE = KeySpace("m", "w", "c", "bfloat16", "a", 64, 2, 4)
PROMPT = range(12)
KEYS = block_keys(SPACE, PROMPT)


@pytest.fixture
def backend() -> HoldingBackend:
    return HoldingBackend()


@pytest.fixture
def manager(backend: HoldingBackend) -> Iterator[KVCacheManager]:
    with KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=8 * NBYTES), backend=backend) as manager:
        yield manager


def write(manager: KVCacheManager) -> None:
    with manager.reserve(PROMPT) as reservation:
        for view in reservation.views:
            view[:] = 7
        assert reservation.commit(timeout=PATIENCE_S)


def test_an_acquire_that_is_interrupted_holds_nothing(
    manager: KVCacheManager, backend: HoldingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(manager)
    backend.land()
    more = range(16)
    backend.blocks[block_keys(SPACE, more)[3]] = bytes(NBYTES)
    waited = manager._changed.wait

    def wait(timeout: float) -> bool:
        if manager.stats()["waiting_slots"] == 4:  # three are there, one is fetched
            raise KeyboardInterrupt
        return waited(timeout)

    monkeypatch.setattr(manager._changed, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        manager.acquire(more, timeout=PATIENCE_S)
    stats = manager.stats()
    assert (stats["requests"], stats["waiting_slots"], stats["jobs"]) == (0, 0, 1)
    monkeypatch.undo()
    backend.land()  # the fetch goes on, for whoever comes next
    with manager.acquire(more, timeout=PATIENCE_S) as hit:
        assert hit.n_blocks == 4


def test_a_delete_says_that_puts_under_way_kept_it_from_l2(manager: KVCacheManager, backend: HoldingBackend) -> None:
    write(manager)
    with pytest.raises(DeadlineError, match="on their way"):
        manager.delete(PROMPT, timeout=0.05)
    assert backend.deleted == []
    with manager.acquire(PROMPT, timeout=0) as hit:
        assert hit.n_blocks == 0  # in L1 they are dropped
    backend.land()
    manager.delete(PROMPT, timeout=PATIENCE_S)
    assert backend.deleted == KEYS
    assert backend.blocks == {}


def test_the_steps_of_a_delete_share_one_deadline(
    manager: KVCacheManager, backend: HoldingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []
    delete = backend.delete
    monkeypatch.setattr(backend, "delete", lambda keys, *, timeout: (left.append(timeout), delete(keys, timeout=0))[1])
    write(manager)
    backend.land()
    manager.delete(PROMPT, timeout=PATIENCE_S)
    assert left[0] < PATIENCE_S  # what the flush took is gone


def test_a_delete_drops_what_was_fetched_while_l2_was_told(
    manager: KVCacheManager, backend: HoldingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.blocks = dict.fromkeys(KEYS, bytes(NBYTES))
    delete = backend.delete

    def slow_delete(keys: object, *, timeout: float) -> int:
        manager.prefetch(PROMPT)
        backend.land()
        return delete(keys, timeout=timeout)  # type: ignore[arg-type]

    monkeypatch.setattr(backend, "delete", slow_delete)
    manager.delete(PROMPT, timeout=PATIENCE_S)
    with manager.acquire(PROMPT, timeout=0) as hit:
        assert hit.n_blocks == 0


def test_nothing_is_put_after_its_delete_has_begun(manager: KVCacheManager, backend: HoldingBackend) -> None:
    """A commit that is under way when its blocks are deleted must not bring them back to L2."""
    with manager.reserve(PROMPT) as reservation:
        manager.delete(PROMPT, timeout=PATIENCE_S)
        assert not reservation.commit(timeout=PATIENCE_S)
    assert manager.flush(timeout=PATIENCE_S)
    assert backend.blocks == {}


def test_everything_ends_with_the_manager(backend: HoldingBackend) -> None:
    manager = KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=8 * NBYTES), backend=backend)
    write(manager)  # its put never ends
    ended: list[type[BaseException]] = []

    def flush() -> None:
        try:
            manager.flush(timeout=PATIENCE_S)
        except ClosedError as error:
            ended.append(type(error))

    waiting = threading.Thread(target=flush)
    waiting.start()
    manager.close(timeout=0.05)
    waiting.join(PATIENCE_S)
    assert ended == [ClosedError]
    assert manager.pool.n_leases == 0


# -- a pool that grows


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> PacedSlabs:
    """Real slabs of four slots, that come when the test says so."""
    source = PacedSlabs()
    monkeypatch.setattr("kvrdma.memory.pool.MemfdSlabs", lambda: source)
    monkeypatch.setattr("kvrdma.memory.pool.DEFAULT_SLAB_NBYTES", 4 * NBYTES)
    return source


def grown(n_blocks: int, backend: HoldingBackend | None = None) -> KVCacheManager:
    return KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=n_blocks * NBYTES), backend=backend)


def test_it_serves_while_its_pool_grows(paced: PacedSlabs) -> None:
    with grown(12) as manager:
        stats = manager.stats()
        assert (stats["l1_ready_blocks"], stats["l1_free_blocks"], stats["l1_capacity_blocks"]) == (4, 4, 12)
        assert manager.wait_until_grown(timeout=0.01) is False
        write(manager)  # three blocks of the four
        with pytest.raises(CapacityError, match="more slots are being added"), manager.acquire(PROMPT):
            manager.reserve(range(100, 108))
        paced.permits.release(2)
        assert manager.wait_until_grown(timeout=PATIENCE_S)
        with manager.acquire(PROMPT) as hit, manager.reserve(range(100, 136)) as reservation:
            assert [view.tolist() for view in hit.views] == [[7] * NBYTES] * 3
            assert len({view.ctypes.data for view in [*hit.views, *reservation.views]}) == 12
            for view in reservation.views:
                view[:] = 8
            assert [view.tolist() for view in hit.views] == [[7] * NBYTES] * 3
            assert reservation.commit(timeout=PATIENCE_S)
        assert manager.stats()["l1_ready_blocks"] == 12


def test_what_a_later_slab_holds_is_offloaded(paced: PacedSlabs, backend: HoldingBackend) -> None:
    with grown(8, backend) as manager:
        paced.permits.release()
        assert manager.wait_until_grown(timeout=PATIENCE_S)
        with manager.reserve(range(32)) as reservation:
            for view in reservation.views:
                view[:] = 9
            assert reservation.commit(timeout=PATIENCE_S)
        backend.land()
        assert manager.flush(timeout=PATIENCE_S)
        assert backend.blocks == dict.fromkeys(block_keys(SPACE, range(32)), bytes([9]) * NBYTES)


def test_a_growth_that_fails_leaves_what_there_is(paced: PacedSlabs) -> None:
    with grown(12) as manager:
        paced.failure = CapacityError("no memory")
        paced.permits.release()
        assert manager.wait_until_grown(timeout=PATIENCE_S) is False
        stats = manager.stats()
        assert (stats["l1_ready_blocks"], stats["l1_capacity_blocks"], stats["l1_growth_failures"]) == (4, 12, 1)
        write(manager)
        with manager.acquire(PROMPT) as hit:
            assert len(hit) == 3


def test_a_close_does_not_wait_for_the_pool(paced: PacedSlabs) -> None:
    manager = grown(12)
    write(manager)
    manager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvrdma-growth"]
    with pytest.raises(ClosedError):
        manager.wait_until_grown()


class RefusingBackend(HoldingBackend):
    """Takes no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.closes = 0

    def register(self, memory: Memory) -> None:
        raise TransportError("no")

    def close(self) -> None:
        self.closes += 1


def test_a_start_that_fails_on_its_way_leaves_nothing_open() -> None:
    backend, before = RefusingBackend(), len(os.listdir("/proc/self/fd"))
    for closes in (1, 2, 3):
        with pytest.raises(TransportError):
            KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=8 * NBYTES), backend=backend)
        assert backend.closes == closes
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


class EndlessBackend(HoldingBackend):
    """Ends no transfer when it is closed."""

    def close(self) -> None:
        pass


def test_memory_that_is_still_held_at_the_close_is_given_back_by_a_later_one() -> None:
    backend = EndlessBackend()
    manager = KVCacheManager(SPACE, NBYTES, Settings(l1_bytes=8 * NBYTES), backend=backend)
    write(manager)
    for _ in range(2):
        with pytest.raises(CapacityError, match="still held"):
            manager.close(timeout=0.05)
    backend.land()
    manager.close()
    manager.close()
    assert (manager.pool.n_leases, manager.pool.memories) == (0, ())
