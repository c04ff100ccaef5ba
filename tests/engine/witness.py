"""A connector that watches kvrdma's: what the device held when a block was saved, and what after it was loaded.

It shares no code with kvrdma's copier or checksums: device bytes are read by torch and hashed by hashlib. One
line of JSON a block goes to $WITNESS_FILE. With $WITNESS_ALTER it alters one slot before each load, so that a
test can see the comparison fail. With $WITNESS_HOLD the pool gets no slab but its first until that file is there.
While there is a file $WITNESS_FILE.hold-get or .hold-put, the process that it names is stopped just before the
worker's next get from, or put to, the pool, and the file is removed. With $WITNESS_FAULTS the transport "faulty" is
known, with the faults of that file (planned.py). With $WITNESS_UNLOCKED the worker may not lock a page.
"""

import ctypes
import faulthandler
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from planned import add_faulty

from kvrdma.cache import BlockStatus, JobKind
from kvrdma.connectors.vllm.connector import KVRDMAConnector
from kvrdma.memory import MemfdSlabs

STACKS_AFTER_S = 4.0  # vLLM, at its defaults, kills a worker soon after
CAP_IPC_LOCK = 14

if os.environ.get("WITNESS_FAULTS"):
    add_faulty(Path(os.environ["WITNESS_FAULTS"]))


def hold_slabs(until):
    allocate, first = MemfdSlabs.allocate, []

    def held(self, nbytes):
        while first and not until.exists():
            time.sleep(0.01)
        first.append(True)
        return allocate(self, nbytes)

    MemfdSlabs.allocate = held


def refuse_page_locks():
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:  # root would not be limited
        sets[0] &= ~(1 << CAP_IPC_LOCK)
        libc.capset(header, sets)


def stopping(what, call):
    file = Path(f"{os.environ['WITNESS_FILE']}.hold-{what}")

    def stop_and_call(*args, **kwargs):
        if file.exists():
            os.kill(int(file.read_text()), signal.SIGSTOP)
            file.unlink()
        return call(*args, **kwargs)

    return stop_and_call


class WitnessConnector(KVRDMAConnector):
    def register_kv_caches(self, kv_caches):
        if os.environ.get("WITNESS_HOLD"):
            hold_slabs(Path(os.environ["WITNESS_HOLD"]))
        if os.environ.get("WITNESS_UNLOCKED"):
            refuse_page_locks()
        super().register_kv_caches(kv_caches)
        self.layers = [kv_caches[name] for name in self._kv_cache_config.kv_cache_groups[0].layer_names]
        self.loading = {}
        if self._worker._backend is not None:
            pool = self._worker._backend._inner  # behind the breaker: what is held is really asked
            pool.get_into = stopping("get", pool.get_into)
            pool.put = stopping("put", pool.put)

    def start_load_kv(self, forward_context, **kwargs):
        for job in self._connector_metadata.jobs:
            if job.kind is JobKind.LOAD:
                self.loading[job.number] = job
                if os.environ.get("WITNESS_ALTER"):
                    self._worker._pool.view(int(job.slots[0]))[100] ^= 0xFF
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_save(self):
        # The forward has ended (on the CPU it runs synchronously) and the blocks are referenced.
        for job in self._connector_metadata.jobs:
            if job.kind is JobKind.SAVE:
                self.note("saved", job)
        super().wait_for_save()

    def get_transfer_results(self, finished_req_ids):
        results = super().get_transfer_results(finished_req_ids)
        for report in self._worker._reports:
            job = self.loading.pop(report.number, None)
            if job is not None and (report.status == BlockStatus.OK).all():
                self.note("loaded", job)
        return results

    def shutdown(self):
        faulthandler.dump_traceback_later(STACKS_AFTER_S, file=sys.__stderr__)  # into the log of an end that hangs
        super().shutdown()
        faulthandler.cancel_dump_traceback_later()
        self.write([{"what": "shutdown", "half": "worker" if self._worker is not None else "scheduler"}])

    def note(self, what, job):
        lines = []
        for key, block in zip(job.keys, job.blocks.tolist(), strict=True):
            digest = hashlib.sha256()
            for layer in self.layers:
                digest.update(layer[block].contiguous().view(torch.uint8).numpy().tobytes())
            tail = self.layers[-1][block].contiguous().view(torch.uint8).numpy().tobytes()[-64:]
            lines.append({"what": what, "key": key.tobytes().hex(), "digest": digest.hexdigest(), "tail": tail.hex()})
        self.write(lines)

    def write(self, lines):
        with open(os.environ["WITNESS_FILE"], "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
