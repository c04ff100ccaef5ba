"""The command line: `kvrdma serve`, `kvrdma bench`."""

from kvrdma.cli.app import main

__all__ = ["main"]
