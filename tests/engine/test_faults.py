"""One engine through every fault of its pool, of the network and of its neighbours: it answers on, and right.

Its transport and the server's meet what a test orders (planned.py). It may lock no page, and its L1 is small, so that
what it stores it soon has to fetch again. In each test the answer is that of vLLM without kvrdma, with as many cached
tokens; what was loaded has the bytes that were saved; each block that was looked up is accounted for; afterwards
nothing is under way or held, and the next request is served from the pool.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from asking import (
    assert_as_from_own_cache,
    assert_every_block_accounted,
    counters,
    loaded,
    more,
    new_misses,
)
from conftest import BLOCK, MODELS, ROOT, Witness, eventually
from planned import waiting_file
from processes import EngineProcess, Process, Server

from kvrdma import protocol
from kvrdma.backends import StorageBackend, open_backend
from kvrdma.backends.pool import PoolBackend
from kvrdma.backends.pool.session import Deadline
from kvrdma.keys import KeyBatch, KeySpace, block_keys, pack_keys
from kvrdma.layout import Shard, checksum
from kvrdma.memory import PinnedPool
from kvrdma.settings import Settings

N_BLOCKS = 8  # of a prompt here
N = N_BLOCKS * BLOCK
N_LOOKED_UP = N_BLOCKS - 1  # the last token is computed in any case
N_ANSWER = 8  # tokens
SLOT_NBYTES = 4 * 2 * 2 * 64 * 4 * BLOCK  # layers, K and V, heads, values of a head, bytes of a value
L1_BLOCKS = 16  # half of it for what waiting requests hold
POOL_BLOCKS = 512
SHARD = Shard(0, 0, 4, 0, 2)  # all of the model
OTHERS = KeySpace("other", "w", "c", "float32", "a", 64, 4, BLOCK)
LEASE_S = 1.0
FETCH_TIMEOUT_S = 2.5  # of a transfer; half of it again, and a request waits no longer
PUT_TIMEOUT_S = 1.0
PATIENCE_S = 30.0


class FaultyServer(Server):
    """A pool server that offers "tcp", and "faulty" with what is ordered in its file."""

    def __init__(self, faults: Path) -> None:
        here = Path(__file__).parent
        command = [str(here / "faulty_server.py"), str(faults), str(POOL_BLOCKS * SLOT_NBYTES), str(LEASE_S)]
        Process.__init__(self, command, name="faulty-server", env={"PYTHONPATH": str(ROOT)})
        try:
            self.address = self._wait_listening()
        except BaseException:
            self.close()
            raise


class Drill:
    """The engine under test, the server of its pool, and vLLM without kvrdma to compare with."""

    def __init__(self, folder: Path, witness: Witness, start_engine: Callable[..., EngineProcess]) -> None:
        self.witness = witness
        self.at_client, self.at_server = folder / "client", folder / "server"
        self.server = FaultyServer(self.at_server)
        self.engine = start_engine(
            "faults",
            model=MODELS / "tiny",
            env={"WITNESS_FAULTS": str(self.at_client), "WITNESS_UNLOCKED": "1"},
            settings={
                "l1_bytes": L1_BLOCKS * SLOT_NBYTES,
                "l2": f"{self.server.url}?transports=faulty",
                "fetch_timeout": FETCH_TIMEOUT_S,
                "put_timeout": PUT_TIMEOUT_S,
                "lookup_timeout": 2.0,  # none of this is about a lookup that is late
                "save_share": 1.0,
            },
            num_blocks=100,
        )
        self.plain = start_engine("faults-plain", model=MODELS / "tiny", connector=False)
        self.numbers = itertools.count()
        self.last_keys = pack_keys([])  # of the prompt that was stored last

    def prompt(self, n_blocks: int = N_BLOCKS) -> list[int]:
        """Tokens that share no block with those of any other prompt."""
        number = next(self.numbers)
        return [number % 500, number // 500, *((7 * i + number) % 500 for i in range(n_blocks * BLOCK - 2))]

    def order(self, at: Path, kind: str, **how: Any) -> None:
        """Have the next batch that is posted there meet a fault."""
        new = at.with_suffix(".new")
        new.write_text(json.dumps({"kind": kind, **how}))
        new.rename(at)

    @contextmanager
    def waiting_get(self, tokens: list[int]) -> Iterator[None]:
        """The request "held" is under way, and its read from the pool begins only when this is left."""
        self.empty_prefix_cache()
        self.order(self.at_client, "wait")
        self.engine.ask("add", id="held", tokens=tokens, max_tokens=N_ANSWER)
        waiting = waiting_file(self.at_client)
        try:

            def begun() -> bool:
                self.engine.ask("step", seconds=0.02)
                return waiting.exists()

            eventually("a get has begun", begun)
            yield
        finally:
            waiting.unlink(missing_ok=True)

    def empty_prefix_cache(self) -> None:
        """Of the engine itself: what it loads then is from kvrdma."""

        def emptied() -> bool:  # saves reference blocks, which are left alone
            self.engine.ask("step", seconds=0.01)
            return bool(self.engine.ask("reset", connector=False)["reset"])

        eventually("the engine's own cache is empty", emptied)

    def quiet(self) -> dict[str, Any]:
        """Wait until nothing is under way, and nothing held."""

        def idle() -> dict[str, Any] | None:
            now = counters(self.engine)
            return now if (now["jobs"], now["zombies"], now["waiting_slots"]) == (0, 0, 0) else None

        now: dict[str, Any] = eventually("nothing is under way", idle)
        assert now["l1_free_blocks"] + now["l1_blocks"] == now["l1_ready_blocks"] == L1_BLOCKS
        return now

    def push_out(self) -> None:
        """Have L1 full of something else."""
        self.engine.generate(self.prompt(L1_BLOCKS + 1), id="push", max_tokens=1)

    def stored(self) -> list[int]:
        """A prompt that is in the pool, and in L1 no more."""
        tokens = self.prompt()

        def stored() -> bool:
            before, known = self.quiet(), len(self.witness.lines("faults"))
            self.engine.generate(tokens, id="store", max_tokens=1)
            stored_now = more(before, self.quiet(), "l2_put_blocks") == N_BLOCKS
            saved = [line["key"] for line in self.witness.lines("faults")[known:] if line["what"] == "saved"]
            self.last_keys = pack_keys(map(bytes.fromhex, saved))
            self.push_out()
            self.quiet()
            return stored_now

        eventually("the prompt is in the pool", stored)
        self.empty_prefix_cache()
        return tokens

    def ask(self, tokens: list[int]) -> dict[str, Any]:
        """Answer with what kvrdma has of a prompt, and nothing of the engine's own."""
        self.empty_prefix_cache()
        return self.engine.generate(tokens, max_tokens=N_ANSWER)

    def check(self, tokens: list[int], answer: dict[str, Any]) -> None:
        assert_as_from_own_cache(self.plain, tokens, answer)
        assert answer["cached_tokens"] == loaded(answer)
        assert self.witness.wrong("faults") == []
        assert_every_block_accounted(answer)

    def hits_again(self, tokens: list[int]) -> None:
        """The pool serves the whole prompt; what is missing there, or the breaker keeps back, is stored meanwhile."""

        def served() -> dict[str, Any] | None:
            self.push_out()
            before = self.quiet()
            answer = self.ask(tokens)
            now = self.quiet()
            return answer if more(before, now, "l2_hit_blocks") == N_LOOKED_UP else None

        answer = eventually("the pool is used again", served, timeout=60)
        assert loaded(answer) == N_LOOKED_UP * BLOCK
        self.check(tokens, answer)
        stats = self.server.stats()
        assert (stats["reserved_blocks"], stats["zombie_blocks"]) == (0, 0)


