"""The tcp transport with faults that a test orders while the process that they befall is running.

A fault is a file of JSON, which the next batch takes away: {"kind": "corrupt", "byte": 70000}. With {"kind": "wait"}
the batch is posted only once FILE.waiting, which it leaves in the file's place, is gone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from kvrdma.transports import TransferBatch, transports
from kvrdma.transports.faulty import Fault, FaultKind, FaultPlan, FaultyTransport


def waiting_file(file: Path) -> Path:
    return file.with_suffix(".waiting")


def add_faulty(file: Path) -> None:
    """Make the transport known in this process as "faulty"."""

    def choose(number: int, batch: TransferBatch) -> Fault | None:
        waiting = waiting_file(file)
        try:
            file.rename(waiting)
        except FileNotFoundError:
            return None
        order = json.loads(waiting.read_text())
        if order["kind"] == "wait":
            while waiting.exists():
                time.sleep(0.005)
            return None
        waiting.unlink()
        return Fault(**{**order, "kind": FaultKind(order["kind"])})

    transports.add("faulty", FaultyTransport.with_plan(FaultPlan(choose)))
