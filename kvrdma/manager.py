"""`KVCacheManager`: index, agent and coordinator in one object, for engines without a cache of their own.

For one rank. Every call ends within its time-out; failures of L2 are misses.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma.backends import StorageBackend, open_backend
from kvrdma.backends.breaker import BreakerBackend
from kvrdma.cache import Answer, CacheIndex, IndexOptions, JobKind, Prober, Slot, SlotState, TransferAgent
from kvrdma.coordinator import Coordinator, SoloCoordinator
from kvrdma.errors import CapacityError, ClosedError, ConfigError, DeadlineError
from kvrdma.keys import KeySpace, block_keys, pack_keys
from kvrdma.layout import Shard
from kvrdma.memory import PinnedPool, read_slots
from kvrdma.metrics import Reason
from kvrdma.policies import offload_policies, open_policy
from kvrdma.settings import Settings

Tokens = Sequence[int] | NDArray[np.int32]
_POLL_S: Final = 0.05  # deadlines inside the index pass without a wake-up


class Hit:
    """Leading blocks of a prompt that are in L1, held until `close`; a context manager."""

    def __init__(self, manager: KVCacheManager, slots: Sequence[Slot], block_tokens: int) -> None:
        self._manager = manager
        self._slots = list(slots)
        self._views: list[NDArray[np.uint8]] | None = None
        self._rows = manager.pool.rows()  # they point at something though the manager is closed first
        self.n_blocks = len(slots)
        self.n_tokens = len(slots) * block_tokens

    @property
    def views(self) -> list[NDArray[np.uint8]]:
        """Each block in place (uint8[block_nbytes], read-only); not to be used after `close`."""
        if self._views is None:
            per_slab = self._manager.pool.slots_per_slab
            places = [divmod(slot.number, per_slab) for slot in self._slots]
            self._views = [_read_only(self._rows[slab][row]) for slab, row in places]
        return self._views

    def copy_into(self, target: NDArray[np.uint8]) -> None:
        """Copy the blocks into uint8[n_blocks, block_nbytes]; raises `ConfigError` on another shape."""
        wanted = (self.n_blocks, self._manager.pool.slot_nbytes)
        if target.shape != wanted or target.dtype != np.uint8:
            raise ConfigError(f"target: uint8{list(wanted)} is needed, got {target.dtype}{list(target.shape)}")
        read_slots(self._rows, np.array([slot.number for slot in self._slots], dtype=np.int64), target)

    def close(self) -> None:
        """Let the blocks go. Idempotent."""
        slots, self._slots = self._slots, []
        self._views, self._rows = [], []
        self._manager._let_go(slots)

    def __len__(self) -> int:
        return self.n_blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reservation:
    """Slots for the blocks of a prompt that L1 has not. Fill `views`, then `commit`; leaving it gives up.

    `rows[j]` is the position in the prompt of the block that `views[j]` is for. It commits whole or leaves
    nothing.
    """

    def __init__(self, manager: KVCacheManager, slots: Sequence[Slot], rows: Sequence[int]) -> None:
        self._manager = manager
        self._slots: list[Slot] | None = list(slots)
        self._memories = manager.pool.memories  # as in a hit
        self.rows = list(rows)
        self.views = [manager.pool.view(slot.number) for slot in slots]

    def commit(self, *, timeout: float = 10.0) -> bool:
        """Make the blocks findable; True once they are. Offloading goes on in the background."""
        if self._slots is None:
            raise ClosedError("reservation: committed or given up already")
        slots, self._slots = self._slots, None
        self.views, self._memories = [], ()
        return self._manager._commit(slots, timeout)

    def give_up(self) -> None:
        """Leave nothing. Idempotent."""
        if self._slots is not None:
            slots, self._slots = self._slots, None
            self.views, self._memories = [], ()
            self._manager._give_up(slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_up()


class KVCacheManager:
    """A pinned CPU cache with an L2 below it, for one rank. Thread-safe.

    It can be used as soon as it is made, which takes as long as its first slab, whatever `l1_bytes` is: the other
    slots are added in the background. `stats` has `l1_ready_blocks` beside `l1_capacity_blocks`; `wait_until_grown`
    is for whoever wants all of them.

    Raises:
        ConfigError: a setting or URL that cannot be meant, or `l1_bytes` below one block.
        CapacityError: the host has not the memory.
    """

    def __init__(
        self,
        keyspace: KeySpace,
        block_nbytes: int,
        settings: Settings | None = None,
        *,
        shard: Shard | None = None,
        backend: StorageBackend | None = None,
        coordinator: Coordinator | None = None,
    ) -> None:
        settings = Settings() if settings is None else settings
        self._coordinator = SoloCoordinator() if coordinator is None else coordinator
        if self._coordinator.world != 1:
            raise ConfigError("the manager runs on one rank for now; tensor parallelism is planned")
        self._settings = settings
        self._keyspace = keyspace
        n_slots = settings.l1_bytes // block_nbytes if block_nbytes > 0 else 0
        policy, offload = open_policy(settings.policy), offload_policies.get(settings.offload)
        if n_slots < 1:
            raise ConfigError(f"l1_bytes={settings.l1_bytes}: less than one block of {block_nbytes} bytes")
        shard = Shard(0, 0, keyspace.layers, 0, 1) if shard is None else shard
        self._changed = threading.Condition()
        self._requests = itertools.count()
        self._prefetches: dict[str, list[bytes]] = {}
        self._closed = False
        self._ended = False  # all but the pool, which waits for its leases
        self._backend: BreakerBackend | None = None
        self._prober: Prober | None = None
        with contextlib.ExitStack() as undo:  # of a start that fails on its way
            if backend is None and settings.l2:
                backend = open_backend(settings.l2, settings)
            if backend is not None:
                undo.callback(backend.close)
                self._backend = BreakerBackend(backend)
            self._index = CacheIndex(
                n_slots,
                policy(n_slots),
                offload(),
                IndexOptions(
                    has_l2=backend is not None,
                    lookup_timeout_s=settings.lookup_timeout,
                    fetch_timeout_s=settings.fetch_timeout,
                    put_timeout_s=settings.put_timeout,
                    waiting_share=settings.waiting_share,
                    growing=True,
                ),
            )
            self.pool = PinnedPool(block_nbytes, n_slots, in_background=True)
            undo.callback(self.pool.close)
            self._agent = TransferAgent(self.pool, shard, backend=self._backend, on_report=self._wake)
            undo.callback(self._agent.close)
            if self._backend is not None:
                self._backend.use_keyspace(keyspace)
                self._prober = Prober(self._backend, [shard], timeout=settings.lookup_timeout, on_answer=self._wake)
                undo.callback(self._prober.close)
            with self._changed:
                self._pump()
            self._agent.grow()
            undo.pop_all()

    # -- reading

    def acquire(self, tokens: Tokens, *, timeout: float = 10.0) -> Hit:
        """The leading blocks of a prompt that L1 or L2 has, held in L1 until the hit is closed.

        A miss is a hit of 0 blocks; after `timeout` seconds it is what has come until then.
        """
        keys = block_keys(self._keyspace, tokens)
        request = f"acquire-{next(self._requests)}"
        deadline = time.monotonic() + timeout
        with self._changed:
            try:
                while True:
                    self._check_open()
                    self._pump()
                    late = time.monotonic() >= deadline
                    offer = self._index.lookup(request, keys, 0, ready_only=late)
                    if offer.answer is Answer.OFFERED:
                        return Hit(self, self._index.take(request, offer.n_blocks), self._keyspace.block_tokens)
                    self._pump()
                    self._changed.wait(min(_POLL_S, max(0.0, deadline - time.monotonic())))
            finally:  # an interrupted wait must not leave blocks held
                self._index.finished(request)
                self._pump()

    def prefetch(self, tokens: Tokens) -> None:
        """Begin to bring a prompt's blocks from L2 into L1; returns at once. What it brings is not held."""
        keys = block_keys(self._keyspace, tokens)
        with self._changed:
            self._check_open()
            self._prefetches[f"prefetch-{next(self._requests)}"] = keys
            self._pump()

    # -- writing

    def reserve(self, tokens: Tokens) -> Reservation:
        """Take slots for the blocks of a prompt that L1 has not.

        Raises:
            CapacityError: L1 has not room for all of them; nothing was taken.
        """
        keys = block_keys(self._keyspace, tokens)
        with self._changed:
            self._check_open()
            self._pump()
            rows = self._index.missing(keys)
            slots = self._index.reserve(
                [keys[row] for row in rows], parents=[keys[row - 1] if row else None for row in rows]
            )
            if len(slots) < len(rows):
                still = "; more slots are being added" if self._index.growing else ""
                raise CapacityError(f"{len(rows)} blocks asked for; L1 has not room for all of them{still}")
            return Reservation(self, slots, rows)

    def wait_until_grown(self, *, timeout: float = 60.0) -> bool:
        """Wait until no more slots are added; True where all of `l1_bytes` is there."""
        with self._changed:
            self._check_open()
            if not self._changed.wait_for(lambda: self._closed or not self._index.growing, timeout):
                return False
            self._check_open()
            stats = self._index.stats()
            return bool(stats["l1_ready_blocks"] == stats["l1_capacity_blocks"])

    def flush(self, *, timeout: float = 60.0) -> bool:
        """Wait until everything that was to be offloaded is; False where that takes longer."""
        return self._wait(lambda: not self._index.busy(JobKind.PUT, JobKind.SAVE), timeout)

    def delete(self, tokens: Tokens, *, timeout: float = 10.0) -> None:
        """Drop a prompt's blocks from L1 and L2, within `timeout` seconds.

        Raises:
            DeadlineError: blocks are still on their way to L2, so it could not be told yet; L1 has dropped them.
            KVRDMAError: L2 cannot be told; L1 has dropped them.
        """
        keys = block_keys(self._keyspace, tokens)
        deadline = time.monotonic() + timeout
        self._forget(keys)  # first, so that no put of them begins any more
        if self._backend is None or not keys:
            return
        if not self.flush(timeout=timeout):
            raise DeadlineError(f"delete: blocks are still on their way to L2 after {timeout} s, so it was not told")
        self._backend.delete(pack_keys(keys), timeout=max(0.0, deadline - time.monotonic()))
        self._forget(keys)  # what was fetched from L2 meanwhile

    # -- the rest

    def stats(self) -> dict[str, Any]:
        """Counters and gauges by name; misses by reason; durations by kind of job, and of lookups in L2."""
        with self._changed:
            self._pump()
            decided = self._index.stats()
        moved = self._agent.stats()
        return {**moved, **decided, "seconds": {**moved["seconds"], **decided["seconds"]}}

    def misses(self, reason: Reason) -> int:
        """How many looked-up blocks were not served for a reason."""
        with self._changed:
            return self._index.metrics.misses[reason]

    def close(self, *, timeout: float = 10.0) -> None:
        """Let transfers end (at most `timeout` seconds), then give everything back. Idempotent.

        Raises:
            CapacityError: a lease is still held; the memory is given back by a later call.
        """
        with self._changed:
            first, self._closed = not self._closed, True
            self._changed.notify_all()
        if first:
            self._agent.close(timeout=timeout)
            if self._prober is not None:
                self._prober.close()
            if self._backend is not None:
                self._backend.close()
            self._ended = True
        if self._ended:
            self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside, with `_changed` held

    def _pump(self) -> None:
        """Carry what is new between index, agent and prober, until there is nothing new."""
        if self._closed:
            return
        if self._prober is not None:
            for answer in self._prober.poll():
                self._index.on_probe(answer)
        for report in self._agent.poll():
            self._index.on_report(report)
        if (pool := self._agent.poll_pool()) is not None:
            self._index.on_pool(pool)
        for request, keys in list(self._prefetches.items()):
            if self._index.lookup(request, keys, 0, counted=False).answer is Answer.OFFERED:
                self._index.finished(request)
                del self._prefetches[request]
        if self._prober is not None:
            self._prober.submit(self._index.take_probes())
        self._agent.submit(self._index.take_jobs())

    def _forget(self, keys: Sequence[bytes]) -> None:
        with self._changed:
            self._check_open()
            self._index.forget(keys)

    def _wake(self) -> None:
        """Something is new; called on the agent's and the prober's threads."""
        with self._changed:
            self._pump()
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                self._check_open()
                self._pump()
                if condition():
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, _POLL_S))

    def _commit(self, slots: Sequence[Slot], timeout: float) -> bool:
        if not slots:
            return True
        with self._changed:
            self._check_open()
            job = self._index.seal(slots)
            self._pump()
        self._wait(lambda: not self._index.open_job(job.number), timeout)
        return all(slot.state is SlotState.READY for slot in slots)

    def _give_up(self, slots: Sequence[Slot]) -> None:
        with self._changed:
            self._index.give_up(slots)

    def _let_go(self, slots: Sequence[Slot]) -> None:
        with self._changed:
            self._index.let_go(slots)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("manager: closed")


def _read_only(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shown = view.view()
    shown.flags.writeable = False
    return shown
