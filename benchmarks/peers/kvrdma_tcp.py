"""kvrdma's tcp transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from worker import TransportPeer, run

from kvrdma.memory import MemfdSlabs
from kvrdma.transports import Opcode, RemoteRegion, Rights, Transfer, TransferBatch
from kvrdma.transports.tcp import TcpTransport

TIMEOUT_S = 30.0


class Tcp(TransportPeer):
    package = "kvrdma"
    depths = (1, 4)

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        memory = MemfdSlabs().allocate(2 * nbytes * batch)
        self._array = memory.array()
        self._transport = TcpTransport()
        self._region = self._transport.register(memory)
        hello = self.target.hello
        self._remote = RemoteRegion(hello["scheme"], hello["nbytes"], bytes.fromhex(hello["token"]))
        self._endpoint = self._transport.connect(hello["address"], timeout=TIMEOUT_S)
        self._rows = np.zeros(batch, dtype=np.int64)
        self._sizes = np.full(batch, nbytes, dtype=np.int64)

    def memory(self) -> np.ndarray:
        return self._array

    def prepare(self, way: str) -> TransferBatch:
        opcode = Opcode.WRITE if way == "put" else Opcode.READ
        rows, offsets = self._rows, self.offsets
        return TransferBatch(opcode, [self._region], [self._remote], rows, offsets, rows, offsets, self._sizes)

    def post(self, way: str, prepared: TransferBatch) -> Transfer:
        return self._endpoint.post(prepared, timeout=TIMEOUT_S)

    def finish(self, way: str, posted: Transfer) -> None:
        if not posted.result(TIMEOUT_S).all():
            raise RuntimeError(f"a batch failed: {posted.error}")

    def close(self) -> None:
        self._endpoint.close()
        self._transport.close()
        super().close()


def target(nbytes: int) -> Iterator[dict[str, Any]]:
    with TcpTransport() as transport:
        region = transport.register(MemfdSlabs().allocate(nbytes))
        exported = transport.export(region, Rights.READ | Rights.WRITE)
        listener = transport.listen("127.0.0.1:0")
        yield {
            "address": listener.contact_address,
            "scheme": exported.scheme,
            "nbytes": exported.nbytes,
            "token": exported.token.hex(),
        }


if __name__ == "__main__":
    run(Tcp, target)
