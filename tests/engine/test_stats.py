"""What the connector tells vLLM's own metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conftest import BLOCK, eventually
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvrdma.connectors.vllm import KVRDMAConnector
from kvrdma.connectors.vllm.stats import KVRDMAPromMetrics, KVRDMAStats, StatsFeed
from kvrdma.metrics import SECONDS_BOUNDS, Metrics, Reason

if TYPE_CHECKING:
    from processes import EngineProcess


def totals(metrics: Metrics, **gauges: int) -> dict:
    return {**metrics.snapshot(), **gauges}


def test_only_what_is_new_is_told() -> None:
    metrics, feed = Metrics(), StatsFeed()
    assert feed.news(totals(metrics)).is_empty()
    metrics.add("looked_up_blocks", 5)
    metrics.miss(Reason.EVICTED, 2)
    metrics.observe("load", 0.02)
    first = feed.news(totals(metrics, zombies=1))
    assert first.data["counters"] == {"looked_up_blocks": 5}
    assert first.data["misses"] == {"evicted": 2}
    assert sum(first.data["seconds"]["load"]["counts"]) == 1
    assert first.data["gauges"] == {"zombies": 1}
    assert feed.news(totals(metrics, zombies=1)) is None
    metrics.add("looked_up_blocks", 1)
    metrics.miss(Reason.GATE)
    second = feed.news(totals(metrics, zombies=0))
    assert second.data["counters"] == {"looked_up_blocks": 1}
    assert second.data["misses"] == {"gate": 1}
    assert second.data["seconds"] == {}
    assert second.data["gauges"] == {"zombies": 0}
    third = feed.news(totals(metrics, zombies=2))
    assert third.data["gauges"] == {"zombies": 2}
    assert not third.is_empty()  # vLLM drops what is empty, and a gauge would stay as it was


def stats(**parts: dict) -> KVRDMAStats:
    return KVRDMAStats({"counters": {}, "misses": {}, "seconds": {}, "gauges": {}, **parts})


def test_ranks_and_intervals_add_up_and_change_neither() -> None:
    buckets = [1, *[0] * len(SECONDS_BOUNDS)]
    one = stats(counters={"load_bytes": 8_000_000}, seconds={"load": {"counts": buckets, "sum": 0.001}})
    two = stats(
        counters={"load_bytes": 2_000_000, "put_blocks": 1}, seconds={"load": {"counts": buckets, "sum": 0.002}}
    )
    leases = stats(leases={"0": 4, "1": 5}).aggregate(stats(leases={"0": 0}))  # of two ranks, and one of them later
    assert leases.data["leases"] == {"0": 0, "1": 5}
    assert not leases.is_empty()
    both = one.aggregate(two).aggregate(stats(misses={"gate": 3}, gauges={"zombies": 2}))
    assert both.data["counters"] == {"load_bytes": 10_000_000, "put_blocks": 1}
    assert both.data["seconds"]["load"]["counts"][0] == 2
    assert one.data["counters"] == {"load_bytes": 8_000_000}
    line = both.reduce()
    assert (line["load_MB"], line["load_p50_s"], line["miss_gate"], line["zombies"]) == (10.0, SECONDS_BOUNDS[0], 3, 2)
    assert not both.is_empty()
    both.reset()
    assert both.is_empty()
    rebuilt = KVRDMAConnector.build_kv_connector_stats(one.to_dict())
    assert rebuilt.aggregate(two).data == one.aggregate(two).data


def test_prometheus() -> None:
    registry = CollectorRegistry()

    def bound(cls: type) -> object:
        return lambda **how: cls(registry=registry, **how)

    kinds = {cls: bound(cls) for cls in (Counter, Gauge, Histogram)}
    config = type("Config", (), {"kv_transfer_config": None})()
    metrics = KVRDMAPromMetrics(config, kinds, ["model", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    seconds = {"load": {"counts": [2, *[0] * (len(SECONDS_BOUNDS) - 1), 1], "sum": 100.0}}
    news = stats(
        counters={
            "looked_up_blocks": 4,
            "l2_hit_blocks": 3,
            "put_bytes": 7,
            "l1_growth_failures": 1,
            "l2_failures": 2,
        },
        misses={"tier_down": 1},
        seconds=seconds,
        gauges={"l1_blocks": 9},
        leases={"0": 2, "1": 3},
    )
    metrics.observe(news.to_dict(), engine_idx=1)
    metrics.observe(news.to_dict(), engine_idx=1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"kvrdma:{name}", {"model": "m", "engine": "1", **labels})

    assert value("lookup_blocks_total") == 8
    assert value("hit_blocks_total", tier="l2") == 6
    assert value("moved_bytes_total", operation="put") == 14
    assert (value("l1_growth_failures_total"), value("l2_failures_total")) == (2, 4)
    assert value("miss_blocks_total", reason="tier_down") == 2
    assert value("l1_blocks") == 9
    assert (value("leases", rank="0"), value("leases", rank="1")) == (2, 3)
    assert value("operation_seconds_bucket", operation="load", le=str(SECONDS_BOUNDS[0])) == 4
    assert value("operation_seconds_bucket", operation="load", le="60.0") == 4
    assert value("operation_seconds_count", operation="load") == 6


def test_a_lookup_in_l2_has_a_duration_and_no_bytes() -> None:
    metrics, feed = Metrics(), StatsFeed()
    metrics.observe("lookup", 0.0002)
    line = feed.news(totals(metrics)).reduce()
    assert line == {"lookup_p50_s": 0.00025, "lookup_p99_s": 0.00025}


def test_a_real_engine_counts_what_it_loads(reader: EngineProcess, text: list[int]) -> None:
    """Through vLLM's own Prometheus registry: hits by tier, bytes of every operation, lookups that add up."""
    tokens = [text[0], 7777, *text[1:600]]
    before = reader.ask("metrics")
    reader.generate(tokens, max_tokens=2)

    def has_let_go() -> bool:  # saves reference the engine's blocks, and a reset leaves such blocks alone
        reader.ask("step", seconds=0.05)
        return reader.ask("reset")["reset"]

    eventually("the engine's own cache is empty", has_let_go)
    answer = reader.generate(tokens, max_tokens=2)
    assert answer["kvrdma"]["kvrdma.loaded_tokens"] == 18 * BLOCK
    now = reader.ask("metrics")
    grown = {name: value - before.get(name, 0) for name, value in now.items()}

    def total(name: str, label: str = "") -> float:
        return sum(value for key, value in grown.items() if key.startswith(f"kvrdma:{name}") and label in key)

    assert total("hit_blocks_total", 'tier="l1"') == 18
    assert total("moved_blocks_total", 'operation="load"') == 18
    assert total("moved_bytes_total", 'operation="save"') > 0
    assert total("lookup_blocks_total") == total("hit_blocks_total") + total("miss_blocks_total")
    assert total("operation_seconds_count", 'operation="load"') == 1
    assert total("operation_seconds_count", 'operation="lookup"') >= 1
    assert now[next(name for name in now if name.startswith("kvrdma:leases"))] >= 0
