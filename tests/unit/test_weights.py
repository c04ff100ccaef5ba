"""Fingerprints: by content, so that fine-tunes under one name and path are apart."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from kvrdma.errors import ConfigError
from kvrdma.weights import fingerprint


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    header, blob = {}, b""
    for tensor, values in tensors.items():
        raw = values.tobytes()
        header[tensor] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [len(blob), len(blob) + len(raw)],
        }
        blob += raw
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file = folder / name
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + blob)
    return file


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {f"layer.{i}": generator.random((300, 300), dtype=np.float32) for i in range(4)}


def test_the_same_content_elsewhere_is_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, tensors())
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a", full=True) == fingerprint(tmp_path / "b", full=True)


@pytest.mark.parametrize("tensor", [f"layer.{i}" for i in range(4)])
def test_one_tensor_retrained_is_another(tmp_path: Path, tensor: str) -> None:
    before = tensors()
    write(tmp_path, before)
    first = fingerprint(tmp_path)
    write(tmp_path, {**before, tensor: before[tensor] + 1})
    assert fingerprint(tmp_path) != first


def test_an_edit_outside_the_pages_is_seen_by_full_only(tmp_path: Path) -> None:
    before = tensors()
    write(tmp_path, before)
    sampled, full = fingerprint(tmp_path), fingerprint(tmp_path, full=True)
    edited = before["layer.0"].copy()
    edited[0, 0] += 1  # the page that is read lies in the middle
    write(tmp_path, {**before, "layer.0": edited})
    assert fingerprint(tmp_path) == sampled
    assert fingerprint(tmp_path, full=True) != full


@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
def test_a_page_of_every_tensor_of_a_hundred_gibibytes(tmp_path: Path, place: float) -> None:
    """Sparse, so that it can be made here: a tensor whose values have all changed is seen, wherever it lies."""
    n, size = 1000, (100 << 30) // 1000
    header = json.dumps(
        {f"t.{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]} for i in range(n)}
    ).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        opened.truncate(8 + len(header) + n * size)
    first = fingerprint(tmp_path)
    start = 8 + len(header) + int(place * (n - 1)) * size
    with file.open("r+b") as opened:  # what is written stands for the whole tensor: its middle, and a bit around
        opened.seek(start + size // 2 - 50_000)
        opened.write(b"x" * 100_000)
    assert fingerprint(tmp_path) != first


def test_a_file_replaced_under_one_name_is_read_anew(tmp_path: Path) -> None:
    file = write(tmp_path, tensors(1))
    first = fingerprint(tmp_path)
    time_before = file.stat().st_mtime_ns
    file.unlink()
    write(tmp_path, tensors(2))
    os.utime(file, ns=(time_before + 1, time_before + 1))
    assert fingerprint(tmp_path) != first


def test_a_name_that_is_a_digest_is_believed(tmp_path: Path) -> None:
    """As in a Hugging Face cache: snapshots link to blobs that are named by their sha256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"not even safetensors")
    (snapshot / "model.safetensors").symlink_to(blobs / ("ab" * 32))
    assert len(fingerprint(snapshot)) == 32


@pytest.mark.parametrize("raw", [b"", b"short", struct.pack("<Q", 1 << 60), struct.pack("<Q", 4) + b"null" + b"x" * 9])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ConfigError):
        fingerprint(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, tensors())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="cut short"):
        fingerprint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights"):
        fingerprint(tmp_path)