@pytest.fixture(scope="module")
def drill(
    tmp_path_factory: pytest.TempPathFactory, witness: Witness, start_engine: Callable[..., EngineProcess]
) -> Iterator[Drill]:
    drill = Drill(tmp_path_factory.mktemp("faults"), witness, start_engine)
    yield drill
    drill.server.close()


@contextmanager
def neighbour(drill: Drill) -> Iterator[tuple[StorageBackend, PinnedPool]]:
    """Another client of the same pool, without faults, and memory of its own."""
    with PinnedPool(SLOT_NBYTES, N_BLOCKS) as pool, open_backend(drill.server.url, Settings()) as backend:
        backend.use_keyspace(OTHERS)
        for memory in pool.memories:
            backend.register(memory)
        yield backend, pool


def flood(drill: Drill, backend: StorageBackend, pool: PinnedPool) -> KeyBatch:
    """Put as many new blocks as the pool has places, of other bytes than an engine's: no slot keeps what it had."""
    keys = block_keys(OTHERS, [next(drill.numbers), *range(1, POOL_BLOCKS * BLOCK)])
    pool.view(0)[:] = 0xA5
    for first in range(0, POOL_BLOCKS, 256):
        some = keys[first : first + 256]
        checksums = np.array([checksum(key, SHARD.encode(), [pool.view(0)]) for key in some], dtype=np.uint64)
        with pool.lease([0]) as lease:
            put = backend.put(
                pack_keys(some), SHARD, pool.spans([0] * len(some)), checksums, hold=lease, timeout=PATIENCE_S
            )
        put.result(PATIENCE_S)
    return pack_keys(keys)


