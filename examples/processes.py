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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 180.0
TAIL_LINES = 25


class ProcessError(RuntimeError):
    """A process ended, or did not answer; the message has the end of its log."""


class Process:
    """A child in a session of its own, so that it can be ended with all that it started."""

    def __init__(self, arguments: list[str], *, name: str, env: dict[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float) -> int:
        return self._process.wait(timeout)

    def close(self, timeout: float = 20.0) -> int:
        """End it and its children; gives its exit status. Idempotent."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
        with contextlib.suppress(ProcessLookupError):  # the children of one that was killed
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._log.close()
        return status

    def failed(self, what: str) -> ProcessError:
        tail = "\n".join(self.log().splitlines()[-TAIL_LINES:])
        return ProcessError(f"{self.name}: {what}; the end of its log:\n{tail}")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Process):
    """`kvrdma serve` on a free port, or on the one given."""

    def __init__(self, *, capacity: str = "512MiB", port: int = 0) -> None:
        super().__init__(["-m", "kvrdma", "serve", "--port", str(port), "--capacity", capacity], name="kvrdma-serve")
        self.address = ""
        listening = threading.Event()

        def follow() -> None:
            while self._process.poll() is None and not listening.wait(0.02):
                for line in self.log().splitlines():
                    if line.startswith("listening on "):
                        self.address = line.split()[-1]
                        listening.set()
            listening.set()

        threading.Thread(target=follow, daemon=True).start()
        listening.wait(START_TIMEOUT_S)
        if not self.address:
            error = self.failed("did not start")
            self.close()
            raise error

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
        super().__init__([str(HERE / "engine.py"), json.dumps(options)], name=name, env=env)
        self._ready = False

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

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise self.failed(f"ended with status {self._process.poll()}")
        answer = json.loads(line)
        if "error" in answer:
            raise self.failed(answer["error"])
        return answer
