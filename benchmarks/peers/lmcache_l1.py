"""LMCache's LocalCPUBackend: allocate, copy, put; get, copy."""

from __future__ import annotations

import os
from typing import Any

os.environ["LMCACHE_LOG_LEVEL"] = "ERROR"  # else it logs every eviction

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from worker import CachePeer, run

HEAD_SIZE = 64


class LocalCpu(CachePeer):
    package = "lmcache"
    threads = (1, 2)

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        tokens, layers = 16, nbytes // (2 * 16 * HEAD_SIZE * 2)
        self._shape = torch.Size([2, layers, tokens, HEAD_SIZE])
        self._backend = LocalCPUBackend(
            LMCacheEngineConfig.from_defaults(chunk_size=tokens, max_local_cpu_size=self.capacity / 2**30),
            LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, (layers, 2, tokens, 1, HEAD_SIZE)),
        )
        self._tensors = torch.from_numpy(self.caller)

    def _rows(self) -> torch.Tensor:
        return self._tensors[self._at].view(torch.bfloat16).view(self.batch, *self._shape)

    def use_threads(self, n: int) -> None:
        torch.set_num_threads(n)

    def prepare(self, way: str) -> list[CacheEngineKey]:
        first = self.next_prompt(way) * self.batch
        return [CacheEngineKey("bench", 1, 0, first + i, torch.bfloat16) for i in range(self.batch)]

    def post(self, way: str, prepared: list[CacheEngineKey]) -> tuple[list[CacheEngineKey], list[Any]]:
        if way == "put":  # batched_allocate can evict where a batch is the layers of one chunk only
            allocate, shape, dtype = self._backend.allocate, self._shape, torch.bfloat16
            objects = [allocate(shape, dtype, MemoryFormat.KV_2LTD) for _ in prepared]
        else:
            objects = [self._backend.get_blocking(key) for key in prepared]
        if None in objects:
            raise RuntimeError(f"a {way} was not taken")
        return prepared, objects

    def finish(self, way: str, posted: tuple[list[CacheEngineKey], list[Any]]) -> None:
        keys, objects = posted
        for row, thing in zip(self._rows(), objects, strict=True):
            if way == "put":
                thing.tensor.copy_(row)
            else:
                row.copy_(thing.tensor)
        if way == "put":
            self._backend.batched_submit_put_task(keys, objects)
        for thing in objects:
            thing.ref_count_down()


if __name__ == "__main__":
    run(LocalCpu)
