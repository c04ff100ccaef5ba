"""Mooncake Transfer Engine over TCP: its asynchronous batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ |= {"GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR"}  # else it logs every batch

import numpy as np
from mooncake.engine import TransferEngine
from worker import TransportPeer, run


def open_engine(memory: np.ndarray) -> TransferEngine:
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("initialize failed")
    if engine.register_memory(memory.ctypes.data, memory.nbytes) != 0:
        raise RuntimeError("register_memory failed")
    return engine


class Mooncake(TransportPeer):
    package = "mooncake-transfer-engine-non-cuda"
    depths = (1, 4)

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        self._array = np.ones(2 * nbytes * batch, dtype=np.uint8)
        self._engine = open_engine(self._array)
        self._peer = f"127.0.0.1:{self.target.hello['port']}"
        self._theirs = self.target.hello["address"]
        self._post = {"put": self._engine.batch_transfer_async_write, "get": self._engine.batch_transfer_async_read}

    def memory(self) -> np.ndarray:
        return self._array

    def prepare(self, way: str) -> tuple[list[int], list[int], list[int]]:
        mine = (self._array.ctypes.data + self.offsets).tolist()
        return mine, (self._theirs + self.offsets).tolist(), [self.nbytes] * self.batch

    def post(self, way: str, prepared: tuple[list[int], list[int], list[int]]) -> int:
        number: int = self._post[way](self._peer, *prepared)
        if number == 0:
            raise RuntimeError("a batch was not taken")
        return number

    def finish(self, way: str, posted: int) -> None:
        if self._engine.get_batch_transfer_status([posted]) != 0:  # it waits
            raise RuntimeError("a batch failed")


def target(nbytes: int) -> Iterator[dict[str, Any]]:
    memory = np.ones(nbytes, dtype=np.uint8)
    engine = open_engine(memory)
    yield {"port": engine.get_rpc_port(), "address": memory.ctypes.data}


if __name__ == "__main__":
    run(Mooncake, target)
