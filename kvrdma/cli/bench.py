"""`kvrdma bench`: measure, as a table for people or one JSON object for programs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvrdma.bench.transport import TransportBench, TransportResult, run_transport_bench
from kvrdma.errors import ConfigError
from kvrdma.settings import parse_size

app = typer.Typer(help="Measure against a baseline in the same run.", no_args_is_help=True)


@app.callback()
def options() -> None:
    """Measure against a baseline in the same run."""


@app.command()
def transport(
    transport: Annotated[str, typer.Option(help="Transport to measure.")] = "tcp",
    size: Annotated[str, typer.Option(help="Bytes a block, such as 64KiB.")] = "64KiB",
    batch: Annotated[int, typer.Option(help="Blocks a batch.")] = 64,
    depth: Annotated[int, typer.Option(help="Batches under way at once.")] = 4,
    streams: Annotated[int, typer.Option(help="Connections (tcp).")] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds of measuring for each direction.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Move batches between two processes; beside it plain sockets moving the same batches at the same depth."""
    try:
        nbytes = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"--size {size!r}: must be {error}") from None
    settings = TransportBench(
        transport=transport, nbytes_per_block=nbytes, batch=batch, depth=depth, streams=streams, seconds=seconds
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=settings.n_steps)
        result = run_transport_bench(settings, on_step=lambda what: progress.update(task, advance=1, description=what))
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _show(result)


def _show(result: TransportResult) -> None:
    settings = result.settings
    table = Table(
        title=f"{settings.transport}: {settings.batch} blocks of {settings.nbytes_per_block} bytes, "
        f"depth {settings.depth}, {settings.streams} stream(s)"
    )
    for name in ("", "GB/s", "plain sockets", "ratio", "p50 ms", "p99 ms", "CPU s/GB", "plain"):
        table.add_column(name, justify="left" if not name else "right")
    figures = result.to_json()
    for way in ("write", "read"):
        ours, plain = figures[f"{way}_bytes_per_s"], figures[f"baseline_{way}_bytes_per_s"]
        table.add_row(
            way,
            f"{ours / 1e9:.2f}",
            f"{plain / 1e9:.2f}",
            f"{ours / plain:.2f}",
            f"{figures[f'{way}_p50_s'] * 1e3:.2f}",
            f"{figures[f'{way}_p99_s'] * 1e3:.2f}",
            f"{figures[f'{way}_cpu_s_per_gb']:.2f}",
            f"{figures['baseline_cpu_s_per_gb']:.2f}",
        )
    Console().print(table)
