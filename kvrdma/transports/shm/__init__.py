"""Shared memory: processes of one host map each other's slabs, and whoever posts copies, once.

A region's descriptor crosses a Unix socket when its key is first used, to a peer of our own user that proved
itself. A key that reads gives a descriptor that can only be mapped to be read. What the kernel cannot take
back, a mapping, is taken back by agreement: a page of live keys, which whoever copies reads before and after
(`keys`). docs/transports.md says what is enforced, and what is not.
"""

from kvrdma.transports.shm.transport import ShmTransport

__all__ = ["ShmTransport"]
