"""One-sided READ and WRITE of RDMA devices, through libibverbs."""

from kvrdma.transports.verbs.transport import VerbsTransport

__all__ = ["VerbsTransport"]
