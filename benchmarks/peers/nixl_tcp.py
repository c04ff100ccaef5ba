"""NIXL, its UCX backend held to TCP. It has no blocking wait: a caller polls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

os.environ |= {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}  # read when UCX is loaded

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config
from worker import TransportPeer, run


def open_agent(name: str, memory: np.ndarray) -> nixl_agent:
    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], mem_type="DRAM")
    return agent


class Nixl(TransportPeer):
    package = "nixl-cu12"
    depths = (1, 4)

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        self._array = np.ones(2 * nbytes * batch, dtype=np.uint8)
        self._agent = open_agent("initiator", self._array)
        hello = self.target.hello
        theirs = self._agent.add_remote_agent(bytes.fromhex(hello["metadata"]))
        self._mine = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._blocks(self._array.ctypes.data), "DRAM")
        self._theirs = self._agent.prep_xfer_dlist(theirs, self._blocks(hello["address"]), "DRAM")
        self._indices = np.arange(batch, dtype=np.int32)

    def _blocks(self, address: int) -> list[tuple[int, int, int]]:
        return [(address + at, self.nbytes, 0) for at in self.offsets.tolist()]

    def memory(self) -> np.ndarray:
        return self._array

    def prepare(self, way: str) -> Any:
        what = "WRITE" if way == "put" else "READ"
        return self._agent.make_prepped_xfer(what, self._mine, self._indices, self._theirs, self._indices)

    def post(self, way: str, prepared: Any) -> Any:
        if self._agent.transfer(prepared) == "ERR":
            raise RuntimeError("a batch was not taken")
        return prepared

    def finish(self, way: str, posted: Any) -> None:
        while (state := self._agent.check_xfer_state(posted)) == "PROC":
            time.sleep(0)
        if state != "DONE":
            raise RuntimeError(f"a batch failed: {state}")
        self._agent.release_xfer_handle(posted)


def target(nbytes: int) -> Iterator[dict[str, Any]]:
    memory = np.ones(nbytes, dtype=np.uint8)
    agent = open_agent("target", memory)
    yield {"metadata": agent.get_agent_metadata().hex(), "address": memory.ctypes.data}


if __name__ == "__main__":
    run(Nixl, target)
