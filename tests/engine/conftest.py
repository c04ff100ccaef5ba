"""Real vLLM engines on the CPU, in processes of their own, shared between tests: a start takes half a minute."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".models"
sys.path.insert(0, str(ROOT / "examples"))

with warnings.catch_warnings():  # torch and vLLM warn of themselves when they are imported
    warnings.simplefilter("ignore")
    import vllm.distributed.kv_transfer.kv_connector.factory
    import vllm.v1.core.sched.output  # noqa: F401

from processes import EngineProcess, Server  # noqa: E402

BLOCK = 32
LOG_LINES = 200  # of an engine, where a test fails at its end
FETCH_TIMEOUT_S = 10.0  # of the reader: long enough for a test to do something meanwhile


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


def eventually(what: str, condition: Callable[[], Any], timeout: float = 30.0) -> Any:
    """Wait, within bounds, for something that another process does."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not after {timeout} s")
        time.sleep(0.02)
    return value


class Witness:
    """What the witness connectors of several engines have written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, engine: str) -> Path:
        return self.folder / f"{engine}.jsonl"

    def lines(self, engine: str) -> list[dict[str, str]]:
        path = self.file(engine)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def saved(self) -> dict[str, set[str]]:
        """What was saved under each key, by whatever engine."""
        found = defaultdict(set)
        for path in self.folder.glob("*.jsonl"):
            for line in self.lines(path.stem):
                if line["what"] == "saved":
                    found[line["key"]].add(line["digest"])
        return found

    def loaded(self, engine: str) -> list[dict[str, str]]:
        return [line for line in self.lines(engine) if line["what"] == "loaded"]

    def end(self, engine: EngineProcess) -> None:
        """End an engine, which lets both halves of the connector end; where not, its log says why."""
        status = engine.close()
        halves = {line["half"] for line in self.lines(engine.name) if line["what"] == "shutdown"}
        if halves != {"scheduler", "worker"}:
            log = "\n".join(engine.log().splitlines()[-LOG_LINES:])
            pytest.fail(
                f"{engine.name}, which ended with status {status}, has shut down {sorted(halves) or 'neither half'} "
                f"of its connector; the end of its log:\n{log}"
            )

    def hold(self, engine: str, what: str, pid: int) -> Path:
        """Have a process stopped just before the engine's next `get` or `put`: then the file given is gone."""
        file = Path(f"{self.file(engine)}.hold-{what}")
        new = file.with_suffix(".new")
        new.write_text(str(pid))
        new.rename(file)
        return file

    def wrong(self, engine: str) -> list[str]:
        """Keys whose device bytes after a load are not those that were saved."""
        saved = self.saved()
        return [line["key"] for line in self.loaded(engine) if line["digest"] not in saved[line["key"]]]


class Pool:
    """A pool server that can be ended and started again, empty, at the same address."""

    def __init__(self) -> None:
        self.server = Server(capacity="1GiB")

    def restart(self) -> None:
        self.server.close()
        self.server = Server(capacity="1GiB", port=self.server.port)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.server.close()


@pytest.fixture
def server(pool: Pool) -> Server:
    return pool.server


@pytest.fixture(scope="session")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    return Witness(tmp_path_factory.mktemp("witness"))


@pytest.fixture(scope="session")
def start_engine(witness: Witness) -> Iterator[Callable[..., EngineProcess]]:
    """Start an engine with the witness connector; all are ended with the session."""
    running: list[EngineProcess] = []

    def start(
        name: str, *, model: Path = MODELS / "smollm2", env: dict[str, str] | None = None, **options: Any
    ) -> EngineProcess:
        # float32: in bfloat16 a prefix that was computed in other shapes gives other tokens, with no cache at all.
        engine = EngineProcess(
            name=name,
            model=str(model),
            env={
                "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}",
                "WITNESS_FILE": str(witness.file(name)),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **(env or {}),
            },
            connector_class="WitnessConnector",
            connector_module="witness",
            dtype="float32",
            **options,
        )
        running.append(engine)
        return engine

    yield start
    with ThreadPoolExecutor() as together:  # each takes some seconds to shut down
        list(together.map(EngineProcess.close, running))


@pytest.fixture(scope="session")
def writer(pool: Pool, start_engine: Callable[..., EngineProcess]) -> EngineProcess:
    """An engine whose work is to compute and to store."""
    return start_engine("writer", settings={"l1_bytes": "256MiB", "l2": pool.server.url})


@pytest.fixture(scope="session")
def reader(pool: Pool, start_engine: Callable[..., EngineProcess], writer: EngineProcess) -> EngineProcess:
    """An engine with the same model, in another process, that finds what the writer has stored."""
    settings = {"l1_bytes": "256MiB", "l2": pool.server.url, "fetch_timeout": FETCH_TIMEOUT_S}
    return start_engine("reader", settings=settings)


@pytest.fixture(scope="session")
def plain(reader: EngineProcess) -> Iterator[EngineProcess]:
    """vLLM without kvrdma: what an answer from the engine's own prefix cache is."""
    with EngineProcess(name="plain", model=str(MODELS / "smollm2"), connector=False, dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="session")
def text(writer: EngineProcess) -> list[int]:
    """About 2,300 tokens of real text."""
    return writer.ask("encode", text=(ROOT / "LICENSE").read_text())["tokens"]
