"""TCP: emulated one-sided READ and WRITE on registered regions, for hosts without RDMA."""

from kvrdma.transports.tcp.transport import TcpTransport, keep_alive

__all__ = ["TcpTransport", "keep_alive"]
