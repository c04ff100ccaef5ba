"""`kvrdma stats URL`: what a store holds and has done."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from kvrdma.backends import open_backend
from kvrdma.cli.options import read_option
from kvrdma.metrics import quantile
from kvrdma.settings import Settings, parse_seconds

_TABLES: Final = ("by_size", "seconds", "misses")


def stats(
    url: Annotated[str, typer.Argument(help="The store, such as kvrdma://host:7700.")],
    token_file: Annotated[str, typer.Option(help="File with the pool's token; else KVRDMA_TOKEN.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show the counters of a store."""
    timeout = read_option("--timeout", timeout, parse_seconds)
    with open_backend(url, Settings(token_file=token_file, connect_timeout=timeout)) as backend:
        found = backend.stats(timeout=timeout)
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    overview = Table(title=url, show_header=False)
    for name, value in found.items():
        if name not in _TABLES:
            overview.add_row(name, _show(value))
    console.print(overview)
    if found.get("by_size"):
        sizes = Table(title="by size of block")
        for name in found["by_size"][0]:
            sizes.add_column(name, justify="right")
        for row in found["by_size"]:
            sizes.add_row(*(_show(value) for value in row.values()))
        console.print(sizes)
    if found.get("seconds"):
        durations = Table(title="durations")
        for name in ("", "count", "mean s", "p50 s <=", "p99 s <="):
            durations.add_column(name, justify="right" if name else "left")
        for name, seconds in found["seconds"].items():
            count = sum(seconds["counts"])
            cells = (seconds["sum"] / count, quantile(seconds["counts"], 0.5), quantile(seconds["counts"], 0.99))
            durations.add_row(name, f"{count:,}", *(f"{cell:.4g}" for cell in cells))
        console.print(durations)
    if found.get("misses"):
        reasons = Table("reason", "blocks", title="misses")
        for reason, n in found["misses"].items():
            reasons.add_row(reason, _show(n))
        console.print(reasons)


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_show(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