def lease(backend: StorageBackend, keys: KeyBatch) -> None:
    """Have every block pinned, as whoever reads them does, until the lease is over."""
    assert isinstance(backend, PoolBackend)
    session, number = backend._ready(OTHERS, Deadline(PATIENCE_S))
    reply = session.call(
        lambda seq: protocol.GetRequest(seq, number, SHARD.encode(), keys.tobytes()),
        protocol.GetReply,
        timeout=PATIENCE_S,
    )
    assert sum(reply.present) == len(keys)


# -- what it starts with


def test_an_engine_that_may_lock_no_page_serves_all_the_same(drill: Drill) -> None:
    tokens = drill.stored()
    answer = drill.ask(tokens)
    assert loaded(answer) == N_LOOKED_UP * BLOCK
    drill.check(tokens, answer)
    assert "not page-locked" in drill.engine.log()
    limits = [Path(f"/proc/{child.pid}/limits") for child in psutil.Process(drill.engine.pid).children(recursive=True)]
    assert any("Max locked memory         0" in limit.read_text() for limit in limits)


# -- what it reads


@pytest.mark.parametrize(("kind", "how"), [("delay", {"seconds": 0.2}), ("reorder", {"seconds": 0.2})])
def test_a_read_that_is_slow(drill: Drill, kind: str, how: dict[str, Any]) -> None:
    tokens = drill.stored()
    drill.order(drill.at_client, kind, **how)
    answer = drill.ask(tokens)
    assert not drill.at_client.exists()
    assert loaded(answer) == N_LOOKED_UP * BLOCK
    drill.check(tokens, answer)
    drill.hits_again(tokens)


def test_a_byte_that_flips_on_its_way_to_the_engine(drill: Drill) -> None:
    tokens = drill.stored()
    before, dropped = drill.quiet(), drill.server.stats().get("dropped_wrong", 0)
    bad = 3
    drill.order(drill.at_client, "corrupt", byte=bad * SLOT_NBYTES + 100)
    answer = drill.ask(tokens)
    assert loaded(answer) == bad * BLOCK
    assert new_misses(before, answer) == {"checksum": 1, "behind_hole": N_LOOKED_UP - bad - 1}
    drill.check(tokens, answer)
    eventually("the server has dropped it", lambda: drill.server.stats()["dropped_wrong"] == dropped + 1)
    drill.hits_again(tokens)


def test_a_read_that_is_reset_in_the_middle(drill: Drill) -> None:
    """What had come is used."""
    tokens = drill.stored()
    before = drill.quiet()
    drill.order(drill.at_client, "reset")
    answer = drill.ask(tokens)
    half = N_LOOKED_UP // 2
    assert loaded(answer) == half * BLOCK
    assert sum(new_misses(before, answer).values()) == N_LOOKED_UP - half
    assert set(new_misses(before, answer)) == {"tier_down"}
    drill.check(tokens, answer)
    drill.hits_again(tokens)


