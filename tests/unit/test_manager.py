"""The manager above a store that answers when the test says so; what it does with a real one: tests/process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from holding import PATIENCE_S, HoldingBackend

from kvrdma.errors import ClosedError, DeadlineError
from kvrdma.keys import KeySpace, block_keys
from kvrdma.manager import KVCacheManager
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
