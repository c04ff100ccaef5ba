"""`OpenParts`: a transport's listeners and endpoints, which end with it."""

from __future__ import annotations

from typing import Generic, TypeVar

from kvrdma.errors import ClosedError
from kvrdma.transports.base import Endpoint, Listener, check_open

E = TypeVar("E", bound=Endpoint)
L = TypeVar("L", bound=Listener)


class OpenParts(Generic[E]):
    """What is open of a transport. A part that is added while another thread closes it is ended, and refused."""

    def __init__(self, scheme: str) -> None:
        self._what = f"{scheme} transport"
        self._endpoints: set[E] = set()
        self._listeners: list[Listener] = []
        self._closed = False

    def check(self) -> None:
        """Raise `ClosedError` where the transport is closed."""
        check_open(self._closed, self._what)

    def endpoints(self) -> list[E]:
        """Those that live."""
        return list(self._endpoints)

    def add_endpoint(self, endpoint: E) -> E:
        """Keep an endpoint until it ends; raises `ClosedError`."""
        self._endpoints.add(endpoint)
        endpoint.add_close_callback(lambda: self._endpoints.discard(endpoint))
        if self._closed:
            endpoint.abort()
            raise ClosedError(f"{self._what}: closed")
        return endpoint

    def add_listener(self, listener: L) -> L:
        """Keep a listener; raises `ClosedError`."""
        self._listeners.append(listener)
        if self._closed:
            listener.close()
            raise ClosedError(f"{self._what}: closed")
        return listener

    def close(self) -> bool:
        """Close every listener and abort every endpoint; False where that was done before."""
        if self._closed:
            return False
        self._closed = True
        for listener in self._listeners:
            listener.close()
        self.abort_endpoints()
        return True

    def abort_endpoints(self) -> None:
        """Abort those that live; again at the end of a close, for those of calls that were under way."""
        for endpoint in self.endpoints():
            endpoint.abort()
