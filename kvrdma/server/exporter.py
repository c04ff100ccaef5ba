"""The pool server's counters for Prometheus, at `http://host:port/metrics`. They hold no key, address or token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final

from kvrdma.errors import ConfigError, TransportError
from kvrdma.metrics import SECONDS_BOUNDS, Reason

REQUEST_TIMEOUT_S: Final = 5.0
MAX_REQUESTS: Final = 16  # at once: whoever reaches the port needs no token, and must not be in anybody's way
_MAX_HEAD_NBYTES: Final = 8 << 10
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
    "zombie_blocks": ("Blocks that are gone, whose memory a reader still holds.", "zombie_blocks"),
    "leases": ("Leases held by clients.", "leases"),
    "clients": ("Clients connected.", "clients"),
    "keyspaces": ("Key spaces that were opened.", "keyspaces"),
    "uptime_seconds": ("Seconds since the start.", "uptime_s"),
}
_MISSES: Final = (Reason.NOT_THERE, Reason.EVICTED, Reason.OTHER_KEYSPACE)


class Exporter:
    """Answers `GET /metrics` on the server's own loop, a few at a time and each within seconds."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats
        self._server: asyncio.Server | None = None
        self._n_open = 0

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            ConfigError: prometheus-client is not installed.
            TransportError: the address is taken or not ours.
        """
        try:
            import prometheus_client  # noqa: F401 - for its absence to be told of now
        except ImportError:
            raise ConfigError("metrics port: prometheus-client is needed: pip install 'kvrdma[metrics]'") from None
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_NBYTES)
        except OSError as error:
            raise TransportError(f"metrics port: cannot listen on {host}:{port}: {error.strerror or error}") from error

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Serve no more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._n_open >= MAX_REQUESTS:
            writer.transport.abort()
            return
        self._n_open += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # it left, or was too slow or too long
        finally:
            self._n_open -= 1
            writer.transport.abort()

    def _answer(self, head: bytes) -> bytes:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST

        method, _, rest = head.partition(b" ")
        if method != b"GET" or rest.split(b" ")[0].split(b"?")[0] not in {b"/metrics", b"/"}:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self._stats()))
        body = generate_latest(registry)
        return (
            f"HTTP/1.1 200 OK\r\nContent-Type: {CONTENT_TYPE_LATEST}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        ).encode() + body


class _Collector:
    """What prometheus-client asks for the families."""

    def __init__(self, stats: dict[str, Any]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        return families(self._stats)


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
    by_transport = GaugeMetricFamily(
        "kvrdma_pool_data_connections", "Clients by the transport that moves their bytes.", labels=["transport"]
    )
    for scheme, n in stats.get("data_connections", {}).items():
        by_transport.add_metric([scheme], n)
    yield by_transport
    misses = CounterMetricFamily(
        "kvrdma_pool_miss_blocks", "Blocks asked about or wanted that were not there, by reason.", labels=["reason"]
    )
    for reason in _MISSES:
        misses.add_metric([reason.value], stats.get("misses", {}).get(reason.value, 0))
    yield misses
    histogram = HistogramMetricFamily(
        "kvrdma_pool_operation_seconds",
        "How long a lookup, a get (until it is leased) and a put took, and how long a lease was held.",
        labels=["operation"],
    )
    for name, seconds in stats.get("seconds", {}).items():
        buckets, below = [], 0
        for bound, n in zip((*map(str, SECONDS_BOUNDS), "+Inf"), seconds["counts"], strict=True):
            below += n
            buckets.append((bound, below))
        histogram.add_metric([name], buckets, seconds["sum"])
    yield histogram
