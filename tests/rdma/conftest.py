"""Tests on RDMA devices. In the guest every one has to run: there, a device that is missing is an error, no skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
IN_GUEST = os.environ.get("KVRDMA_IN_GUEST") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.rdma)
            if not IN_GUEST:
                item.add_marker(pytest.mark.skip(reason="needs soft-RoCE devices: make test-rdma runs it in a guest"))
