"""Backends: L2 stores below the pinned cache, by the scheme of a URL. Open to third parties by entry points."""

from collections.abc import Callable

from kvrdma.backends.base import (
    GetStatus,
    GetTransfer,
    Lookup,
    PutStatus,
    PutTransfer,
    StorageBackend,
)
from kvrdma.plugins import Registry
from kvrdma.settings import Settings, Url

backends: Registry[Callable[[Url, Settings], StorageBackend]] = Registry("backend", "kvrdma.backends")


def open_backend(text: str, settings: Settings) -> StorageBackend:
    """Make the backend that a URL configures. No connection is made yet.

    Raises:
        ConfigError: an unknown scheme, option or a URL that cannot be meant.
    """
    url = Url.parse(text)
    return backends.get(url.scheme)(url, settings)


__all__ = [
    "GetStatus",
    "GetTransfer",
    "Lookup",
    "PutStatus",
    "PutTransfer",
    "StorageBackend",
    "backends",
    "open_backend",
]
