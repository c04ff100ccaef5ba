"""How long the fingerprint of a large model takes: a sparse file of 100 GiB and 1,000 tensors. Prints one JSON object.

    python benchmarks/fingerprint.py [--gib 100] [--tensors 1000]

The pages are holes, so the time is that of the calls and the hashing; a disk adds its reads of a page a tensor.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from pathlib import Path

from kvrdma.weights import fingerprint


def make_sparse_model(folder: Path, nbytes: int, n_tensors: int) -> Path:
    """A safetensors file whose tensors are holes."""
    size = nbytes // n_tensors
    header = json.dumps(
        {
            f"layer.{i}": {"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]}
            for i in range(n_tensors)
        }
    ).encode()
    file = folder / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(header)) + header)
        opened.truncate(8 + len(header) + n_tensors * size)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=int, default=100)
    parser.add_argument("--tensors", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = make_sparse_model(Path(folder), asked.gib << 30, asked.tensors)
        started = time.perf_counter()
        fingerprint(Path(folder))
        seconds = time.perf_counter() - started
        print(json.dumps({"nbytes": file.stat().st_size, "tensors": asked.tensors, "fingerprint_s": seconds}))


if __name__ == "__main__":
    main()
