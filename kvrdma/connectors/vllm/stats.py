"""What the connector tells vLLM's own metrics: its log line, and Prometheus."""

from __future__ import annotations

from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvrdma.metrics import SECONDS_BOUNDS, quantile

OPERATIONS: Final = ("save", "load", "fetch", "put")
_COUNTERS: Final = {
    # name: (what it is, label, {value of the label: counter})
    "kvrdma:lookup_blocks": ("Blocks that were looked up.", "", {"": "looked_up_blocks"}),
    "kvrdma:hit_blocks": (
        "Looked-up blocks that were served, by where they came from.",
        "tier",
        {"l1": "l1_hit_blocks", "l2": "l2_hit_blocks"},
    ),
    "kvrdma:moved_blocks": (
        "Blocks moved: device to L1 (save), L1 to device (load), L2 to L1 (fetch), L1 to L2 (put); all ranks.",
        "operation",
        {name: f"{name}_blocks" for name in OPERATIONS},
    ),
    "kvrdma:moved_bytes": ("Bytes moved, likewise.", "operation", {name: f"{name}_bytes" for name in OPERATIONS}),
    "kvrdma:failed_blocks": (
        "Blocks that an operation did not move, likewise.",
        "operation",
        {name: f"{name}_failed_blocks" for name in OPERATIONS},
    ),
    "kvrdma:unsaved_blocks": (
        "Blocks not saved, or later than they could be, by what was short.",
        "cause",
        {"no_room": "save_skipped_no_room", "device_blocks": "save_deferred_blocks"},
    ),
    "kvrdma:offloaded_blocks": (
        "Blocks that were to go to L2, by the event at which the offload mode picked them.",
        "event",
        {"stored": "offload_stored_blocks", "hot": "offload_hot_blocks", "evicting": "offload_evicting_blocks"},
    ),
    "kvrdma:offload_dropped_blocks": (
        "Blocks evicted before L2 could take them, of those that the offload mode picks.",
        "",
        {"": "offload_dropped_blocks"},
    ),
    "kvrdma:evicted_blocks": ("Blocks evicted.", "tier", {"l1": "l1_evicted_blocks"}),
    "kvrdma:l1_growth_failures": ("Ranks whose pool stayed smaller than planned.", "", {"": "l1_growth_failures"}),
    "kvrdma:l2_failures": ("Failures after which L2 is left alone for a while.", "", {"": "l2_failures"}),
}
_GAUGES: Final = {
    "kvrdma:l1_blocks": ("Blocks in L1.", "l1_blocks"),
    "kvrdma:l1_capacity_blocks": ("Blocks that L1 is planned for.", "l1_capacity_blocks"),
    "kvrdma:l1_ready_blocks": ("Slots that are touched, pinned and in use on every rank.", "l1_ready_blocks"),
    "kvrdma:zombie_blocks": ("Slots that wait for a transfer to become terminal.", "zombies"),
    "kvrdma:jobs": ("Jobs under way.", "jobs"),
    "kvrdma:waiting_blocks": ("Slots held for requests that wait.", "waiting_slots"),
}
_GAUGE_NAMES: Final = frozenset(name for _, name in _GAUGES.values()) | {"l1_free_blocks", "requests"}


class KVRDMAStats(KVConnectorStats):
    """`data`: `counters`, `misses` and `seconds` since the last time; `gauges`, and `leases` by rank, as they are.

    `seconds` has the counts by bucket of `SECONDS_BOUNDS`, and a sum, of each operation.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVRDMAStats:
        """Add another rank's, or a later interval's."""
        mine, theirs = self.data, other.data
        return KVRDMAStats(
            {
                "counters": _sum(mine.get("counters", {}), theirs.get("counters", {})),
                "misses": _sum(mine.get("misses", {}), theirs.get("misses", {})),
                "seconds": {
                    name: _sum_seconds(mine.get("seconds", {}).get(name), theirs.get("seconds", {}).get(name))
                    for name in {**mine.get("seconds", {}), **theirs.get("seconds", {})}
                },
                "gauges": {**mine.get("gauges", {}), **theirs.get("gauges", {})},
                "leases": {**mine.get("leases", {}), **theirs.get("leases", {})},
            }
        )

    def reduce(self) -> dict[str, int | float]:
        """What stands in vLLM's log line."""
        counters, misses = self.data.get("counters", {}), self.data.get("misses", {})
        line: dict[str, int | float] = {
            name: counters[name]
            for name in ("looked_up_blocks", "l1_hit_blocks", "l2_hit_blocks")
            if counters.get(name)
        }
        line |= {f"miss_{reason}": n for reason, n in misses.items()}
        for name, seconds in self.data.get("seconds", {}).items():
            if name in OPERATIONS:
                line[f"{name}_MB"] = round(counters.get(f"{name}_bytes", 0) / 1e6, 1)
            line[f"{name}_p50_s"] = quantile(seconds["counts"], 0.5)
            line[f"{name}_p99_s"] = quantile(seconds["counts"], 0.99)
        return line | {name: n for name, n in self.data.get("gauges", {}).items() if name == "zombies" and n}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.get(part) for part in ("counters", "misses", "seconds", "gauges", "leases"))


