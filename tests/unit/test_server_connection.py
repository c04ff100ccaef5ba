"""A client's control connection: what it may let pile up."""

from __future__ import annotations

import asyncio
import socket

import pytest

from kvrdma.protocol import ErrorReply
from kvrdma.server import connection
from kvrdma.server.connection import Connection

IN_SOCKETS = 32 << 20  # more than the kernel takes for both ends


@pytest.mark.parametrize("reads", [False, True])
def test_a_client_that_reads_nothing_is_cut_off(reads: bool) -> None:
    """Once so much has piled up; one that reads is not, however much that is in all."""
    text = "x" * (1 << 20)
    limit = connection._MAX_UNSENT

    async def scenario() -> int:
        came: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        server = await asyncio.start_server(lambda *streams: came.put_nowait(streams), "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()) as sock:
            streams = await came.get()
            client, sent = Connection(*streams), 0
            loop = asyncio.get_running_loop()
            sock.setblocking(False)
            while not streams[1].is_closing() and sent < limit + 2 * IN_SOCKETS:
                client.send(ErrorReply(1, text))
                sent += len(text)
                for _ in range(16 if reads else 0):
                    await loop.sock_recv(sock, 1 << 16)
            await client.close()
        server.close()
        await server.wait_closed()
        return sent

    sent = asyncio.run(scenario())
    if reads:
        assert sent >= limit + 2 * IN_SOCKETS
    else:
        assert limit <= sent <= limit + IN_SOCKETS
