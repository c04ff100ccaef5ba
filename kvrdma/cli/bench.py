"""`kvrdma bench`: measure, as a table for people or one JSON object for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvrdma.bench.cache import CacheBench, CacheResult, run_cache_bench
from kvrdma.bench.transport import TransportBench, TransportResult, run_transport_bench
from kvrdma.cli.options import read_option
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
    """Move batches between two processes; beside it plain sockets (for shm: memcpy) move the same ones."""
    settings = TransportBench(
        transport=transport,
        nbytes_per_block=read_option("--size", size, parse_size),
        batch=batch,
        depth=depth,
        streams=streams,
        seconds=seconds,
    )
    with _progress(settings.n_steps) as on_step:
        result = run_transport_bench(settings, on_step=on_step)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _show_transport(result)


@app.command()
def cache(
    size: Annotated[str, typer.Option(help="Bytes a block, such as 256KiB.")] = "256KiB",
    batch: Annotated[int, typer.Option(help="Blocks acquired at once.")] = 64,
    working_set: Annotated[
        str, typer.Option(help="Bytes that the copies go through; more than the CPU's caches hold.")
    ] = "512MiB",
    pool: Annotated[str, typer.Option(help="Size of the pool whose start is timed; less where memory is.")] = "16GiB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Look up, hash, copy, and start a pool; the copies out of L1 beside memcpy's of the same bytes."""
    settings = CacheBench(
        nbytes_per_block=read_option("--size", size, parse_size),
        batch=batch,
        working_set=read_option("--working-set", working_set, parse_size),
        pool=read_option("--pool", pool, parse_size),
    )
    with _progress(settings.n_steps) as on_step:
        result = run_cache_bench(settings, on_step=on_step)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        _show_cache(result)


@contextmanager
def _progress(n_steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; gives what is to be told of each step."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=n_steps)
        yield lambda what: progress.update(task, advance=1, description=what)


def _show_cache(result: CacheResult) -> None:
    settings, figures = result.settings, result.figures
    table = Table(title=f"cache: {settings.batch} blocks of {settings.nbytes_per_block} bytes")
    table.add_column("")
    table.add_column("measured", justify="right")
    for what, value in (
        ("look up 1,000 keys in L1", f"{figures['lookup_1000_s'] * 1e3:.2f} ms"),
        ("hash 131,072 tokens", f"{figures['hash_131072_s'] * 1e3:.1f} ms"),
        ("  the longest slice of 0.9 ms", f"{figures['hash_longest_slice_s'] * 1e3:.2f} ms"),
        ("acquire from L1 into the caller's memory", f"{figures['acquire_bytes_per_s'] / 1e9:.2f} GB/s"),
        ("  over memcpy", f"{figures['acquire_ratio']:.2f}"),
        ("  over memcpy, no two blocks side by side", f"{figures['acquire_scattered_ratio']:.2f}"),
        ("CPU tensors to slots, consecutive", f"{figures['gather_consecutive_bytes_per_s'] / 1e9:.2f} GB/s"),
        ("  neither consecutive", f"{figures['gather_scattered_bytes_per_s'] / 1e9:.2f} GB/s"),
        (f"pool of {figures['pool_nbytes'] / 2**30:.2f} GiB, first slot", f"{figures['pool_ready_s']:.2f} s"),
    ):
        table.add_row(what, value)
    Console().print(table)


def _show_transport(result: TransportResult) -> None:
    settings = result.settings
    table = Table(
        title=f"{settings.transport}: {settings.batch} blocks of {settings.nbytes_per_block} bytes, "
        f"depth {settings.depth}, {settings.streams} stream(s)"
    )
    for name in ("", "GB/s", settings.baseline, "ratio", "p50 ms", "p99 ms", "CPU s/GB", "its"):
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
