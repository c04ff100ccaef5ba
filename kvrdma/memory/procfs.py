"""What the kernel says in the files of /proc and /sys."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from kvrdma.errors import CapacityError

ROOT: Final = Path("/")
"""Where /proc and /sys lie, unless a test says otherwise."""


def read_text(path: Path) -> str:
    """A file's text; empty where there is no such file, or none for us.

    Raises `CapacityError` where that is not to be known (out of descriptors, say): no limit may be overlooked.
    """
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
    except OSError as error:
        raise CapacityError(f"{path}: cannot be read: {error.strerror or error}") from error
