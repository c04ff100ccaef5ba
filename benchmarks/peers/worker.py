"""What the worker of every system is made of. It runs in that system's own environment: numpy is all it needs.

A worker speaks lines of JSON. Questions come on stdin: first {"nbytes", "batch"}, which is answered by
{"version", "depths", "threads"}, then {"way", "depth", "threads", "seconds"} for each measurement. Where anything
fails the answer is {"error"} and the worker ends. Whatever the system itself prints on stdout goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TextIO

import numpy as np

WORKING_SET_NBYTES = 256 << 20  # of caches within a process: more than a CPU's caches hold


class Peer(ABC):
    """One system, set up to move batches of `batch` blocks of `nbytes` bytes from and to the caller's memory."""

    package: ClassVar[str]
    depths: ClassVar[tuple[int, ...]] = (1,)  # batches under way at once
    threads: ClassVar[tuple[int, ...]] = (1,)  # that copy at once

    def __init__(self, nbytes: int, batch: int) -> None:
        self.nbytes = nbytes
        self.batch = batch

    def processes(self) -> Sequence[int]:
        """Other processes whose CPU time the moving costs."""
        return ()

    @abstractmethod
    def prepare(self, way: str) -> Any:
        """Say what is to be moved: all that a caller does anew for each batch."""

    @abstractmethod
    def post(self, way: str, prepared: Any) -> Any:
        """Begin."""

    @abstractmethod
    def finish(self, way: str, posted: Any) -> None:
        """Wait until the bytes are where they belong."""

    @abstractmethod
    def fill(self, value: int) -> None:
        """Fill the caller's memory."""

    @abstractmethod
    def holds(self, value: int) -> bool:
        """Whether the caller's memory of the last batch is full of something."""

    def use_threads(self, n: int) -> None:  # noqa: B027 - most have one
        """Copy with n threads."""

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End processes."""


class TransportPeer(Peer):
    """Memory of this process and of a second one; blocks lie apart and in no order, the same on both sides."""

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        self.offsets = np.random.default_rng(0).permutation(batch).astype(np.int64) * 2 * nbytes
        self.target = Target({"nbytes": 2 * batch * nbytes})

    def processes(self) -> Sequence[int]:
        return (self.target.pid,)

    @abstractmethod
    def memory(self) -> np.ndarray:
        """This process's memory: uint8[2 * batch * nbytes]."""

    def fill(self, value: int) -> None:
        self.memory()[:] = value

    def holds(self, value: int) -> bool:
        memory = self.memory()
        return all((memory[at : at + self.nbytes] == value).all() for at in self.offsets.tolist())

    def close(self) -> None:
        self.target.close()


class CachePeer(Peer):
    """A cache within this process, filled with ever new prompts and read from the newest one back."""

    capacity = 2 * WORKING_SET_NBYTES

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        n = max(1, WORKING_SET_NBYTES // (nbytes * batch))
        self.caller = np.zeros((n, batch, nbytes), dtype=np.uint8)
        # An LRU cache has these still, whatever of them was read in which order.
        self._n_kept = max(1, 2 * self.capacity // (5 * nbytes * batch))
        self._n_written = self._n_read = self._at = 0

    def next_prompt(self, way: str) -> int:
        """The number of the prompt to put or get; also moves on to the next of the caller's buffers."""
        self._at = (self._at + 1) % len(self.caller)
        if way == "put":
            self._n_written, self._n_read = self._n_written + 1, 0
            return self._n_written - 1
        self._n_read += 1
        return self._n_written - 1 - (self._n_read - 1) % min(self._n_written, self._n_kept)

    @property
    def buffer(self) -> np.ndarray:
        """The caller's memory of this batch: uint8[batch, nbytes]."""
        return self.caller[self._at]

    def fill(self, value: int) -> None:
        self.caller[:] = value

    def holds(self, value: int) -> bool:
        return bool((self.buffer == value).all())


class Target:
    """The second process of a transport: this script with `--target`. `hello` is what it said."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], "--target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(settings) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the second process ended with status {self._process.wait()}")
        self.hello: dict[str, Any] = json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run(peer: Callable[[int, int], Peer], target: Callable[[int], Any] | None = None) -> None:
    """Be a worker, or with `--target` its second process.

    `target` is a generator for a number of bytes: it gives once what the first process must know, then the process
    stays until stdin ends.
    """
    with _own_stdout() as out:
        if sys.argv[1:] == ["--target"]:
            assert target is not None
            for hello in target(json.loads(sys.stdin.readline())["nbytes"]):
                _say(out, hello)
                sys.stdin.read()
        else:
            try:
                _serve(peer, out)
            except Exception as error:  # the controller reports it; the trace is for whoever reads stderr
                _say(out, {"error": f"{type(error).__name__}: {error}"})
                raise


def _serve(make: Callable[[int, int], Peer], out: TextIO) -> None:
    first = json.loads(sys.stdin.readline())
    peer = make(first["nbytes"], first["batch"])
    try:
        _check(peer)
        _say(out, {"version": importlib.metadata.version(peer.package), "depths": peer.depths, "threads": peer.threads})
        for line in sys.stdin:
            question = json.loads(line)
            peer.use_threads(question["threads"])
            _measure(peer, question["way"], question["depth"], question["seconds"] / 4)  # warm
            _say(out, _measure(peer, question["way"], question["depth"], question["seconds"]))
    finally:
        peer.close()


def _check(peer: Peer) -> None:
    """What is put is what is got."""
    for value in (9, 5):
        for way, content in (("put", value), ("get", 0)):
            peer.fill(content)
            peer.finish(way, peer.post(way, peer.prepare(way)))
        if not peer.holds(value):
            raise RuntimeError("what was got is not what was put")


def _measure(peer: Peer, way: str, depth: int, seconds: float) -> dict[str, Any]:
    """Keep `depth` batches under way for some seconds; times in seconds, a list of [prepare, post, transfer]."""
    times: list[tuple[float, float, float]] = []
    pending: deque[tuple[Any, float, float, float]] = deque()
    clock = time.perf_counter

    def begin() -> None:
        started = clock()
        prepared = peer.prepare(way)
        prepared_at = clock()
        posted = peer.post(way, prepared)
        pending.append((posted, started, prepared_at, clock()))

    def finish() -> None:
        posted, started, prepared_at, posted_at = pending.popleft()
        peer.finish(way, posted)
        times.append((prepared_at - started, posted_at - prepared_at, clock() - posted_at))

    cpu_before = _cpu_s(peer)
    started = clock()
    for _ in range(depth):
        begin()
    while clock() - started < seconds:
        finish()
        begin()
    while pending:
        finish()
    took = clock() - started
    moved = len(times) * peer.batch * peer.nbytes
    return {"moved": moved, "seconds": took, "cpu_s": _cpu_s(peer) - cpu_before, "times": times}


def _cpu_s(peer: Peer) -> float:
    """CPU seconds of this process and of the others so far; a process's clock is named by the complement of its id."""
    return time.process_time() + sum(time.clock_gettime(~pid << 3 | 2) for pid in peer.processes())


@contextlib.contextmanager
def _own_stdout() -> Iterator[TextIO]:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def _say(out: TextIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()
