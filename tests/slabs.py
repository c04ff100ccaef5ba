"""The memory of a pool server, from outside."""

from __future__ import annotations

import mmap
import os
from pathlib import Path


def alter(pid: int, sample: bytes) -> None:
    """Flip a bit in the only place of a process's slabs where `sample` lies."""
    n_places = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            opened = os.readlink(fd)
        except FileNotFoundError:  # of a connection, which ended meanwhile
            continue
        if opened.startswith("/memfd:kvrdma-slab"):
            with fd.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                at = memory.find(sample)
                while at >= 0:
                    n_places += 1
                    memory[at] ^= 1
                    at = memory.find(sample, at + 1)
    assert n_places == 1, f"the sample lies in {n_places} places"
