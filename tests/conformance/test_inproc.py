"""The transport within one process passes the suite."""

import threading
from typing import ClassVar

import pytest

from kvrdma.errors import ClosedError
from kvrdma.testing.transports import PATIENCE_S, Side, TransportSuite
from kvrdma.transports import Transfer, TransferBatch, Transport
from kvrdma.transports.inproc import InprocTransport


class TestInproc(TransportSuite):
    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = "nobody"

    def make_transport(self) -> Transport:
        return InprocTransport()

    def test_what_is_cancelled_before_it_begins_moves_nothing(
        self, sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        here, there = sides
        busy, go = threading.Event(), threading.Event()
        execute = here.endpoint._execute

        def wait_first(batch: TransferBatch, transfer: Transfer) -> None:
            busy.set()
            go.wait(PATIENCE_S)
            execute(batch, transfer)

        monkeypatch.setattr(here.endpoint, "_execute", wait_first)
        first = here.endpoint.post(self.read_all(here, there))
        assert busy.wait(PATIENCE_S)
        behind = here.endpoint.post(self.read_all(here, there))
        behind.cancel()
        go.set()
        assert first.result(PATIENCE_S).all()
        assert not behind.result(PATIENCE_S).any()
        assert isinstance(behind.error, ClosedError)
