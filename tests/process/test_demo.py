"""A demo that is interrupted leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import PATIENCE_S, eventually

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def marked(mark: str) -> list[psutil.Process]:
    """Every process that has inherited `mark` in its environment, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEMO_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("child", ["serve", "engine.py"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(number: signal.Signals, child: str) -> None:
    """As soon as a child is there: nobody has entered it into anything yet."""
    mark = uuid.uuid4().hex
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a child inherits it ignored where nohup runs the tests
    demo = subprocess.Popen(
        [sys.executable, str(DEMO)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**psutil.Process().environ(), "DEMO_MARK": mark},
    )
    signal.signal(signal.SIGHUP, before)
    try:

        def started() -> bool:
            children = psutil.Process(demo.pid).children(recursive=True)
            return any(argument.endswith(child) for process in children for argument in process.cmdline())

        eventually(started)
        demo.send_signal(number)
        _, said = demo.communicate(timeout=PATIENCE_S)
        assert demo.returncode == 128 + number
        assert "demo interrupted" in said
        eventually(lambda: not marked(mark))
    finally:
        for process in marked(mark):
            process.kill()
        demo.wait()
        demo.stderr.close()


def test_interrupted_while_a_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt waits until the process is noted, and what is half made can be closed."""
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import processes

    class Interrupted(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(processes.subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            processes.EngineProcess(name="engine")
    finally:
        signal.signal(signal.SIGTERM, before)
    [engine] = processes.Process.running
    processes.Process.close_all()
    assert processes.Process.running == []
    assert not psutil.pid_exists(engine.pid)
