"""The main job on real vLLM: what one engine computed, another loads, and answers the same."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import BLOCK, MODELS, Witness, eventually
from processes import EngineProcess, Server

from kvrdma.backends import open_backend
from kvrdma.keys import KeySpace
from kvrdma.settings import Settings

N = 20 * BLOCK  # tokens of a prompt here


def prompt(text: list[int], number: int, n: int = N) -> list[int]:
    """A prompt that shares no block with those of other numbers."""
    return [text[0], 1000 + number, *text[1 : n - 1]]


def loaded(answer: dict[str, Any]) -> int:
    return answer["kvrdma"]["kvrdma.loaded_tokens"]


def misses(answer: dict[str, Any]) -> dict[str, int]:
    return answer["kvrdma"]["kvrdma.stats"]["misses"]


def assert_every_block_accounted(answer: dict[str, Any]) -> None:
    stats = answer["kvrdma"]["kvrdma.stats"]
    assert stats["looked_up_blocks"] == stats.get("served_blocks", 0) + sum(stats["misses"].values())


def store(server: Server, engine: EngineProcess, tokens: list[int], **more: Any) -> dict[str, Any]:
    """Compute a prompt, and wait until the pool has it."""
    before = server.stats()["blocks"]
    answer = engine.generate(tokens, **more)
    eventually("offloaded", lambda: server.stats()["blocks"] >= before + len(tokens) // BLOCK)
    return answer


def assert_as_from_own_cache(plain: EngineProcess, tokens: list[int], answer: dict[str, Any]) -> None:
    """The answer is the one that vLLM without kvrdma gives with as many tokens from its own prefix cache."""
    n_cached = answer["cached_tokens"]
    plain.ask("reset")
    if n_cached:
        plain.generate(tokens[: n_cached + 1], id="prefix", max_tokens=1)
    reference = plain.generate(tokens, id="reference", max_tokens=len(answer["tokens"]))
    assert reference["cached_tokens"] == n_cached
    assert answer["tokens"] == reference["tokens"]


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


def test_a_request_aborted_while_its_blocks_are_fetched(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    tokens = prompt(text, 5)
    store(server, writer, tokens)
    reads = server.stats()["get_blocks"]
    server.signal(signal.SIGSTOP)  # the fetch cannot end
    try:
        reader.ask("add", id="aborted", tokens=tokens)
        assert reader.ask("step", seconds=0.3, until="aborted") == {}
        reader.ask("abort", id="aborted")
        other = reader.generate(text[500:700], id="other", max_tokens=4)  # the engine answers on
        assert len(other["tokens"]) == 4
    finally:
        server.signal(signal.SIGCONT)
    assert server.stats()["get_blocks"] >= reads
    answer = eventually("the pool answers again", lambda: retry(reader, tokens), timeout=60)
    assert_as_from_own_cache(plain, tokens, answer)
    assert witness.wrong("reader") == []
    stats = answer["kvrdma"]["kvrdma.stats"]
    assert (stats["zombies"], stats["waiting_slots"]) == (0, 0)


def retry(engine: EngineProcess, tokens: list[int]) -> dict[str, Any] | None:
    """Answer with an empty prefix cache; None while nothing is loaded (the breaker is open)."""
    engine.ask("reset", connector=False)
    answer = engine.generate(tokens)
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
    engine.close()
    assert witness.shut_down("growing") == {"scheduler", "worker"}


def test_two_fine_tunes_under_one_name_and_path(
    server: Server, start_engine: Callable[..., EngineProcess], tmp_path: Path, witness: Witness, text: list[int]
) -> None:
    """The folder is the same, the config is the same, the weights are not: no cross hits. Nor with other models."""
    model = tmp_path / "model"
    tokens = [token % 500 for token in prompt(text, 6)]
    shutil.copytree(MODELS / "tiny", model)
    settings = {"l1_bytes": "64MiB", "l2": server.url}
    base = start_engine("tiny", model=model, settings=settings, num_blocks=100)
    base.wait_ready()
    store(server, base, tokens, max_tokens=8)
    base.close()
    assert witness.shut_down("tiny") == {"scheduler", "worker"}  # an engine that ends lets the connector end
    for file in model.iterdir():
        file.unlink()
    shutil.copytree(MODELS / "tiny-tuned", model, dirs_exist_ok=True)
    tuned = start_engine("tuned", model=model, settings=settings, num_blocks=100)
    answer = tuned.generate(tokens, max_tokens=8)
    assert loaded(answer) == 0
    assert set(misses(answer)) == {"other_keyspace"}  # and it says why
    assert server.stats()["keyspaces"] >= 2
    tuned.close()
    shutil.rmtree(model)
    shutil.copytree(MODELS / "tiny", model)
    again = start_engine("tiny-again", model=model, settings=settings, num_blocks=100)
    answer = again.generate(tokens, max_tokens=8)
    assert loaded(answer) == N - BLOCK  # the first one's blocks are still there, beside two other models'
    assert witness.wrong("tiny-again") == []
    again.close()


def test_server_killed_and_restarted(
    server: Server,
    writer: EngineProcess,
    reader: EngineProcess,
    plain: EngineProcess,
    text: list[int],
    witness: Witness,
) -> None:
    """The last one here: it ends the server that the others share."""
    tokens = prompt(text, 7)
    port = server.port
    store(server, writer, tokens)
    server.signal(signal.SIGSTOP)
    reader.ask("add", id="mid-run", tokens=tokens)
    assert reader.ask("step", seconds=0.2, until="mid-run") == {}
    os.kill(server.pid, signal.SIGKILL)
    answer = reader.ask("wait", id="mid-run")
    assert loaded(answer) == 0
    assert "tier_down" in misses(answer) or "not_yet" in misses(answer)
    assert_as_from_own_cache(plain, tokens, answer)
    new = prompt(text, 8)
    assert len(writer.generate(new, id="while-down", max_tokens=4)["tokens"]) == 4
    server.close()
    with Server(capacity="1GiB", port=port) as restarted:

        def stored_again() -> bool:
            # What was computed while the pool was away is in L1 alone; new prompts are stored again.
            stored_again.number += 1
            writer.generate(prompt(text, 100 + stored_again.number), id="probe", max_tokens=1)
            return restarted.stats()["blocks"] > 0

        stored_again.number = 0
        eventually("the writer stores again", stored_again, timeout=60)
        last = prompt(text, 100 + stored_again.number)
        eventually("all of it", lambda: restarted.stats()["blocks"] >= N // BLOCK)
        answer = eventually("the reader loads again", lambda: retry(reader, last), timeout=60)
        assert_as_from_own_cache(plain, last, answer)
        assert witness.wrong("reader") == []
        assert_every_block_accounted(answer)