def test_a_read_whose_time_is_over_before_its_bytes_land(drill: Drill) -> None:
    """They land before it is terminal, and what has come is what was asked for: it counts."""
    tokens = drill.stored()
    before = drill.quiet()
    drill.order(drill.at_client, "late")
    answer = drill.ask(tokens)
    assert sum(new_misses(before, answer).values()) + loaded(answer) // BLOCK == N_LOOKED_UP
    assert set(new_misses(before, answer)) <= {"tier_down", "not_yet"}
    drill.check(tokens, answer)
    drill.hits_again(tokens)


def test_bytes_that_land_when_nobody_waits_for_them_any_more(drill: Drill) -> None:
    """Until they have, their slots are nobody else's, though L1 is full."""
    tokens = drill.stored()
    before = drill.quiet()
    with drill.waiting_get(tokens):
        answer = drill.engine.ask("wait", id="held")
        assert loaded(answer) == 0
        assert new_misses(before, answer) == {"not_yet": N_LOOKED_UP}
        drill.push_out()
        during = counters(drill.engine)
        assert during["zombies"] == N_LOOKED_UP
        assert during["l1_blocks"] + during["l1_free_blocks"] == L1_BLOCKS - N_LOOKED_UP
    drill.quiet()
    drill.check(tokens, answer)
    drill.hits_again(tokens)


def test_a_read_that_never_ends(drill: Drill) -> None:
    """The request goes on without it; after its second time-out the endpoint is aborted, and the slots come back."""
    tokens = drill.stored()
    before, reading = drill.quiet(), drill.server.stats()["clients"]
    drill.order(drill.at_client, "drop")
    answer = drill.ask(tokens)
    assert loaded(answer) == 0
    assert new_misses(before, answer) == {"not_yet": N_LOOKED_UP}
    during = counters(drill.engine)
    assert during["zombies"] == N_LOOKED_UP
    drill.check(tokens, answer)
    drill.quiet()
    eventually("its connection has ended", lambda: drill.server.stats()["clients"] < reading)
    drill.hits_again(tokens)


def test_a_slot_that_is_used_again_while_the_engine_reads_it(drill: Drill) -> None:
    tokens = drill.stored()
    before, expired = drill.quiet(), drill.server.stats().get("expired_leases", 0)
    with neighbour(drill) as (backend, pool):
        with drill.waiting_get(tokens):
            assert backend.delete(drill.last_keys, timeout=PATIENCE_S) == N_BLOCKS
            eventually("the lease is over", lambda: drill.server.stats().get("expired_leases", 0) > expired)
            flood(drill, backend, pool)
        answer = drill.engine.ask("wait", id="held")
    assert loaded(answer) == 0
    assert sum(new_misses(before, answer).values()) == N_LOOKED_UP
    assert set(new_misses(before, answer)) <= {"not_there", "not_yet"}  # by then a slow machine waits no longer
    drill.check(tokens, answer)
    drill.quiet()
    assert drill.server.stats().get("dropped_wrong", 0) <= 1
    drill.hits_again(tokens)


# -- what the server reads of it


@pytest.mark.parametrize("kind", ["corrupt", "reset", "drop"])
def test_a_put_that_fails(drill: Drill, kind: str) -> None:
    """A flipped byte is not stored, nor what is reset or never comes; L1 has it all the same."""
    drill.push_out()
    before, wrong = drill.quiet(), drill.server.stats().get("put_checksum_failures", 0)
    tokens = drill.prompt()
    drill.order(drill.at_server, kind)
    drill.check(tokens, drill.ask(tokens))
    eventually("the put has ended", lambda: more(before, counters(drill.engine), "l2_put_failed_blocks"))
    after = drill.quiet()
    assert not drill.at_server.exists()
    failed = more(before, after, "l2_put_failed_blocks")
    assert failed + more(before, after, "l2_put_blocks") == N_BLOCKS
    if kind == "corrupt":
        assert failed == 1
        assert drill.server.stats()["put_checksum_failures"] == wrong + 1
    answer = drill.ask(tokens)
    assert loaded(answer) == N_LOOKED_UP * BLOCK
    drill.check(tokens, answer)
    drill.hits_again(tokens)


