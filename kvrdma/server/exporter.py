"""The pool server's counters for Prometheus, at `http://host:port/metrics`. They hold no key, address or token."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final
from wsgiref.simple_server import WSGIServer

from kvrdma.errors import ConfigError, TransportError
from kvrdma.metrics import SECONDS_BOUNDS

_STATS_TIMEOUT_S: Final = 5.0
_COUNTERS: Final = {
    # name: (what it is, label, {value of the label: name in the stats})
    "lookup_blocks": ("Blocks asked about.", "", {"": "lookup_blocks"}),
    "lookup_hit_blocks": ("Blocks asked about that were there.", "", {"": "lookup_hits"}),
    "get_blocks": ("Blocks that clients wanted to read.", "", {"": "get_blocks"}),
    "get_hit_blocks": ("Blocks that clients wanted to read and that were leased.", "", {"": "get_hits"}),
    "put_blocks": (
        "Blocks that clients brought, by what became of them.",
        "outcome",
        {
            "stored": "stored_blocks",
            "existing": "existing_blocks",
            "declined": "declined_blocks",
            "failed": "failed_blocks",
        },
    ),
    "bytes": (
        "Bytes leased to readers, and read from writers.",
        "direction",
        {"out": "read_bytes", "in": "written_bytes"},
    ),
    "evicted_blocks": ("Blocks evicted.", "", {"": "evicted_blocks"}),
    "moved_slabs": ("Slabs that one size of block took from another.", "", {"": "moved_slabs"}),
    "checksum_failures": (
        "Blocks whose bytes were not those of their checksum, by who found out.",
        "found_by",
        {"server": "put_checksum_failures", "client": "dropped_wrong"},
    ),
    "expired_leases": ("Leases that were not released in time.", "", {"": "expired_leases"}),
    "refused": (
        "Connections turned away.",
        "cause",
        {"proof": "refused_proofs", "number": "refused_clients", "protocol": "protocol_errors"},
    ),
}
_GAUGES: Final = {
    "stored_blocks": ("Blocks in the pool.", "blocks"),
    "stored_bytes": ("Bytes of the blocks in the pool.", "bytes"),
    "capacity_bytes": ("Memory for blocks.", "capacity_bytes"),
    "slabs": ("Slabs that belong to a size of block.", "slabs"),
    "free_slabs": ("Slabs that belong to none.", "free_slabs"),
    "pinned_blocks": ("Blocks that somebody reads.", "pinned_blocks"),
    "reserved_blocks": ("Blocks that are being written.", "reserved_blocks"),
    "leases": ("Leases held by clients.", "leases"),
    "clients": ("Clients connected.", "clients"),
    "keyspaces": ("Key spaces that were opened.", "keyspaces"),
    "uptime_seconds": ("Seconds since the start.", "uptime_s"),
}


class Exporter:
    """Serves the counters on a thread; each request asks the server's own loop for them.

    Raises:
        ConfigError: prometheus-client is not installed.
        TransportError: the address is taken or not ours.
    """

    def __init__(
        self, stats: Callable[[], dict[str, Any]], host: str, port: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError:
            raise ConfigError("metrics port: prometheus-client is needed: pip install 'kvrdma[metrics]'") from None
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(stats, loop))
        try:
            self._server: WSGIServer
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise TransportError(f"metrics port: cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()


class _Collector:
    """What prometheus-client calls for each request."""

    def __init__(self, stats: Callable[[], dict[str, Any]], loop: asyncio.AbstractEventLoop) -> None:
        self._stats = stats
        self._loop = loop

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        async def ask() -> dict[str, Any]:
            return self._stats()

        return families(asyncio.run_coroutine_threadsafe(ask(), self._loop).result(_STATS_TIMEOUT_S))


def families(stats: dict[str, Any]) -> Iterable[Any]:
    """A pool server's stats as metric families of prometheus-client."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    for name, (help_, label, parts) in _COUNTERS.items():
        counter = CounterMetricFamily(f"kvrdma_pool_{name}", help_, labels=[label] if label else [])
        for value, key in parts.items():
            counter.add_metric([value] if label else [], stats.get(key, 0))
        yield counter
    for name, (help_, key) in _GAUGES.items():
        yield GaugeMetricFamily(f"kvrdma_pool_{name}", help_, value=stats.get(key, 0))
    by_size = GaugeMetricFamily("kvrdma_pool_size_class_blocks", "Blocks by their size in bytes.", labels=["nbytes"])
    for row in stats.get("by_size", ()):
        by_size.add_metric([str(row["nbytes"])], row["blocks"])
    yield by_size
    histogram = HistogramMetricFamily(
        "kvrdma_pool_operation_seconds",
        "How long a put took, and how long a lease was held.",
        labels=["operation"],
    )
    for name, seconds in stats.get("seconds", {}).items():
        buckets, below = [], 0
        for bound, n in zip((*map(str, SECONDS_BOUNDS), "+Inf"), seconds["counts"], strict=True):
            below += n
            buckets.append((bound, below))
        histogram.add_metric([name], buckets, seconds["sum"])
    yield histogram
