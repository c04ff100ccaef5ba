"""The pool server: memory that many engines share."""

from kvrdma.server.app import PoolServer, ServerSettings

__all__ = ["PoolServer", "ServerSettings"]
