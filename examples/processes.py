"""Starts and ends the processes of the demo and of the engine tests: pool servers, and engines driven by JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 60.0  # for an end that was asked for, an engine's own time-outs included; then it is killed
TAIL_LINES = 25
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ProcessError(RuntimeError):
    """A process ended, or did not answer; the message has the end of its log."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back that would interrupt: between the start of a process and the note of it."""
    if threading.current_thread() is not threading.main_thread():  # handlers run on the main thread only
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda came_now, _: came.append(came_now)) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class Process:
    """A child in a session of its own, so that it can be ended with all that it started."""

    running: ClassVar[list[Process]] = []  # those not closed yet

    def __init__(self, arguments: list[str], *, name: str, env: dict[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        self._whole_log = ""  # once it is closed
        with uninterrupted():
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
            Process.running.append(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """What it has written to stderr so far; all of it once it is closed."""
        return self._whole_log if self._log.closed else Path(self._log.name).read_text(errors="replace")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def close(self) -> int:
        """End it and its children; gives its exit status. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        with contextlib.suppress(ProcessLookupError):  # the children of one that was killed
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        self._whole_log = self.log()
        self._log.close()
        with contextlib.suppress(ValueError):
            Process.running.remove(self)
        return status

    @classmethod
    def close_all(cls) -> None:
        """End all that were started and not closed, the last one first."""
        for process in reversed(cls.running.copy()):
            process.close()

    def failed(self, what: str) -> ProcessError:
        tail = "\n".join(self.log().splitlines()[-TAIL_LINES:])
        return ProcessError(f"{self.name}: {what}; the end of its log:\n{tail}")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Process):
    """`kvrdma serve` on a free port, or on the one given."""

    def __init__(self, *, capacity: str = "512MiB", port: int = 0, env: dict[str, str] | None = None) -> None:
        command = ["-m", "kvrdma", "serve", "--port", str(port), "--capacity", capacity]
        super().__init__(command, name="kvrdma-serve", env=env)
        try:
            self.address = self._wait_listening()
        except BaseException:  # an interrupt too: nobody else knows of the process yet
            self.close()
            raise

    def _wait_listening(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            for line in self.log().splitlines(keepends=True):
                if line.startswith("listening on ") and line.endswith("\n"):
                    return line.split()[-1]
            time.sleep(0.02)
        raise self.failed("did not start")

    @property
    def url(self) -> str:
        return f"kvrdma://{self.address}"

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])

    def stats(self) -> dict[str, Any]:
        from kvrdma.backends import open_backend
        from kvrdma.settings import Settings

        with open_backend(self.url, Settings()) as backend:
            return backend.stats(timeout=5)


class EngineProcess(Process):
    """examples/engine.py; `start` begins it, the other calls wait until it is ready."""

    def __init__(self, *, name: str, env: dict[str, str] | None = None, **options: Any) -> None:
        self._ready = False
        super().__init__([str(HERE / "engine.py"), json.dumps(options)], name=name, env=env)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer; raises `ProcessError`."""
        self.wait_ready()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self.failed(f"takes no commands ({error})") from None
        return self._answer()

    def generate(self, tokens: list[int], *, max_tokens: int = 64, id: str = "request") -> dict[str, Any]:
        """Answer a prompt, from the request to its last token."""
        self.ask("add", id=id, tokens=tokens, max_tokens=max_tokens)
        return self.ask("wait", id=id)

    def wait_ready(self) -> None:
        """Until the engine has started."""
        if not self._ready:
            self._answer()
            self._ready = True

    def close(self) -> int:
        """Let the engine shut down, and with it the connector; then end what is left."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # no more commands: it ends by itself
        if self._ready:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        return super().close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise self.failed(f"ended with status {self._process.poll()}")
        answer = json.loads(line)
        if "error" in answer:
            raise self.failed(answer["error"])
        return answer
