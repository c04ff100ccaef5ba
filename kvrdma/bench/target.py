"""The passive process of the transport benchmark: exports memory, and answers the baseline.

Speaks lines of JSON: one on stdout that says where it listens, then an answer to every line on stdin.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from typing import Any

from kvrdma.bench.plain import serve_plain
from kvrdma.memory import MemfdSlabs
from kvrdma.transports import Rights, Transport, transports
from kvrdma.transports.ucx.settings import lanes_here


def open_transport(scheme: str, streams: int) -> Transport:
    """Make a transport; `streams` matters to tcp alone. Without RDMA ucx runs over its emulation within the host."""
    cls = transports.get(scheme)
    options: dict[str, Any] = {}
    if scheme == "tcp":
        options["streams"] = streams
    elif scheme == "ucx":
        options["lanes"] = lanes_here()
    return cls(**options)


def main() -> None:
    """Serve until stdin ends."""
    settings = json.loads(sys.stdin.readline())
    size, offsets = settings["nbytes_per_block"], settings["offsets"]
    memory = MemfdSlabs().allocate(max(offsets) + size)
    view = memory.view()
    with open_transport(settings["transport"], settings["streams"]) as transport:
        region = transport.register(memory)
        exported = transport.export(region, Rights.READ | Rights.WRITE)
        listener = transport.listen("" if transport.same_host else "127.0.0.1:0")
        plain = socket.create_server(("127.0.0.1", 0))
        hello = {
            "address": listener.contact_address,
            "scheme": exported.scheme,
            "nbytes": exported.nbytes,
            "token": exported.token.hex(),
            "plain_port": plain.getsockname()[1],
        }
        print(json.dumps(hello), flush=True)
        sock, _ = plain.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        views = [view[offset : offset + size] for offset in offsets]
        server = threading.Thread(target=serve_plain, args=(sock, views), daemon=True)
        server.start()
        for _ in sys.stdin:
            print(json.dumps({"cpu_s": time.process_time()}), flush=True)
        plain.close()


if __name__ == "__main__":
    main()
