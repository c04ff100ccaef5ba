"""The store in this process passes the suite."""

from typing import ClassVar

from kvrdma.backends import StorageBackend, open_backend
from kvrdma.settings import Settings
from kvrdma.testing.backends import StorageBackendSuite


class TestMemoryBackend(StorageBackendSuite):
    needs_registration: ClassVar[bool] = False
    capacity: ClassVar[int | None] = 64 << 20

    def make_backend(self) -> StorageBackend:
        return open_backend("memory://?capacity=64MiB", Settings())
