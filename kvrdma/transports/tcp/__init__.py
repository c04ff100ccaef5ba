"""TCP: emulated one-sided READ and WRITE on registered regions, for hosts without RDMA."""

from kvrdma.transports.tcp.session import keep_alive
from kvrdma.transports.tcp.transport import TcpTransport

__all__ = ["TcpTransport", "keep_alive"]
