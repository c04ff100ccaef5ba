"""A batch is what was checked when it was made, whatever its caller does with the arrays afterwards."""

from __future__ import annotations

import numpy as np

from kvrdma.memory import Memory
from kvrdma.transports import MemoryRegion, Opcode, RemoteRegion, TransferBatch


def test_columns_that_change_later_change_nothing() -> None:
    region = MemoryRegion(Memory.of(bytearray(64)), 1)
    zero, nbytes = np.zeros(1, dtype=np.int64), np.full(1, 64, dtype=np.int64)
    offsets = zero.copy()
    batch = TransferBatch(Opcode.READ, [region], [RemoteRegion("tcp", 64, b"")], zero, offsets, zero, offsets, nbytes)
    nbytes[0] = 4096
    offsets[0] = 1 << 40
    assert batch.nbytes.tolist() == [64]
    assert batch.local_offsets.tolist() == batch.remote_offsets.tolist() == [0]