def test_a_pool_whose_memory_is_full(drill: Drill) -> None:
    """The coldest blocks make room; where every one is being read, nothing is stored."""
    tokens = drill.stored()
    with neighbour(drill) as (backend, pool):
        flood(drill, backend, pool)
        before = drill.quiet()
        answer = drill.ask(tokens)  # what it had there was evicted
        assert new_misses(before, answer) == {"evicted": N_LOOKED_UP}
        drill.check(tokens, answer)
        assert drill.server.stats()["evicted_blocks"] > 0

        def declined() -> bool:
            lease(backend, flood(drill, backend, pool))  # for a second
            tokens, before = drill.prompt(), drill.quiet()
            drill.check(tokens, drill.ask(tokens))
            return more(before, drill.quiet(), "l2_put_failed_blocks") == N_BLOCKS

        eventually("a put is declined", declined)
        assert drill.server.stats()["declined_blocks"] >= N_BLOCKS
    drill.hits_again(tokens)


# -- others


NEIGHBOUR = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "process")!r})
from serving import *
from kvrdma.transports.tcp import TcpTransport
with RawClient(int(sys.argv[1])) as raw, TcpTransport() as transport:
    raw.connect_data(transport)
    request = protocol.GetRequest(raw.number(), raw.open(), bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3]))
    reply = raw.call(request, protocol.GetReply)
    with Client("kvrdma://127.0.0.1:" + sys.argv[1], n=16, nbytes=1 << 20, first=5000) as client:
        print("holds", sum(reply.present), file=sys.stderr, flush=True)
        while client.put(timeout=1).result().all():
            client.backend.delete(client.batch, timeout=30)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_neighbour_that_ends_or_stops_with_leases_and_in_the_middle_of_a_put(
    drill: Drill, end: signal.Signals
) -> None:
    """It held what the engine wants, which is served meanwhile; then the pool takes back what it held."""
    tokens = drill.stored()
    arguments = ["-c", NEIGHBOUR, str(drill.server.port), SHARD.encode().hex(), drill.last_keys.tobytes().hex()]
    other = Process(arguments, name="neighbour", env={"PYTHONPATH": str(ROOT)})
    try:

        def holds() -> bool:
            if "Traceback" in other.log():
                raise other.failed("it has failed")
            return f"holds {N_BLOCKS}" in other.log()

        eventually("it holds leases", holds)

        def in_a_put() -> bool:
            other.signal(signal.SIGSTOP)
            if drill.server.stats()["reserved_blocks"]:
                return True
            other.signal(signal.SIGCONT)
            return False

        eventually("it is in the middle of a put", in_a_put)
        other.signal(end)
        answer = drill.ask(tokens)
        assert loaded(answer) == N_LOOKED_UP * BLOCK
        drill.check(tokens, answer)
        drill.stored()

        def holds_nothing() -> bool:
            stats = drill.server.stats()
            return (stats["pinned_blocks"], stats["reserved_blocks"]) == (0, 0)

        eventually("it holds nothing any more", holds_nothing)
    finally:
        other.signal(signal.SIGKILL)  # one that is stopped takes no other
        other.close()
    drill.hits_again(tokens)


def test_an_engine_that_is_killed_in_the_middle_of_a_fetch(drill: Drill) -> None:
    """The last test here. The pool has its blocks yet, and nobody holds them."""
    tokens = drill.stored()
    with drill.waiting_get(tokens):
        os.killpg(drill.engine.pid, signal.SIGKILL)
        eventually("its connections have ended", lambda: drill.server.stats()["clients"] == 1)  # whoever asks
    stats = drill.server.stats()
    assert (stats["pinned_blocks"], stats["reserved_blocks"], stats["zombie_blocks"]) == (0, 0, 0)
    with neighbour(drill) as (backend, pool), pool.lease(range(N_BLOCKS), exclusive=True) as hold:
        get = backend.get_into(drill.last_keys, SHARD, pool.spans(hold.slots), hold=hold, timeout=PATIENCE_S)
        assert get.result(PATIENCE_S).all()  # and the checksums are right
