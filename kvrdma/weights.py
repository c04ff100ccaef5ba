"""A fingerprint of model weights by their content, so that two fine-tunes of one model never share a cache.

Headers and sizes are not enough: every fine-tune of one architecture shares them. Sampled, the fingerprint
reads one page in the middle of every tensor (offsets from the safetensors header), or takes the file's sha256
where its name is one (as in a Hugging Face cache); an edit outside the pages is seen by `full` only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kvrdma.errors import ConfigError

logger = logging.getLogger(__name__)

_PAGE_NBYTES: Final = 4096
_MAX_HEADER_NBYTES: Final = 128 << 20
_CHUNK: Final = 8 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WHOLE: Final = (".bin", ".pt", ".pth", ".gguf")  # no offsets to sample by: read whole

_cache: dict[tuple[int, int, int, int, bool], bytes] = {}


def fingerprint(folder: Path, *, full: bool = False, every_format: bool = False) -> str:
    """32 hex digits over the content of every weights file of a model's folder.

    With `every_format` files of other formats count beside safetensors, for loaders that read those.

    Raises:
        ConfigError: the folder holds no weights, or a file is not what its name says.
    """
    files = weight_files(folder, every_format=every_format)
    if not files:
        raise ConfigError(f"{folder}: no weights (*.safetensors, {', '.join(f'*{s}' for s in _WHOLE)}) to fingerprint")
    hasher = hashlib.blake2b(digest_size=16, person=b"kvrdma-weights")
    for file in files:
        hasher.update(_file_digest(file, full=full))
    return hasher.hexdigest()


def weight_files(folder: Path, *, every_format: bool = False) -> list[Path]:
    """The weights of a model: its safetensors files, or those of other formats where there are none."""
    others = tuple(f"*{suffix}" for suffix in _WHOLE)
    for patterns in (("*.safetensors", *others),) if every_format else (("*.safetensors",), others):
        files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
        if files:
            return files
    return []


def _file_digest(file: Path, *, full: bool) -> bytes:
    target = file.resolve()
    if not full and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return bytes.fromhex(target.name)
    with target.open("rb", buffering=0) as opened:
        about = os.fstat(opened.fileno())
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, full)
        if key not in _cache:
            sample = not full and target.suffix == ".safetensors"
            if not sample and not full:
                logger.warning("%s: read whole for its fingerprint; safetensors would need a page a tensor", target)
            fd = opened.fileno()
            ranges = _samples(fd, about.st_size, target) if sample else [(0, about.st_size)]
            _cache[key] = _digest(fd, ranges, about.st_size)
        return _cache[key]


def _samples(fd: int, size: int, file: Path) -> Iterable[tuple[int, int]]:
    """The header, and the page in the middle of each tensor: (offset, nbytes)."""
    raw = os.pread(fd, 8, 0)
    n = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
    if not 0 < n <= min(_MAX_HEADER_NBYTES, size - 8):
        raise ConfigError(f"{file}: not a safetensors file (its header claims {n} bytes)")
    try:
        header = json.loads(os.pread(fd, n, 8))
        spans = sorted(
            (int(tensor["data_offsets"][0]), int(tensor["data_offsets"][1]))
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{file}: its safetensors header cannot be read ({error})") from None
    yield 0, 8 + n
    for first, last in spans:
        if not 0 <= first <= last <= size - 8 - n:
            raise ConfigError(f"{file}: a tensor lies outside the file; it was cut short")
        nbytes = min(_PAGE_NBYTES, last - first)
        yield 8 + n + first + (last - first - nbytes) // 2, nbytes


def _digest(fd: int, ranges: Iterable[tuple[int, int]], size: int) -> bytes:
    hasher = hashlib.blake2b(digest_size=32)
    hasher.update(size.to_bytes(8, "little"))
    for offset, nbytes in ranges:
        at, end = offset, offset + nbytes
        while at < end:
            chunk = os.pread(fd, min(_CHUNK, end - at), at)
            if not chunk:
                raise ConfigError("a weights file became shorter while it was read")
            hasher.update(chunk)
            at += len(chunk)
    return hasher.digest()
