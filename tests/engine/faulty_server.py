"""A pool server whose reads, of what a client puts over the transport "faulty", meet what a test orders (planned.py).

python faulty_server.py FILE CAPACITY LEASE_S
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from planned import add_faulty

from kvrdma.cli.serve import _serve
from kvrdma.server import PoolServer, ServerSettings

if __name__ == "__main__":
    add_faulty(Path(sys.argv[1]))
    settings = ServerSettings(
        port=0, capacity=int(sys.argv[2]), lease_s=float(sys.argv[3]), transports=("faulty", "tcp")
    )
    asyncio.run(_serve(PoolServer(settings)))
