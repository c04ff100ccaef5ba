"""The transport within one process passes the suite."""

from typing import ClassVar

from kvrdma.testing.transports import TransportSuite
from kvrdma.transports import Transport
from kvrdma.transports.inproc import InprocTransport


class TestInproc(TransportSuite):
    address: ClassVar[str] = ""
    nowhere: ClassVar[str] = "nobody"

    def make_transport(self) -> Transport:
        return InprocTransport()
