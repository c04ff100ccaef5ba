"""The client of kvrdma's own pool server."""

from kvrdma.backends.pool.client import DEFAULT_PORT, PoolBackend, read_region

__all__ = ["DEFAULT_PORT", "PoolBackend", "read_region"]
