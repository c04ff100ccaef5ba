"""The connector against vLLM's interface: signatures of both versions, and hooks that never raise."""

from __future__ import annotations

import functools
import inspect
import json
import logging
import threading
import time
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import metered
import pytest
from metered import MeteredConnector
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorTransferResults,
)

from kvrdma.cache import CacheIndex, IndexOptions, PoolReport
from kvrdma.connectors.vllm import KVRDMAConnector, scheduler
from kvrdma.connectors.vllm.connector import check_l2, warn_of_failure_policy
from kvrdma.connectors.vllm.metadata import RankReports, StepJobs
from kvrdma.connectors.vllm.plugin import register
from kvrdma.errors import ConfigError
from kvrdma.policies.lru import LruPolicy
from kvrdma.policies.offload import OffloadAll
from kvrdma.settings import Settings

# Read from the base class of vLLM 0.33, of which only a CUDA wheel exists: method -> names of its arguments.
BASE_0_33 = json.loads((Path(__file__).parent / "base_0_33.json").read_text())
OVERRIDDEN = sorted(
    name
    for name, member in vars(KVRDMAConnector).items()
    if hasattr(KVConnectorBase_V1, name) and not name.startswith("__") and not isinstance(member, str | type)
)


def argument_names(function: Any) -> list[str]:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return [marks.get(parameter.kind, "") + parameter.name for parameter in parameters]


def function_of(cls: type, name: str) -> Any:
    member = inspect.getattr_static(cls, name)
    if isinstance(member, property):
        return member.fget
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


@pytest.mark.parametrize("name", [n for n in OVERRIDDEN if n not in {"_cache_hit_source", "_abc_impl"}])
def test_every_hook_has_the_signature_of_both_versions(name: str) -> None:
    ours = argument_names(function_of(KVRDMAConnector, name))
    assert ours == argument_names(function_of(KVConnectorBase_V1, name))
    assert ours == BASE_0_33[name]


def test_the_metered_connector_measures_every_hook() -> None:
    """All but the two that are called for each layer, and what is no method."""
    methods = [name for name in OVERRIDDEN if inspect.isfunction(vars(KVRDMAConnector)[name])]
    metered_ones = [name for name in methods if getattr(MeteredConnector, name) is not getattr(KVRDMAConnector, name)]
    assert set(methods) - set(metered_ones) == {"wait_for_layer_load", "save_kv_layer"}
    assert all(getattr(MeteredConnector, name).__wrapped__ is getattr(KVRDMAConnector, name) for name in metered_ones)


def test_the_meter_counts_hooks_and_threads_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METER_FOLDER", str(tmp_path))
    monkeypatch.setattr(metered, "meter", functools.cache(metered.Meter))

    def work() -> None:
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    def read() -> dict[str, float]:
        with Client(str(next(tmp_path.iterdir())), "AF_UNIX") as connection:
            answer: dict[str, float] = connection.recv()
            return answer

    metered.metered(lambda connector: work())(None)
    assert read()["hooks_s"] >= 0.2
    assert read()["threads_s"] == 0
    done, read_meanwhile = threading.Event(), threading.Event()
    for name in ("kvrdma-gather_0", "of somebody else"):

        def run() -> None:
            work()
            done.set()
            read_meanwhile.wait(30)

        threading.Thread(target=run, name=name).start()
        assert done.wait(30)
        done.clear()
    threads_s = read()["threads_s"]
    read_meanwhile.set()
    assert 0.2 <= threads_s < 0.4
    assert read()["threads_s"] >= threads_s  # what has ended stays counted


def test_what_0_33_adds_is_not_used_for_something_else() -> None:
    added = set(BASE_0_33) - set(dir(KVConnectorBase_V1))
    assert added == {"supports_sleep_mode", "unregister_kv_caches", "restore_kv_caches"}
    assert not added & set(vars(KVRDMAConnector))


def test_the_plugin_makes_the_connector_known_by_name() -> None:
    register()
    register()
    assert KVConnectorFactory.get_connector_class_by_name("KVRDMAConnector") is KVRDMAConnector


class Broken:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is broken on purpose")


