"""What an engine of the tests answers, and what it says of its cache."""

from __future__ import annotations

from typing import Any

from processes import EngineProcess


def loaded(answer: dict[str, Any]) -> int:
    return answer["kvrdma"]["kvrdma.loaded_tokens"]


def misses(answer: dict[str, Any]) -> dict[str, int]:
    return answer["kvrdma"]["kvrdma.stats"]["misses"]


def assert_every_block_accounted(answer: dict[str, Any]) -> None:
    stats = answer["kvrdma"]["kvrdma.stats"]
    assert stats["looked_up_blocks"] == stats.get("served_blocks", 0) + sum(stats["misses"].values())


def assert_as_from_own_cache(plain: EngineProcess, tokens: list[int], answer: dict[str, Any]) -> None:
    """The answer is the one that vLLM without kvrdma gives with as many tokens from its own prefix cache."""
    n_cached = answer["cached_tokens"]
    plain.ask("reset")
    if n_cached:
        plain.generate(tokens[: n_cached + 1], id="prefix", max_tokens=1)
    reference = plain.generate(tokens, id="reference", max_tokens=len(answer["tokens"]))
    assert reference["cached_tokens"] == n_cached
    assert answer["tokens"] == reference["tokens"]


def counters(engine: EngineProcess) -> dict[str, Any]:
    """The connector's, by a prompt of less than a block: it is not looked up and not saved."""
    return engine.generate([1, 2, 3], id="counters", max_tokens=1)["kvrdma"]["kvrdma.stats"]


def more(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    return after.get(name, 0) - before.get(name, 0)


def new_misses(before: dict[str, Any], answer: dict[str, Any]) -> dict[str, int]:
    new = {reason: n - before["misses"].get(reason, 0) for reason, n in misses(answer).items()}
    return {reason: n for reason, n in new.items() if n}
