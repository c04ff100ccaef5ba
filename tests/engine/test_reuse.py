"""The main job on real vLLM: what one engine computed, another loads, and answers the same."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from asking import (
    assert_as_from_own_cache,
    assert_every_block_accounted,
    counters,
    loaded,
    misses,
    more,
    new_misses,
)
from conftest import BLOCK, MODELS, Pool, Witness, eventually
from processes import EngineProcess, Server
from slabs import alter

from kvrdma.backends import open_backend
from kvrdma.keys import KeySpace
from kvrdma.settings import Settings

N = 20 * BLOCK  # tokens of a prompt here
N_LOOKED_UP = N // BLOCK - 1  # the last token is computed in any case
N_FEW = 16  # tokens of an answer where a test needs many answers
KV_BYTES = 30 * 2 * 3 * 64 * 4 * BLOCK  # of a block: layers, K and V, heads, values of a head, bytes of a value


def prompt(text: list[int], number: int, n: int = N) -> list[int]:
    """A prompt that shares no block with those of other numbers."""
    return [text[0], 1000 + number, *text[1 : n - 1]]


def store(server: Server, engine: EngineProcess, tokens: list[int], **more: Any) -> dict[str, Any]:
    """Compute a prompt, and wait until the pool has it."""
    before = server.stats()["blocks"]
    answer = engine.generate(tokens, **more)
    eventually("offloaded", lambda: server.stats()["blocks"] >= before + len(tokens) // BLOCK)
    return answer


def test_same_prompt(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 1, N + 7)
    store(server, writer, tokens)
    answer = reader.generate(tokens)
    assert loaded(answer) == N
    assert answer["cached_tokens"] == N
    assert_as_from_own_cache(plain, tokens, answer)
    assert len(witness.loaded("reader")) >= N // BLOCK
    assert witness.wrong("reader") == []
    assert_every_block_accounted(answer)


def test_loaded_again_from_l1(server: Server, reader: EngineProcess, text: list[int], witness: Witness) -> None:
    tokens = prompt(text, 1, N + 7)
    read = server.stats()["read_bytes"]
    assert reader.ask("reset", connector=False)["reset"]
    answer = reader.generate(tokens)
    assert loaded(answer) == N
    assert server.stats()["read_bytes"] == read
    assert witness.wrong("reader") == []


def test_shared_prefix_other_tail(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    first = prompt(text, 2)
    second = [*first[: N // 2], 7, 8, 9, *first[N // 2 : -3]]
    store(server, writer, first)
    answer = reader.generate(second)
    assert loaded(answer) == N // 2
    assert_as_from_own_cache(plain, second, answer)
    assert witness.wrong("reader") == []
    assert_every_block_accounted(answer)


def test_a_hole_ends_the_run(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    """A block in the middle was evicted from the pool: what lies before it is loaded, what is behind is not."""
    tokens = prompt(text, 3)
    known = {line["key"] for line in witness.lines("writer")}
    store(server, writer, tokens)
    keys = [line["key"] for line in witness.lines("writer") if line["what"] == "saved" and line["key"] not in known]
    assert len(keys) == N // BLOCK
    hole = 9
    with open_backend(server.url, Settings()) as backend:
        backend.use_keyspace(
            KeySpace("other", "w", "c", "bfloat16", "a", 64, 1, BLOCK)  # deletion goes by key
        )
        key = np.frombuffer(bytes.fromhex(keys[hole]), dtype=np.uint8).reshape(1, 16)
        assert backend.delete(key, timeout=5) == 1
    before = reader.generate(prompt(text, 1, N + 7), id="before", max_tokens=1)
    answer = reader.generate(tokens)
    assert loaded(answer) == hole * BLOCK
    new = {reason: n - misses(before).get(reason, 0) for reason, n in misses(answer).items()}
    # The lookup is about every block but the last, whose last token is computed in any case.
    assert {r: n for r, n in new.items() if n} == {"not_there": 1, "behind_hole": N // BLOCK - 1 - hole - 1}
    assert_as_from_own_cache(plain, tokens, answer)
    assert witness.wrong("reader") == []
    assert_every_block_accounted(answer)


def test_an_altered_block_is_seen(
    server: Server, writer: EngineProcess, start_engine: Callable[..., EngineProcess], text: list[int], witness: Witness
) -> None:
    """The check can fail: one byte altered in L1 before the load, and the witness says which block."""
    tokens = prompt(text, 4)
    altering = start_engine("altering", env={"WITNESS_ALTER": "1"}, settings={"l1_bytes": "128MiB"}, num_blocks=400)
    altering.generate(tokens, max_tokens=4)
    assert altering.ask("reset", connector=False)["reset"]
    answer = altering.generate(tokens, max_tokens=4)
    assert loaded(answer) == N - BLOCK
    assert len(witness.wrong("altering")) == 1
    altering.close()


def test_a_byte_altered_in_the_pool_is_a_miss_and_the_block_is_stored_again(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 5)
    known = len(witness.lines("writer"))
    store(server, writer, tokens)
    saved = [line for line in witness.lines("writer")[known:] if line["what"] == "saved"]
    assert len(saved) == N // BLOCK
    bad = 9
    alter(server.pid, bytes.fromhex(saved[bad]["tail"]))
    stored, before = server.stats(), counters(reader)
    answer = reader.generate(tokens)
    assert loaded(answer) == bad * BLOCK
    assert new_misses(before, answer) == {"checksum": 1, "behind_hole": N_LOOKED_UP - bad - 1}
    assert_as_from_own_cache(plain, tokens, answer)
    assert witness.wrong("reader") == []
    assert_every_block_accounted(answer)
    n_bytes = stored["written_bytes"] + KV_BYTES
    eventually("the reader has stored what it computed", lambda: server.stats()["written_bytes"] == n_bytes)
    assert server.stats()["blocks"] == stored["blocks"]


def test_a_request_aborted_in_the_middle_of_its_fetch(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    """The fetch goes on without it, into slots that nobody else gets meanwhile."""
    tokens = prompt(text, 6)
    store(server, writer, tokens)
    before = counters(reader)
    with stopped_during("get", reader, tokens, server, witness):
        during = counters(reader)
        assert during["jobs"] == 1
        assert during["waiting_slots"] == N_LOOKED_UP
        reader.ask("abort", id="held")
        aborted = counters(reader)
        assert aborted["jobs"] == 1
        assert aborted["waiting_slots"] == 0
        assert more(before, aborted, "l2_fetched_blocks") == 0
    answer = reader.generate(tokens)
    assert loaded(answer) == N_LOOKED_UP * BLOCK
    assert_as_from_own_cache(plain, tokens, answer)
    assert witness.wrong("reader") == []
    after = counters(reader)
    assert more(before, after, "l2_fetch_asked_blocks") == N_LOOKED_UP  # not fetched a second time
    assert more(before, after, "l2_fetched_blocks") == N_LOOKED_UP
    assert (after["zombies"], after["waiting_slots"], after["jobs"]) == (0, 0, 0)


@contextmanager
def stopped_during(
    what: str, engine: EngineProcess, tokens: list[int], server: Server, witness: Witness
) -> Iterator[None]:
    """The server stands still while the `get` or `put` that comes of the request "held" is under way."""
    file = witness.hold(engine.name, what, server.pid)
    engine.ask("add", id="held", tokens=tokens, max_tokens=N_FEW)
    try:
        eventually(f"a {what} has begun", lambda: not file.exists())
        eventually("the server stands", lambda: psutil.Process(server.pid).status() == psutil.STATUS_STOPPED)
        yield
    finally:
        file.unlink(missing_ok=True)
        server.signal(signal.SIGCONT)  # where it lives


def retry(engine: EngineProcess, tokens: list[int]) -> dict[str, Any] | None:
    """Answer with an empty prefix cache; None while nothing is loaded (the breaker is open)."""
    engine.ask("reset", connector=False)
    answer = engine.generate(tokens, max_tokens=N_FEW)
    return answer if loaded(answer) else None


def test_an_engine_answers_before_its_pool_is_complete(
    server: Server, start_engine: Callable[..., EngineProcess], tmp_path: Path, witness: Witness
) -> None:
    """The first slab is enough to serve and to save; the others count when they come."""
    go_on = tmp_path / "go-on"
    tokens = [5 + i % 400 for i in range(N)]
    others = [500, *tokens[1:]]
    engine = start_engine(
        "growing",
        model=MODELS / "tiny",
        env={"WITNESS_HOLD": str(go_on)},
        settings={"l1_bytes": "640MiB", "l2": server.url, "namespace": "growing"},
        num_blocks=100,
    )
    stats = store(server, engine, tokens, max_tokens=4)["kvrdma"]["kvrdma.stats"]
    assert 0 < stats["l1_ready_blocks"] < stats["l1_capacity_blocks"]
    go_on.touch()

    def grown() -> bool:
        now = engine.generate(tokens[:BLOCK], max_tokens=1)["kvrdma"]["kvrdma.stats"]
        return bool(now["l1_ready_blocks"] == now["l1_capacity_blocks"] == stats["l1_capacity_blocks"])

    eventually("the whole pool", grown)
    store(server, engine, others, max_tokens=4)
    witness.end(engine)


def test_two_fine_tunes_under_one_name_and_path(
    server: Server,
    start_engine: Callable[..., EngineProcess],
    reader: EngineProcess,
    tmp_path: Path,
    witness: Witness,
    text: list[int],
) -> None:
    """The folder is the same, the config is the same, the weights are not: no cross hits. Nor with other models."""
    model = tmp_path / "model"
    tokens = [token % 500 for token in prompt(text, 7)]
    shutil.copytree(MODELS / "tiny", model)
    settings = {"l1_bytes": "64MiB", "l2": server.url}
    base = start_engine("tiny", model=model, settings=settings, num_blocks=100)
    base.wait_ready()
    store(server, base, tokens, max_tokens=8)
    witness.end(base)
    for file in model.iterdir():
        file.unlink()
    shutil.copytree(MODELS / "tiny-tuned", model, dirs_exist_ok=True)
    tuned = start_engine("tuned", model=model, settings=settings, num_blocks=100)
    answer = tuned.generate(tokens, max_tokens=8)
    assert loaded(answer) == 0
    assert set(misses(answer)) == {"other_keyspace"}  # and it says why
    assert server.stats()["keyspaces"] >= 2
    tuned.close()
    before = counters(reader)
    answer = reader.generate(tokens, max_tokens=8)  # another model altogether, asking for the same tokens
    assert loaded(answer) == 0
    assert new_misses(before, answer) == {"not_there": N_LOOKED_UP}
    shutil.rmtree(model)
    shutil.copytree(MODELS / "tiny", model)
    again = start_engine("tiny-again", model=model, settings=settings, num_blocks=100)
    answer = again.generate(tokens, max_tokens=8)
    assert loaded(answer) == N - BLOCK  # the first one's blocks are still there, beside two other models'
    assert witness.wrong("tiny-again") == []
    again.close()


def test_an_engine_started_before_the_server_and_turned_away_by_another(
    start_engine: Callable[..., EngineProcess], text: list[int], witness: Witness
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"l1_bytes": "64MiB", "l2": f"kvrdma://127.0.0.1:{port}"}
    early = start_engine("early", model=MODELS / "tiny", settings=settings, num_blocks=100)
    tokens = [token % 500 for token in prompt(text, 8)]
    answer = early.generate(tokens, max_tokens=8)
    assert loaded(answer) == 0
    assert misses(answer) == {"tier_down": N_LOOKED_UP}
    assert_every_block_accounted(answer)
    local = early.generate(tokens, max_tokens=8)
    early.ask("reset", connector=False)
    again = early.generate(tokens, max_tokens=8)
    assert loaded(again) == N_LOOKED_UP * BLOCK  # from L1, that needs no server
    assert again["tokens"] == local["tokens"]
    numbers = itertools.count(100)
    with Server(port=port, env={"KVRDMA_TOKEN": "a-token-that-the-engine-has-not"}):

        def refused() -> bool:
            other = early.generate([token % 500 for token in prompt(text, next(numbers))], id="probe", max_tokens=2)
            assert (loaded(other), len(other["tokens"])) == (0, 2)
            assert set(misses(other)) == {"tier_down"}
            return "it wants a token" in early.log()

        eventually("it is told that the server wants a token", refused, timeout=60)
    with Server(port=port) as server:

        def stores() -> bool:
            early.generate([token % 500 for token in prompt(text, next(numbers))], id="probe", max_tokens=1)
            return server.stats()["blocks"] > 0

        eventually("it stores what it computes", stores, timeout=60)
    assert witness.wrong("early") == []
    early.close()


def assert_used_again(
    pool: Pool,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
    *,
    first: int,
) -> None:
    """The writer stores new prompts and the reader loads them, once the breakers have closed.

    What was computed while the pool was away is in L1 alone.
    """
    numbers = itertools.count(first)

    def used() -> tuple[list[int], dict[str, Any]] | None:
        tokens = prompt(text, next(numbers))
        known = pool.server.stats()["blocks"]
        writer.generate(tokens, id="probe", max_tokens=1)
        deadline = time.monotonic() + 1
        while pool.server.stats()["blocks"] < known + N // BLOCK:
            if time.monotonic() > deadline:
                return None
        answer = retry(reader, tokens)
        return None if answer is None else (tokens, answer)

    tokens, answer = eventually("the pool is used again", used, timeout=90)
    assert_as_from_own_cache(plain, tokens, answer)
    assert witness.wrong("reader") == []
    assert_every_block_accounted(answer)


def test_a_server_killed_in_the_middle_of_a_fetch(
    pool: Pool,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 9)
    store(pool.server, writer, tokens)
    before = counters(reader)
    with stopped_during("get", reader, tokens, pool.server, witness):
        pool.server.signal(signal.SIGKILL)
        answer = reader.ask("wait", id="held")
    assert loaded(answer) == 0
    assert new_misses(before, answer) == {"tier_down": N_LOOKED_UP}
    after = counters(reader)
    assert more(before, after, "l2_fetch_asked_blocks") == N_LOOKED_UP
    assert more(before, after, "l2_fetched_blocks") == 0
    assert after["zombies"] == 0
    assert_as_from_own_cache(plain, tokens, answer)
    pool.restart()
    assert_used_again(pool, writer, reader, plain, text, witness, first=200)


def test_a_server_killed_in_the_middle_of_a_put(
    pool: Pool,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 10)
    before = counters(writer)
    with stopped_during("put", writer, tokens, pool.server, witness):
        pool.server.signal(signal.SIGKILL)
        answer = writer.ask("wait", id="held")
    assert_as_from_own_cache(plain, tokens, answer)
    eventually(
        "the put has failed",
        lambda: more(before, counters(writer), "l2_put_failed_blocks") == N // BLOCK,
    )
    again = retry(writer, tokens)  # the slots were let go whole
    assert again is not None
    assert loaded(again) == N_LOOKED_UP * BLOCK
    assert_as_from_own_cache(plain, tokens, again)
    assert witness.wrong("writer") == []
    pool.restart()
    assert_used_again(pool, writer, reader, plain, text, witness, first=300)


def test_a_server_stopped_for_longer_than_any_deadline(
    pool: Pool,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 11)
    store(pool.server, writer, tokens)
    before = counters(reader)
    with stopped_during("get", reader, tokens, pool.server, witness):
        answer = reader.ask("wait", id="held")
        assert loaded(answer) == 0
        assert sum(new_misses(before, answer).values()) == N_LOOKED_UP
        assert set(new_misses(before, answer)) <= {"tier_down", "not_yet"}
        assert_as_from_own_cache(plain, tokens, answer)
        other = prompt(text, 12)
        before = counters(reader)
        answer = reader.generate(other, id="meanwhile", max_tokens=N_FEW)
        assert set(new_misses(before, answer)) <= {"tier_down", "not_yet"}
        assert_as_from_own_cache(plain, other, answer)
        assert_as_from_own_cache(plain, other, writer.generate(other, id="meanwhile", max_tokens=N_FEW))
    assert_used_again(pool, writer, reader, plain, text, witness, first=400)
