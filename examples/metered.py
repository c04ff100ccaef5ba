"""kvrdma's connector, with the CPU time measured that it takes from an engine: in its hooks and in its threads.

Each process that holds a half of the connector answers whoever connects to the socket `$METER_FOLDER/PID`. Counted:
- hooks: CPU time of the calling thread between the entry and the end of each hook, in the scheduler's process and
  in the worker's. Not the two hooks that are called for every layer: they are empty, and measuring them would cost
  more than they do.
- threads: CPU time, user and kernel, of every thread whose name begins with "kvrdma-": copies, checksums, and what
  the kernel does for the tcp transport on the client's side.
Not counted: what vLLM itself does more with any connector, such as sending what the hooks return from process to
process; and the pool server, which is another program.
"""

import contextlib
import functools
import inspect
import os
import threading
import time
from multiprocessing.connection import Listener
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvrdma.connectors.vllm.connector import KVRDMAConnector

A_LAYER = {"wait_for_layer_load", "save_kv_layer"}


class Meter:
    """The CPU seconds of this process so far."""

    def __init__(self) -> None:
        self.hooks_s = 0.0
        self._threads_ns: dict[int, int] = {}  # by thread id; those that have ended keep what was seen last
        self._listener = Listener(f"{os.environ['METER_FOLDER']}/{os.getpid()}", "AF_UNIX")
        threading.Thread(target=self._answer, name="meter", daemon=True).start()

    def read(self) -> dict[str, float]:
        for thread in threading.enumerate():
            if thread.name.startswith("kvrdma-"):
                with contextlib.suppress(FileNotFoundError):  # it has just ended
                    schedstat = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
                    self._threads_ns[thread.native_id] = int(schedstat.split()[0])
        return {"hooks_s": self.hooks_s, "threads_s": sum(self._threads_ns.values()) / 1e9}

    def _answer(self) -> None:
        while True:
            with self._listener.accept() as connection:
                connection.send(self.read())


@functools.cache
def meter() -> Meter:
    return Meter()


def metered(hook):
    @functools.wraps(hook)
    def call(self, *args, **kwargs):
        started = time.thread_time()
        try:
            return hook(self, *args, **kwargs)
        finally:
            meter().hooks_s += time.thread_time() - started

    return call


class MeteredConnector(KVRDMAConnector):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        meter()


for name, hook in vars(KVRDMAConnector).items():
    if inspect.isfunction(hook) and name[0] != "_" and name not in A_LAYER and hasattr(KVConnectorBase_V1, name):
        setattr(MeteredConnector, name, metered(hook))
