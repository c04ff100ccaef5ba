"""`kvrdma`: the commands, and what their failures look like to a person and to a program."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

import kvrdma
from kvrdma.cli import bench, fingerprint, serve, stats
from kvrdma.errors import KVRDMAError

app = typer.Typer(
    name="kvrdma",
    help="Offloads the KV cache of LLM inference engines and brings it back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("stats")(stats.stats)
app.command("fingerprint")(fingerprint.fingerprint)
app.add_typer(bench.app, name="bench")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(kvrdma.__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more, to stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Offloads the KV cache of LLM inference engines and brings it back."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 unusable arguments, 130 interrupted."""
    try:
        app()
    except KVRDMAError as error:
        print(f"kvrdma: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
