"""The cache without an engine: two managers in turn share one pool server.

Run it: python examples/manager.py
"""

import subprocess
import sys

import numpy as np

from kvrdma.keys import KeySpace
from kvrdma.manager import KVCacheManager
from kvrdma.settings import Settings

BLOCK_TOKENS, BLOCK_NBYTES = 16, 64 << 10
KEYSPACE = KeySpace(
    model="example",
    weights="none",
    config="none",
    kv_dtype="bfloat16",
    attention="none",
    head_size=64,
    layers=2,
    block_tokens=BLOCK_TOKENS,
)
PROMPT = list(range(20 * BLOCK_TOKENS))


def main() -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "kvrdma", "serve", "--port", "0", "--capacity", "64MiB"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = next(line.split()[-1] for line in server.stderr if line.startswith("listening on"))
        settings = Settings(l1_bytes=8 << 20, l2=f"kvrdma://{address}")
        content = np.random.default_rng(0).integers(0, 256, (20, BLOCK_NBYTES), dtype=np.uint8)

        with KVCacheManager(KEYSPACE, BLOCK_NBYTES, settings) as first, first.reserve(PROMPT) as reservation:
            for row, view in zip(reservation.rows, reservation.views, strict=True):
                view[:] = content[row]  # an engine would copy its KV here
            reservation.commit()
            first.flush()

        # Another engine, whose own cache is empty: every block comes from the pool.
        with KVCacheManager(KEYSPACE, BLOCK_NBYTES, settings) as second, second.acquire(PROMPT) as hit:
            target = np.empty((len(hit), BLOCK_NBYTES), dtype=np.uint8)
            hit.copy_into(target)
            print(f"{hit.n_tokens} of {len(PROMPT)} tokens came back, identical: {np.array_equal(target, content)}")
            print(f"fetched from L2: {second.stats()['l2_fetched_blocks']} blocks")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


if __name__ == "__main__":
    main()
