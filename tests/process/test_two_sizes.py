"""Two models with blocks of unequal size in one small pool, both with more blocks than it holds."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
from serving import PATIENCE_S, SPACE, Client, Server, eventually

from kvrdma.backends import PutStatus

# Of 32 MiB either would fill twice as much; a slab of 8 MiB holds 8 blocks of one and 2 of the other.
MODELS = (("small", 1 << 20, 64), ("large", 3 << 20, 20))
ROUNDS = 30


def client_of(server: Server, model: int) -> Client:
    name, nbytes, n = MODELS[model]
    return Client(server.url, n=n, nbytes=nbytes, space=replace(SPACE, model=name))


def slabs(server: Server) -> dict[int, int]:
    return {row["nbytes"]: row["slabs"] for row in server.stats()["by_size"]}


def test_a_model_gets_room_in_a_pool_that_another_has_filled() -> None:
    with Server(capacity="32MiB") as server, client_of(server, 0) as small, client_of(server, 1) as large:
        for one in (small, large, small):
            for first in range(0, one.n, 4):
                one.put(slice(first, first + 4)).result(PATIENCE_S)
            assert one.put(slice(0, 2)).result(PATIENCE_S).all()  # there, or stored: declined would be False
            one.clear()
            assert one.get(slice(0, 2)).result(PATIENCE_S).all()
            assert all(one.came(row) for row in range(2))
        stats = server.stats()
        assert stats["slabs"] == 4
        assert stats["moved_slabs"] >= 2
        assert stats["bytes"] <= stats["capacity_bytes"]


def test_two_models_under_pressure_both_make_progress_with_the_right_bytes() -> None:
    """Four clients, two a model, that put and get what they please at the same time."""

    def work(seed: int) -> tuple[int, int]:
        draw, model = random.Random(seed), seed % 2
        stored = came = 0
        with client_of(server, model) as client:
            together.wait(PATIENCE_S)
            for _ in range(ROUNDS):
                first = draw.randrange(client.n)
                rows = slice(first, min(client.n, first + draw.randrange(1, 5)))
                put = client.put(rows)
                put.result(PATIENCE_S)
                assert put.error is None
                stored += int((put.status == PutStatus.STORED).sum())
                client.clear()
                get = client.get(rows)
                ok = get.result(PATIENCE_S)
                assert get.error is None
                assert all(client.came(first + int(i)) for i in np.flatnonzero(ok))
                came += int(ok.sum())
        return stored, came

    together = Barrier(4)
    with Server(capacity="32MiB") as server:
        with ThreadPoolExecutor(4) as clients:
            results = list(clients.map(work, range(4)))
        for model in range(2):
            stored, came = (sum(column) for column in zip(*results[model::2], strict=True))
            # Each asks at once for what it has just put: of most of that it must have got something.
            assert stored >= ROUNDS / 2, results
            assert came >= ROUNDS / 2, results
        eventually(lambda: (server.stats()["pinned_blocks"], server.stats()["reserved_blocks"]) == (0, 0))
        stats = server.stats()
        assert (stats["put_checksum_failures"], stats.get("dropped_wrong", 0)) == (0, 0)
        assert stats["evicted_blocks"]
        assert stats["moved_slabs"]
        assert sum(slabs(server).values()) + stats["free_slabs"] == 4
        assert "Traceback" not in server.text
        for model in range(2):  # all of it can be had again, by either
            with client_of(server, model) as client:
                client.backend.delete(client.batch, timeout=PATIENCE_S)
        assert server.stats()["free_slabs"] == 4


@pytest.mark.parametrize("nbytes", [(8 << 20) + 1, 12 << 20])
def test_a_block_larger_than_a_slab_is_declined_and_harms_nobody(nbytes: int) -> None:
    with Server(capacity="32MiB") as server, client_of(server, 1) as large:
        assert large.put(slice(0, 4)).result(PATIENCE_S).all()
        with Client(server.url, n=1, nbytes=nbytes, space=replace(SPACE, model="huge")) as huge:
            put = huge.put()
            assert not put.result(PATIENCE_S).any()
            assert put.status.tolist() == [PutStatus.DECLINED]
        assert large.found()[:4] == [True] * 4
        assert server.stats()["declined_too_large"] == 1
