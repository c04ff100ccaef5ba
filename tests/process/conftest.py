"""Every test in this folder starts processes of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Client, Server

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.process)


@pytest.fixture
def server() -> Iterator[Server]:
    """A pool server of 64 MiB."""
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    """A client of it with eight blocks of 64 KiB."""
    with Client(server.url) as client:
        yield client
