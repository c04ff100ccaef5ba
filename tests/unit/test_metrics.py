"""Counters, durations, and how a pool server shows them to Prometheus."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from kvrdma.metrics import SECONDS_BOUNDS, Histogram, Metrics, Reason, quantile
from kvrdma.server.exporter import families


@given(st.lists(st.floats(0, 1000), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_bucket_of_the_one_it_falls_on(durations: list[float], share: float) -> None:
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    exact = sorted(durations)[max(0, math.ceil(share * len(durations) - 1e-9) - 1)]
    bound = quantile(histogram.counts, share)
    assert exact <= bound
    assert bound == min((b for b in SECONDS_BOUNDS if b >= exact), default=math.inf)
    assert histogram.total_s == pytest.approx(sum(durations))


def test_a_snapshot_is_not_changed_by_what_comes_later() -> None:
    metrics = Metrics()
    metrics.add("blocks", 2)
    metrics.miss(Reason.EVICTED, 3)
    metrics.miss(Reason.GATE, 0)
    metrics.observe("load", 0.003)
    before = metrics.snapshot()
    metrics.observe("load", 0.003)
    metrics.add("blocks")
    assert before["blocks"] == 2
    assert before["misses"] == {"evicted": 3}
    assert sum(before["seconds"]["load"]["counts"]) == 1


class Collector:
    def __init__(self, stats: dict) -> None:
        self.stats = stats

    def collect(self) -> object:
        return families(self.stats)


def test_what_prometheus_gets() -> None:
    histogram = Histogram()
    for seconds in (0.002, 0.002, 100.0):
        histogram.observe(seconds)
    registry = CollectorRegistry()
    registry.register(
        Collector(
            {
                "get_hits": 5,
                "existing_blocks": 2,
                "blocks": 7,
                "by_size": [{"nbytes": 4096, "blocks": 7}],
                "misses": {"evicted": 3},
                "data_connections": {"shm": 2, "tcp": 0},
                "seconds": {"put": histogram.snapshot()},
            }
        )
    )

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvrdma_pool_{name}", labels)

    assert value("get_hit_blocks_total") == 5
    assert value("put_blocks_total", outcome="existing") == 2
    assert value("put_blocks_total", outcome="stored") == 0
    assert value("stored_blocks") == 7
    assert (value("miss_blocks_total", reason="evicted"), value("miss_blocks_total", reason="not_there")) == (3, 0)
    assert (value("data_connections", transport="shm"), value("data_connections", transport="tcp")) == (2, 0)
    assert value("size_class_blocks", nbytes="4096") == 7
    assert value("operation_seconds_bucket", operation="put", le="0.001") == 0
    assert value("operation_seconds_bucket", operation="put", le="0.0025") == 2
    assert value("operation_seconds_bucket", operation="put", le="60.0") == 2
    assert value("operation_seconds_bucket", operation="put", le="+Inf") == 3
    assert value("operation_seconds_sum", operation="put") == pytest.approx(100.004)
    assert b"kvrdma_pool_capacity_bytes 0.0" in generate_latest(registry)
