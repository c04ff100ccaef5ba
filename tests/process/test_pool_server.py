"""A real pool server in a process of its own, with clients that behave, that die, and that do not behave."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from serving import SPACE, Client, Program, Server, eventually

from kvrdma.backends import GetStatus, PutStatus


def test_blocks_of_one_process_come_back_in_another(server: Server, client: Client) -> None:
    writer = f"""
import sys
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
from serving import Client
with Client({server.url!r}) as client:
    status = client.put().result()
    print("stored", int(status.sum()), file=sys.stderr)
"""
    with Program("-c", writer) as other:
        assert other.says("stored ") == "8"
        assert other.ended() == 0
    assert client.found() == [True] * 8
    assert client.get().result().all()
    assert all(client.came(row) for row in range(8))


def test_what_is_there_already_is_not_moved_again(client: Client) -> None:
    assert client.put(slice(0, 4)).result().all()
    put = client.put()
    assert put.result().all()
    assert put.status.tolist() == [PutStatus.EXISTS] * 4 + [PutStatus.STORED] * 4


def test_a_miss_is_a_miss_in_its_place(client: Client) -> None:
    assert client.put(slice(0, 2)).result().all()
    assert client.put(slice(5, 8)).result().all()
    get = client.get()
    assert get.result().tolist() == [True] * 2 + [False] * 3 + [True] * 3
    assert get.error is None
    assert get.status.tolist() == [GetStatus.OK] * 2 + [GetStatus.MISSING] * 3 + [GetStatus.OK] * 3
    assert [client.came(row) for row in range(8)] == get.ok.tolist()


def test_a_server_killed_and_started_again_on_the_same_port(server: Server, client: Client) -> None:
    assert client.put().result().all()
    server.signal(signal.SIGKILL)
    server.ended()
    get = client.get()
    assert not get.result().any()
    assert get.error is not None
    with Server(port=server.port):
        eventually(client.usable)
        assert not client.get().result().any()
        assert client.put().result().all()
        client.clear()
        assert client.get().result().all()
        assert all(client.came(row) for row in range(8))
