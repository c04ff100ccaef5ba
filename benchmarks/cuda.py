"""How fast the CUDA copier moves blocks, against one copy of as many contiguous bytes. Prints one JSON object.

    python benchmarks/cuda.py [--blocks 64] [--runs 7]

A block is one range a layer: its ranges are short where tensor parallelism is wide. `gather_ratio` and `scatter_ratio`
are the copier's bytes per second on the device over those of one cudaMemcpyAsync between the same kinds of memory,
medians of interleaved runs: with ranges put together on the device (`staged`), with each by itself in one batched
call (`by_range`), and in a call each, as on a driver without batches (`one_by_one`). `submit_ms` is what the thread
that queues a gather does; `compute_slowdown` is how much longer a matrix product takes beside gathers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvrdma.layout import BlockLayout, ByteRun
from kvrdma.memory import PinnedPool
from kvrdma.memory.cuda import CudaCopier, _Way, find_copies, load_driver
from kvrdma.memory.staging import Stage

SHAPES = {  # name: layers, bytes of a block in a layer; 16 tokens a block, bfloat16
    "8B, 8 KV heads": (32, 64 << 10),
    "70B, 1 KV head of 8 a rank": (80, 8 << 10),
    "70B, 8 KV heads": (80, 64 << 10),
    "8B, 64 tokens a block": (32, 256 << 10),
}


def seconds_of(copy: Callable[[], Any]) -> float:
    """What one contiguous copy takes on the device."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    copy()
    ended.record()
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1e3


def measure(layers: int, nbytes: int, n_blocks: int, n_runs: int) -> dict[str, Any]:
    """Medians for one shape of blocks, gathered and scattered in an order of their own."""
    caches = [torch.zeros(2 * n_blocks, nbytes, dtype=torch.uint8, device="cuda") for _ in range(layers)]
    runs = tuple(ByteRun(str(i), cache.data_ptr(), nbytes, nbytes) for i, cache in enumerate(caches))
    layout = BlockLayout(2 * n_blocks, runs, "cuda:0", caches)
    on_device = torch.zeros(n_blocks * layout.nbytes, dtype=torch.uint8, device="cuda")
    on_host = torch.zeros(n_blocks * layout.nbytes, dtype=torch.uint8, pin_memory=True)
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    draw = np.random.default_rng(0)
    blocks = draw.permutation(2 * n_blocks)[:n_blocks]
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    def product() -> None:
        for _ in range(4):
            torch.mm(matrix, matrix)

    with PinnedPool(layout.nbytes, n_blocks) as pool:
        copier = CudaCopier("cuda:0")
        copier.register(layout, pool)
        stages = {group_and_way: Stage(layout, "cuda:0") for group_and_way in [(0, way) for way in _Way]}
        batched = copier._queue_copies
        one_by_one = find_copies(SimpleNamespace(cuMemcpyAsync=load_driver().cuMemcpyAsync))
        slots = draw.permutation(n_blocks)
        for _ in range(n_runs + 1):  # the first warms up
            note("plain gather", seconds_of(lambda: on_host.copy_(on_device, non_blocking=True)))
            note("plain scatter", seconds_of(lambda: on_device.copy_(on_host, non_blocking=True)))
            note("product", seconds_of(product))
            for way, queue, its_stages in (
                ("staged", batched, stages),
                ("by_range", batched, {}),
                ("one_by_one", one_by_one, {}),
            ):
                copier._queue_copies, copier._stages = queue, its_stages
                for name, move in (("gather", copier.gather), ("scatter", copier.scatter)):
                    began = time.perf_counter()
                    copy = move(0, blocks, slots, after=copier.fence())
                    note(f"{way} submit {name}", time.perf_counter() - began)
                    copy.wait()
                    note(f"{way} {name}", copy.seconds)
                copies = [copier.gather(0, blocks, slots, after=copier.fence()) for _ in range(3)]
                note(f"{way} product", seconds_of(product))
                for copy in copies:
                    copy.wait()
        copier.close()
    median = {name: statistics.median(values[1:]) for name, values in samples.items()}
    total = n_blocks * layout.nbytes
    return {
        "range_nbytes": nbytes,
        "ranges": n_blocks * layers,
        "total_nbytes": total,
        "plain_gather_gbps": total / median["plain gather"] / 1e9,
        "plain_scatter_gbps": total / median["plain scatter"] / 1e9,
        **{
            way: {
                "gather_ratio": median["plain gather"] / median[f"{way} gather"],
                "scatter_ratio": median["plain scatter"] / median[f"{way} scatter"],
                "submit_ms": 1e3 * median[f"{way} submit gather"],
                "compute_slowdown": median[f"{way} product"] / median["product"],
            }
            for way in ("staged", "by_range", "one_by_one")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=64, help="blocks a copy")
    parser.add_argument("--runs", type=int, default=7)
    asked = parser.parse_args()
    found = {name: measure(*shape, asked.blocks, asked.runs) for name, shape in SHAPES.items()}
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": found}))


if __name__ == "__main__":
    main()
