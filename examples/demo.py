"""The main job, shown: engine A computes a prompt's KV cache, engine B, a new process, loads it from the pool.

`make demo` runs this; `make demo BASELINE=1` also measures against vLLM without the connector. The last line
of stdout is one JSON object; any failure exits with 1 and says which step it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil
from processes import INTERRUPTS, EngineProcess, Process, ProcessError, Server
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
N_PROMPT_TOKENS = 1900
N_ANSWER_TOKENS = 64
BLOCK_TOKENS = 32  # as engine.py sets it
N_PAIRS = 7
PUT_TIMEOUT_S = 30.0

TARGETS = {"hook_cpu_share_decode": 0.02, "hook_cpu_share_miss": 0.05, "cold_overhead_ratio": 1.05}

progress = Console(stderr=True)
output = Console()


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


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """Of an engine's processes: what kvrdma took (hooks and threads: metered.py), and all of it."""

    kvrdma: float
    all: float

    def __sub__(self, before: CpuSeconds) -> CpuSeconds:
        return CpuSeconds(self.kvrdma - before.kvrdma, self.all - before.all)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request: seconds of the engine's steps, and CPU seconds."""

    steps_s: float
    cpu: CpuSeconds


class Measured:
    """An engine, and what its requests cost. With kvrdma: its pool, and where the metered connector listens."""

    def __init__(self, engine: EngineProcess, pool: Server | None = None, meters: Path | None = None) -> None:
        self.misses: list[Cost] = []
        self.decodes: list[Cost] = []
        self._engine = engine
        self._pool = pool
        self._meters = meters
        self._processes = [process := psutil.Process(engine.pid), *process.children(recursive=True)]

    def measure(self, prompt: list[int]) -> None:
        """A miss, and decoding.

        A miss is a whole one: its step, and all that is saved and offloaded behind it. Decoding is that of the
        same prompt again, which the engine has itself by then: nothing is saved in its steps.
        """
        stored = self._pool.stats()["blocks"] if self._pool is not None else 0
        start = self._cpu()
        answer = self._engine.generate(prompt, max_tokens=1)
        if answer["cached_tokens"]:
            raise StepError(f"a prompt that should have missed found {answer['cached_tokens']} tokens")
        if self._pool is not None:
            wait_for_pool(self._pool, stored + len(prompt) // BLOCK_TOKENS)
        between = self._cpu()
        self.misses.append(Cost(answer["ttft_s"], between - start))
        answer = self._engine.generate(prompt, max_tokens=N_ANSWER_TOKENS)
        self.decodes.append(Cost((N_ANSWER_TOKENS - 1) * answer["per_token_s"], self._cpu() - between))

    def _cpu(self) -> CpuSeconds:
        kvrdma = 0.0
        for address in self._meters.iterdir() if self._meters is not None else ():
            with Client(str(address), "AF_UNIX") as connection:
                kvrdma += sum(connection.recv().values())
        times = [process.cpu_times() for process in self._processes]
        return CpuSeconds(kvrdma, sum(time.user + time.system for time in times))


def overheads(ours: Measured, plain: Measured, prompt: list[int]) -> dict[str, float]:
    """With the connector and without, in turn, with new prompts."""
    for pair in range(N_PAIRS):
        fresh = [prompt[0], 1000 + pair, *prompt[1:-1]]  # the second token makes every block a new one
        for engine in (ours, plain) if pair % 2 else (plain, ours):
            engine.measure(fresh)

    def ratio(cost: Callable[[Cost], float], of: str) -> float:
        with_it, without = (statistics.median(map(cost, getattr(engine, of))) for engine in (ours, plain))
        return with_it / without

    figures = {}
    for what, costs in (("decode", ours.decodes), ("miss", ours.misses)):
        kvrdma_s = sum(cost.cpu.kvrdma for cost in costs)
        figures[f"hook_cpu_share_{what}"] = kvrdma_s / sum(cost.steps_s for cost in costs)
        figures[f"hook_cpu_ms_{what}"] = 1e3 * kvrdma_s / N_PAIRS
    figures["cold_overhead_ratio"] = ratio(lambda cost: cost.steps_s, "misses")
    figures["decode_overhead_ratio"] = ratio(lambda cost: cost.steps_s, "decodes")
    figures["cold_cpu_ratio"] = ratio(lambda cost: cost.cpu.all, "misses")
    figures["decode_cpu_ratio"] = ratio(lambda cost: cost.cpu.all, "decodes")
    return {name: round(value, 4) for name, value in figures.items()}


def run(*, baseline: bool) -> dict[str, Any]:
    with ExitStack() as stack:
        model = str(ROOT / ".models" / "smollm2")
        with step("start kvrdma serve"):
            server = stack.enter_context(Server())
        options: dict[str, Any] = {"model": model, "settings": {"l1_bytes": "512MiB", "l2": server.url}}
        with step("start engine A"):
            a = stack.enter_context(EngineProcess(name="engine-A", **options))
            prompt, other = prompts(a)
            a.generate(other, id="warm-up")
        with step("engine A answers cold, then from its own prefix cache"):
            cold = a.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="cold")
            local = a.generate(prompt, max_tokens=N_ANSWER_TOKENS, id="local")
        with step("the pool has every block of the prompt"):
            wait_for_pool(server, 2 * (len(prompt) // BLOCK_TOKENS))
            stored = server.stats()
            a.close()
        with step("start engine B, a new process"):
            if baseline:
                meters = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvrdma-")))
                options |= {"connector_class": "MeteredConnector", "connector_module": "metered"}
                paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
                options["env"] = {"METER_FOLDER": str(meters), "PYTHONPATH": os.pathsep.join(paths)}
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
                figures = overheads(Measured(b, server, meters), Measured(plain), prompt)
            show_overheads(figures)
            result |= figures
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
    output.print(table)


def interrupt(number: int, _: object) -> None:
    """End the demo, once: what follows must not keep it from ending what it started."""
    for other in INTERRUPTS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def show_overheads(figures: dict[str, float]) -> None:
    table = Table(title=f"with kvrdma and without, {N_PAIRS} pairs in turn")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("at most", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value}", f"{TARGETS[name]}" if name in TARGETS else "")
    output.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Show that a second engine reuses the first one's KV cache.")
    parser.add_argument("--baseline", action="store_true", help="also measure against vLLM without the connector")
    parser.add_argument("--json", action="store_true", help="nothing on stdout but the line of JSON")
    arguments = parser.parse_args()
    output.quiet = arguments.json
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