class StatsFeed:
    """Turns totals, as the index and the agents keep them, into what is new since the last call."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}

    def news(self, totals: dict[str, Any]) -> KVRDMAStats | None:
        """What has changed; None where nothing has. Without a change the gauges count for nothing, either."""
        before, self._before = self._before, totals
        if totals == before:
            return None
        numbers = {name: n for name, n in totals.items() if isinstance(n, int)}
        counters = {
            name: n - before.get(name, 0)
            for name, n in numbers.items()
            if name not in _GAUGE_NAMES and n != before.get(name, 0)
        }
        known = before.get("misses", {})
        misses = {reason: n - known.get(reason, 0) for reason, n in totals["misses"].items() if n != known.get(reason)}
        seconds = {}
        for name, now in totals["seconds"].items():
            then = before.get("seconds", {}).get(name, {"counts": [0] * len(now["counts"]), "sum": 0.0})
            if now["counts"] != then["counts"]:
                seconds[name] = {
                    "counts": [a - b for a, b in zip(now["counts"], then["counts"], strict=True)],
                    "sum": now["sum"] - then["sum"],
                }
        gauges = {name: n for name, n in numbers.items() if name in _GAUGE_NAMES}
        leases = totals.get("leases", {})
        return KVRDMAStats(
            {"counters": counters, "misses": misses, "seconds": seconds, "gauges": gauges, "leases": leases}
        )


class KVRDMAPromMetrics(KVConnectorPromMetrics):
    """The same, for Prometheus: beside vLLM's own metrics, with its labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter, gauge, histogram = metric_types[Counter], metric_types[Gauge], metric_types[Histogram]
        self._counters: dict[str, Any] = {
            name: counter(name=name, documentation=help_, labelnames=[*labelnames, *([label] if label else [])])
            for name, (help_, label, _) in _COUNTERS.items()
        }
        self._gauges: dict[str, Any] = {
            name: gauge(name=name, documentation=help_, labelnames=labelnames) for name, (help_, _) in _GAUGES.items()
        }
        self._leases: Any = gauge(
            name="kvrdma:leases",
            documentation="Copies, fetches and puts that hold slots of a rank.",
            labelnames=[*labelnames, "rank"],
        )
        self._misses: Any = counter(
            name="kvrdma:miss_blocks",
            documentation="Looked-up blocks that were not served; each has exactly one reason.",
            labelnames=[*labelnames, "reason"],
        )
        self._seconds: Any = histogram(
            name="kvrdma:operation_seconds",
            documentation="How long an operation took, from its job to its end, and L2 to answer a lookup; "
            "the sum is rounded up by bucket.",
            labelnames=[*labelnames, "operation"],
            buckets=SECONDS_BOUNDS,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take what is new."""
        labels = self.per_engine_labelvalues[engine_idx]
        counters, gauges = transfer_stats_data.get("counters", {}), transfer_stats_data.get("gauges", {})
        for name, (_, label, parts) in _COUNTERS.items():
            for value, counter in parts.items():
                if counters.get(counter):
                    self._counters[name].labels(*labels, *([value] if label else [])).inc(counters[counter])
        for reason, n in transfer_stats_data.get("misses", {}).items():
            self._misses.labels(*labels, reason).inc(n)
        for name, (_, gauge) in _GAUGES.items():
            if gauge in gauges:
                self._gauges[name].labels(*labels).set(gauges[gauge])
        for rank, n in transfer_stats_data.get("leases", {}).items():
            self._leases.labels(*labels, rank).set(n)
        for name, seconds in transfer_stats_data.get("seconds", {}).items():
            histogram = self._seconds.labels(*labels, name)
            # A histogram of Prometheus takes one duration at a time: those of a bucket count as its upper bound.
            for bound, n in zip((*SECONDS_BOUNDS, 2 * SECONDS_BOUNDS[-1]), seconds["counts"], strict=True):
                for _ in range(n):
                    histogram.observe(bound)


def _sum(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, int]:
    return {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}


def _sum_seconds(mine: dict[str, Any] | None, theirs: dict[str, Any] | None) -> dict[str, Any]:
    if mine is None or theirs is None:
        return dict(mine or theirs or {})
    return {
        "counts": [a + b for a, b in zip(mine["counts"], theirs["counts"], strict=True)],
        "sum": mine["sum"] + theirs["sum"],
    }
