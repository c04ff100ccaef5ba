"""The main job, shown: engine A computes a prompt's KV cache, engine B, a new process, loads it from the pool.

`make demo` runs this; `make demo BASELINE=1` also measures against vLLM without the connector. The last line
of stdout is one JSON object; any failure exits with 1 and says which step it was.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from processes import INTERRUPTS, EngineProcess, Process, ProcessError, Server
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
N_PROMPT_TOKENS = 1900
N_ANSWER_TOKENS = 64
N_PAIRS = 7
PUT_TIMEOUT_S = 30.0

progress = Console(stderr=True)


class StepError(Exception):
    """A step of the demo did not do what it should."""


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        with progress.status(name):
            yield
    except (ProcessError, StepError, OSError, ValueError) as error:
        raise StepError(f"step '{name}': {error}") from error
    progress.print(f"[green]done[/green] {name} ({time.monotonic() - started:.1f} s)")


def prompts(engine: EngineProcess) -> tuple[list[int], list[int]]:
    """The prompt, real text, and another of the same length to warm up with."""
    text = (ROOT / "LICENSE").read_text()
    tokens = engine.ask("encode", text=f"Explain this licence to an engineer:\n\n{text}")["tokens"]
    words = " ".join(reversed(text.split()))
    other = engine.ask("encode", text=f"What is wrong with this text?\n\n{words}")["tokens"]
    if min(len(tokens), len(other)) < N_PROMPT_TOKENS:
        raise StepError(f"the prompts have only {len(tokens)} and {len(other)} tokens")
    return tokens[:N_PROMPT_TOKENS], other[:N_PROMPT_TOKENS]


def wait_for_pool(server: Server, n_blocks: int) -> None:
    """Until the pool has so many blocks: offloading goes on behind the answer."""
    deadline = time.monotonic() + PUT_TIMEOUT_S
    while (stored := server.stats().get("blocks", 0)) < n_blocks:
        if time.monotonic() > deadline:
            raise StepError(f"the pool has {stored} blocks after {PUT_TIMEOUT_S} s, {n_blocks} were expected")
        time.sleep(0.05)


def overheads(ours: EngineProcess, plain: EngineProcess, prompt: list[int]) -> dict[str, float]:
    """Misses and decoding, with the connector over without: medians of interleaved pairs of new prompts."""
    samples: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for pair in range(N_PAIRS):
        fresh = [prompt[0], 1000 + pair, *prompt[1:-1]]  # the second token makes every block a new one
        order = [("ours", ours), ("plain", plain)]
        for name, engine in order if pair % 2 else reversed(order):
            answer = engine.generate(fresh, max_tokens=N_ANSWER_TOKENS, id=f"{name}-{pair}")
            if answer["cached_tokens"]:
                raise StepError(f"a prompt that should have missed found {answer['cached_tokens']} tokens")
            samples[name].append(answer)
    median = {
        (name, key): statistics.median(answer[key] for answer in answers)
        for name, answers in samples.items()
        for key in ("ttft_s", "per_token_s")
    }
    return {
        "cold_overhead_ratio": round(median["ours", "ttft_s"] / median["plain", "ttft_s"], 4),
        "decode_overhead_ratio": round(median["ours", "per_token_s"] / median["plain", "per_token_s"], 4),
    }


def run(*, baseline: bool) -> dict[str, Any]:
    with ExitStack() as stack:
        model = str(ROOT / ".models" / "smollm2")
        with step("start kvrdma serve"):
            server = stack.enter_context(Server())
        options = {"model": model, "settings": {"l1_bytes": "512MiB", "l2": server.url}}
        with step("start engine A"):
            a = stack.enter_context(EngineProcess(name="engine-A", **options))
            prompt, other = prompts(a)
            a.generate(other, id="warm-up")
        with step("engine A answers cold, then from its own prefix cache"):
            cold = a.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="cold")
            local = a.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="local")
        with step("the pool has every block of the prompt"):
            block_tokens = 32
            wait_for_pool(server, 2 * (len(prompt) // block_tokens))
            stored = server.stats()
            a.close()
        with step("start engine B, a new process"):
            b = stack.enter_context(EngineProcess(name="engine-B", **options))
            b.generate(other, id="warm-up")
            before = server.stats()
        with step("engine B answers from the pool"):
            warm = b.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="warm")
            after = server.stats()
            if warm["kvrdma"]["kvrdma.loaded_tokens"] < 0.9 * len(prompt):
                raise StepError(f"only {warm['kvrdma']['kvrdma.loaded_tokens']} of {len(prompt)} tokens were loaded")
        with step("all tiers emptied, engine B computes again"):
            server.close()
            server = stack.enter_context(Server(port=server.port))  # a new pool, with nothing in it
            b.ask("reset", connector=True)
            emptied = b.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="emptied")
            if emptied["cached_tokens"] or emptied["kvrdma"]["kvrdma.loaded_tokens"]:
                raise StepError(f"{emptied['cached_tokens']} tokens came from a cache that should be empty")
        result: dict[str, Any] = {
            "identical_output": warm["tokens"] == local["tokens"],
            "same_as_cold": warm["tokens"] == cold["tokens"],
            "prompt_tokens": len(prompt),
            "hit_tokens": warm["kvrdma"]["kvrdma.loaded_tokens"],
            "ttft_cold_ms": round(1e3 * cold["ttft_s"], 1),
            "ttft_warm_ms": round(1e3 * warm["ttft_s"], 1),
            "tensor_parallel_size": 1,
            "ttft_local_ms": round(1e3 * local["ttft_s"], 1),
            "ttft_emptied_ms": round(1e3 * emptied["ttft_s"], 1),
            "emptied_hit_tokens": emptied["kvrdma"]["kvrdma.loaded_tokens"],
            "l1_to_engine_bytes": warm["kvrdma"]["kvrdma.loaded_bytes"],
            "pool_to_l1_bytes": after["read_bytes"] - before.get("read_bytes", 0),
        }
        show(cold, local, warm, emptied, result, stored)
        if baseline:
            with step("start an engine without the connector"):
                plain = stack.enter_context(EngineProcess(name="engine-plain", model=model, connector=False))
                plain.generate(other, id="warm-up")
            with step(f"misses and decoding against it, {N_PAIRS} pairs"):
                result |= overheads(b, plain, prompt)
        if not result["identical_output"]:
            print(json.dumps(result))
            raise StepError("engine B's answer is not the one that A gave from its own prefix cache")
        return result


def show(
    cold: dict[str, Any],
    local: dict[str, Any],
    warm: dict[str, Any],
    emptied: dict[str, Any],
    result: dict[str, Any],
    stored: dict[str, Any],
) -> None:
    table = Table(title=f"a prompt of {result['prompt_tokens']} tokens, {N_ANSWER_TOKENS} tokens answered")
    for name in ("engine", "answered from", "TTFT ms", "computed", "own cache", "loaded", "MB moved, by tier"):
        table.add_column(name, justify="left" if name in {"engine", "answered from"} else "right")
    moved = f"pool {result['pool_to_l1_bytes'] / 1e6:.1f}, L1 {result['l1_to_engine_bytes'] / 1e6:.1f}"
    rows = (
        ("A", "nothing (cold)", cold, f"to pool {stored['written_bytes'] / 1e6:.1f}*"),
        ("A", "its own prefix cache", local, ""),
        ("B", "the pool", warm, moved),
        ("B", "nothing (all emptied)", emptied, ""),
    )
    for engine, source, answer, bytes_moved in rows:
        loaded = answer["kvrdma"]["kvrdma.loaded_tokens"]
        table.add_row(
            engine,
            source,
            f"{1e3 * answer['ttft_s']:.1f}",
            str(answer["prompt_tokens"] - answer["cached_tokens"]),
            str(answer["cached_tokens"] - loaded),
            str(loaded),
            bytes_moved,
        )
    table.caption = "* with the warm-up's; it goes on behind the answer"
    Console().print(table)


def interrupt(number: int, _: object) -> None:
    """End the demo, once: what follows must not keep it from ending what it started."""
    for other in INTERRUPTS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show that a second engine reuses the first one's KV cache.")
    parser.add_argument("--baseline", action="store_true", help="also measure against vLLM without the connector")
    arguments = parser.parse_args()
    for number in INTERRUPTS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, interrupt)
    try:
        result = run(baseline=arguments.baseline)
    except StepError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupted:
        print("demo interrupted", file=sys.stderr)
        return 128 + interrupted.args[0]
    finally:
        Process.close_all()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
