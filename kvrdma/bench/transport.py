"""`kvrdma bench transport`: batches between two processes, beside a baseline that moves the same batches.

The baseline is plain sockets, and one memcpy on one thread for shared memory.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from kvrdma.bench.plain import Baseline, MemcpyClient, PlainClient
from kvrdma.bench.target import open_transport
from kvrdma.errors import ConfigError, TransportError
from kvrdma.memory import MemfdSlabs
from kvrdma.transports import Opcode, RemoteRegion, Transfer, TransferBatch, transports

ROUNDS: Final = 5
_WAYS: Final = ("write", "read")
_TIMEOUT_S: Final = 30.0
_WARM_UP_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportBench:
    """What to measure; raises `ConfigError` on what cannot be measured."""

    transport: str = "tcp"
    nbytes_per_block: int = 64 << 10
    batch: int = 64
    depth: int = 4
    streams: int = 1
    seconds: float = 3.0

    def __post_init__(self) -> None:
        transports.get(self.transport)
        if self.transport == "inproc":
            raise ConfigError("inproc: both ends are one process, so it cannot be measured between two")
        for name in ("nbytes_per_block", "batch", "depth", "streams"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if not self.seconds > 0:
            raise ConfigError(f"seconds: must be above 0, not {self.seconds}")

    @property
    def baseline(self) -> str:
        """What stands beside it."""
        return "memcpy" if self.transport == "shm" else "plain sockets"

    @property
    def n_steps(self) -> int:
        """How often `on_step` is called."""
        return ROUNDS * len(_WAYS) * 2

    @property
    def batch_nbytes(self) -> int:
        """Bytes a batch."""
        return self.nbytes_per_block * self.batch


@dataclass(frozen=True, slots=True)
class TransportResult:
    """Medians over the rounds, and latencies of all batches."""

    settings: TransportBench
    rates: dict[str, float]  # by "write", "read", "plain_write", "plain_read": bytes per second
    cpu: dict[str, float]  # the same: CPU seconds of both processes for 1e9 bytes
    latencies: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        """One flat object. `baseline_bytes_per_s` is the faster of the baseline's two directions."""
        settings, rates, cpu = self.settings, self.rates, self.cpu
        figures: dict[str, Any] = {
            "transport": settings.transport,
            "nbytes_per_block": settings.nbytes_per_block,
            "batch": settings.batch,
            "depth": settings.depth,
            "streams": settings.streams,
            "baseline": settings.baseline,
            "write_bytes_per_s": rates["write"],
            "read_bytes_per_s": rates["read"],
            "cpu_s_per_gb": (cpu["write"] + cpu["read"]) / 2,
            "baseline_bytes_per_s": max(rates["plain_write"], rates["plain_read"]),
            "baseline_cpu_s_per_gb": (cpu["plain_write"] + cpu["plain_read"]) / 2,
        }
        for way in _WAYS:
            p50, p99 = np.percentile(self.latencies[way], [50, 99])
            figures[f"{way}_p50_s"], figures[f"{way}_p99_s"] = float(p50), float(p99)
            figures[f"{way}_cpu_s_per_gb"] = cpu[way]
            figures[f"baseline_{way}_bytes_per_s"] = rates[f"plain_{way}"]
        return figures


@dataclass(slots=True)
class _Samples:
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


