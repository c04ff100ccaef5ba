"""UCX: one-sided get and put of libucp, over RDMA; over its own loopback lanes for tests."""

from kvrdma.transports.ucx.settings import Lanes
from kvrdma.transports.ucx.transport import UcxTransport

__all__ = ["Lanes", "UcxTransport"]
