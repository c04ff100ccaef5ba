"""The ucx transport over soft-RoCE: the suite, and the device's packet counts as proof that the bytes took that way."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvrdma.testing.transports import PATIENCE_S, Side, TransportSuite, column, make_batch
from kvrdma.transports import Opcode, Transport
from kvrdma.transports.ucx import UcxTransport

MTU = 4096


def packets(device: str) -> int:
    """What a soft-RoCE device has received, in packets of at most `MTU` bytes of payload."""
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/rcvd_pkts").read_text())


class TestUcxOnOneDevice(TransportSuite):
    def make_transport(self) -> Transport:
        return UcxTransport(device="rxe0:1")

    def test_the_bytes_go_through_the_device(self, sides: tuple[Side, Side]) -> None:
        check_bytes_and_packets(*sides, "rxe0")


def check_bytes_and_packets(here: Side, there: Side, device: str) -> None:
    """Read and write all of a peer's memory; the device that receives counts as many packets as the bytes need."""
    size = len(here.array)
    for opcode in Opcode:
        before = packets(device)
        batch = make_batch(opcode, here.region, there.export, column(0), column(0), column(size))
        assert here.endpoint.post(batch).result(PATIENCE_S).all()
        assert packets(device) - before >= size // MTU
        np.testing.assert_array_equal(here.array, there.array)
        here.array[:] = 7