class _Target:
    """The passive process."""

    def __init__(self, settings: TransportBench, offsets: list[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvrdma.bench.target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._ask(
            {
                "transport": settings.transport,
                "streams": settings.streams,
                "nbytes_per_block": settings.nbytes_per_block,
                "offsets": offsets,
            }
        )

    def cpu_s(self) -> float:
        """The CPU time that it has used."""
        return float(self._ask({})["cpu_s"])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TransportError("the benchmark's second process ended early; its message is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def run_transport_bench(settings: TransportBench, *, on_step: Callable[[str], None]) -> TransportResult:
    """Measure ours and the baseline in turn, round after round; `on_step` is told what begins.

    Raises:
        CapacityError: the host has not the memory.
        TransportError: the processes cannot reach each other.
    """
    # Blocks lie apart and in no order, as a cache's do: nothing can be merged into one long range.
    n_places = 2 * settings.batch
    places = np.random.default_rng(0).permutation(n_places // 2)[: settings.batch] * 2
    offsets = (places * settings.nbytes_per_block).astype(np.int64)
    samples = {name: _Samples() for way in _WAYS for name in (way, f"plain_{way}")}
    with _open(settings, offsets) as (target, ours, plain):
        for _ in range(ROUNDS):
            for way in _WAYS:
                for name, run in ((way, ours), (f"plain_{way}", plain)):
                    on_step(name.replace("_", " "))
                    run(way, _WARM_UP_S, _Samples())
                    before = time.process_time() + target.cpu_s()
                    moved = run(way, settings.seconds / ROUNDS, samples[name])
                    used = time.process_time() + target.cpu_s() - before
                    samples[name].cpu.append(used / (moved / 1e9))
    return TransportResult(
        settings,
        {name: float(np.median(sample.rates)) for name, sample in samples.items()},
        {name: float(np.median(sample.cpu)) for name, sample in samples.items()},
        {way: samples[way].latencies for way in _WAYS},
    )


_Run = Callable[[str, float, _Samples], int]


@contextmanager
def _open(settings: TransportBench, offsets: np.ndarray) -> Iterator[tuple[_Target, _Run, _Run]]:
    source = MemfdSlabs()
    memory = source.allocate(int(offsets.max()) + settings.nbytes_per_block)
    target = _Target(settings, offsets.tolist())
    try:
        hello = target.hello
        sock = socket.create_connection(("127.0.0.1", hello["plain_port"]), _TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, open_transport(settings.transport, settings.streams) as transport:
            region = transport.register(memory)
            remote = RemoteRegion(hello["scheme"], hello["nbytes"], bytes.fromhex(hello["token"]))
            rows = np.zeros(settings.batch, dtype=np.int64)
            nbytes = np.full(settings.batch, settings.nbytes_per_block, dtype=np.int64)
            batches = {
                way: TransferBatch(opcode, [region], [remote], rows, offsets, rows, offsets, nbytes)
                for way, opcode in (("write", Opcode.WRITE), ("read", Opcode.READ))
            }
            view = memory.view()
            baseline: Baseline = PlainClient(sock, [view[o : o + settings.nbytes_per_block] for o in offsets.tolist()])
            if settings.baseline == "memcpy":
                baseline = MemcpyClient(memory.array(), offsets.tolist(), settings.nbytes_per_block)
            with transport.connect(hello["address"], timeout=_TIMEOUT_S) as endpoint:

                def ours(way: str, seconds: float, samples: _Samples) -> int:
                    pending: deque[tuple[float, Transfer]] = deque()

                    def begin() -> None:
                        pending.append((time.perf_counter(), endpoint.post(batches[way], timeout=_TIMEOUT_S)))

                    def finish() -> None:
                        begun, transfer = pending.popleft()
                        if not transfer.result(_TIMEOUT_S).all():
                            raise TransportError(f"a batch failed: {transfer.error}")
                        samples.latencies.append(time.perf_counter() - begun)

                    return _pump(settings, seconds, samples, begin, finish)

                def plain(way: str, seconds: float, samples: _Samples) -> int:
                    write = way == "write"
                    return _pump(
                        settings,
                        seconds,
                        samples,
                        lambda: baseline.begin(write=write),
                        lambda: baseline.finish_one(write=write),
                    )

                yield target, ours, plain
    finally:
        target.close()
        source.release(memory)


def _pump(
    settings: TransportBench,
    seconds: float,
    samples: _Samples,
    begin: Callable[[], None],
    finish: Callable[[], None],
) -> int:
    """Keep `depth` batches under way for some seconds; gives the bytes moved."""
    n_batches = 0
    started = time.perf_counter()
    for _ in range(settings.depth):
        begin()
    while True:
        finish()
        n_batches += 1
        if time.perf_counter() - started >= seconds:
            break
        begin()
    for _ in range(settings.depth - 1):
        finish()
        n_batches += 1
    moved = n_batches * settings.batch_nbytes
    samples.rates.append(moved / (time.perf_counter() - started))
    return moved
