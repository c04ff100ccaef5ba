"""`kvrdma fingerprint FOLDER`: what names a model's weights in a key space."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from kvrdma.weights import fingerprint as fingerprint_of
from kvrdma.weights import weight_files


def fingerprint(
    folder: Annotated[Path, typer.Argument(help="A model's folder, with its *.safetensors.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte, as with fingerprint=full.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Show the fingerprint of a model's weights: engines share a cache only where theirs are equal."""
    started = time.perf_counter()
    value = fingerprint_of(folder, full=full)
    seconds = time.perf_counter() - started
    files = weight_files(folder)
    if as_json:
        nbytes = sum(file.stat().st_size for file in files)
        typer.echo(json.dumps({"fingerprint": value, "files": len(files), "nbytes": nbytes, "seconds": seconds}))
    else:
        typer.echo(value)