@pytest.fixture
def broken() -> KVRDMAConnector:
    connector = object.__new__(KVRDMAConnector)
    connector._scheduler = connector._worker = Broken()  # type: ignore[assignment]
    connector._connector_metadata = StepJobs()
    return connector


def test_nothing_raises_out_of_a_hook(broken: KVRDMAConnector, caplog: pytest.LogCaptureFixture) -> None:
    request: Any = SimpleNamespace(request_id="r")
    with caplog.at_level(logging.ERROR):
        assert broken.get_num_new_matched_tokens(request, 0) == (0, False)
        assert isinstance(broken.build_connector_meta(SimpleNamespace()), StepJobs)  # type: ignore[arg-type]
        assert broken.request_finished(request, []) == (False, None)
        assert broken.get_transfer_results(set()) == KVConnectorTransferResults()
        assert broken.build_connector_worker_meta() is None
        assert broken.reset_cache() is True
        assert broken.has_pending_push_work() is False
        assert broken.has_pending_block_frees() is False
        for call in (
            lambda: broken.update_state_after_alloc(request, None, 0),  # type: ignore[arg-type]
            lambda: broken.update_connector_output(SimpleNamespace(kv_connector_worker_meta=RankReports([]))),  # type: ignore[arg-type]
            lambda: broken.start_load_kv(None),  # type: ignore[arg-type]
            broken.wait_for_save,
            lambda: broken.bind_gpu_block_pool(None),  # type: ignore[arg-type]
            broken.shutdown,
        ):
            assert call() is None
    assert len(caplog.records) >= 13  # and each says so


def test_a_request_waits_for_news_of_growing_pools_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: now[0]))
    half: Any = object.__new__(scheduler.SchedulerHalf)
    half._index = CacheIndex(8, LruPolicy(8), OffloadAll(), IndexOptions(growing=True))
    half._pools_heard, half._awaits_news = -1.0, True
    asking = scheduler._Request(SimpleNamespace(request_id="r"), None)  # type: ignore[arg-type]
    assert half._pools_are_old(asking)
    half.on_reports(RankReports([], [PoolReport(0, 4, growing=True)]).aggregate(RankReports([])))
    assert half._index.stats()["l1_ready_blocks"] == 4
    assert not half._pools_are_old(asking)
    now[0] += 60.0  # the engine was idle, and the pool went on growing
    assert half._pools_are_old(asking)
    now[0] += 2.0  # and no rank says anything
    assert not half._pools_are_old(asking)
    assert not half._pools_are_old(scheduler._Request(asking.request, None))  # nor does anybody else wait
    half.on_reports(RankReports([], [PoolReport(0, 8, growing=False)]))
    assert not half._index.growing


def test_a_load_that_cannot_be_planned_is_reported_failed(broken: KVRDMAConnector) -> None:
    """Else its request would wait for ever."""
    told: list[str] = []
    scheduler = SimpleNamespace(load_not_planned=told.append)
    broken._scheduler = scheduler  # type: ignore[assignment]
    broken.update_state_after_alloc(SimpleNamespace(request_id="r"), None, 32)  # type: ignore[arg-type]
    assert told == ["r"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"l1_byte": "1GiB"}, "did you mean 'l1_bytes'"),
        ({"l1_bytes": "lots"}, "64KiB"),
        ({"nic_rate": "1GiB"}, "not built yet"),
        ({"budget_dir": "/x"}, "not built yet"),
        ({"gate": "on"}, "not built yet"),
        ({"coordination": "group"}, "not built yet"),
        ({"l2": "memory://"}, "lives in one process"),
        ({"l2": "kvrmda://h:1"}, "did you mean 'kvrdma'"),
    ],
)
def test_settings_that_cannot_be_meant_end_the_start(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_l2(Settings.read(settings, where="kv_connector_extra_config"))


def test_the_default_failure_policy_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_failure_policy(SimpleNamespace(kv_load_failure_policy="fail"))
    assert "recompute" in caplog.text
    caplog.clear()
    warn_of_failure_policy(SimpleNamespace(kv_load_failure_policy="recompute"))
    assert caplog.text == ""
