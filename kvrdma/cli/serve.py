"""`kvrdma serve`: run a pool server until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys
from typing import Annotated

import typer

from kvrdma.cli.options import read_option
from kvrdma.server import PoolServer, ServerSettings
from kvrdma.settings import find_token, host_and_port, parse_names, parse_size

logger = logging.getLogger(__name__)


def serve(
    host: Annotated[str, typer.Option(help="Address to bind; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 7700,
    capacity: Annotated[str, typer.Option(help="Memory for blocks, such as 64GiB.")] = "1GiB",
    policy: Annotated[str, typer.Option(help="Eviction policy.")] = "lru",
    transports: Annotated[str | None, typer.Option(help="Transports to offer, such as tcp; by default all.")] = None,
    token_file: Annotated[str, typer.Option(help="File with the token that clients prove; else KVRDMA_TOKEN.")] = "",
    data_port: Annotated[int, typer.Option(help="Port for the bytes; 0 picks a free one.")] = 0,
    metrics_port: Annotated[int | None, typer.Option(help="Port for Prometheus; 0 picks a free one.")] = None,
    max_clients: Annotated[int, typer.Option(help="Clients that are let in at most.")] = 1024,
) -> None:
    """Hold blocks for engines, in memory that they read and write through a transport."""
    settings = ServerSettings(
        host=host,
        port=port,
        capacity=read_option("--capacity", capacity, parse_size),
        policy=policy,
        transports=None if transports is None else parse_names(transports),
        token=find_token(token_file),
        data_port=data_port,
        metrics_port=metrics_port,
        max_clients=max_clients,
    )
    _raise_descriptor_limit(max_clients)
    asyncio.run(_serve(PoolServer(settings)))


def _raise_descriptor_limit(max_clients: int) -> None:
    """Ask for what the clients may need: two descriptors each, and some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * max_clients + 2048
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            logger.warning("%d descriptors are allowed, %d clients may need %d: ulimit -n", soft, max_clients, wanted)


async def _serve(server: PoolServer) -> None:
    await server.start()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host, port = server.address
    print(f"listening on {host_and_port(host, port)}", file=sys.stderr, flush=True)
    if server.metrics_port is not None:
        where = host_and_port(server.settings.host, server.metrics_port)
        print(f"metrics on http://{where}/metrics", file=sys.stderr, flush=True)
    await server.serve_until(stop)
