"""AIBrix's L1Cache, with LRU as the others: put from tensors; acquire, copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from aibrix_kvcache.cache_hashable import TokenListView
from aibrix_kvcache.l1 import L1Cache
from aibrix_kvcache.memory import TensorPoolAllocator
from aibrix_kvcache.spec import KVCacheBlockLayout, KVCacheBlockSpec, KVCacheTensorSpec
from worker import CachePeer, run

BLOCK_TOKENS = 16
HEAD_SIZE = 64


class L1(CachePeer):
    package = "aibrix-kvcache"
    threads = (1, 2)

    def __init__(self, nbytes: int, batch: int) -> None:
        super().__init__(nbytes, batch)
        layers = nbytes // (2 * BLOCK_TOKENS * HEAD_SIZE * 2)
        tensors = KVCacheTensorSpec(heads=[0], layers=list(range(layers)), head_size=HEAD_SIZE)
        self._spec = KVCacheBlockSpec(BLOCK_TOKENS, torch.bfloat16, KVCacheBlockLayout.NCLD, tensors)
        allocator = TensorPoolAllocator.create(capacity_nbytes=self.capacity + (64 << 20))
        self._cache = L1Cache("LRU", self.capacity, allocator, self._spec)
        self._tensors = torch.from_numpy(self.caller)

    def _rows(self) -> list[torch.Tensor]:
        rows = self._tensors[self._at].view(torch.bfloat16).view(self.batch, *self._spec.block_shape)
        return list(rows)

    def use_threads(self, n: int) -> None:
        torch.set_num_threads(n)

    def prepare(self, way: str) -> TokenListView:
        width = self.batch * BLOCK_TOKENS
        first = self.next_prompt(way) * width
        return TokenListView(np.arange(first, first + width, dtype=np.int32))

    def post(self, way: str, prepared: TokenListView) -> Any:
        if way == "put":
            return prepared
        status = self._cache.acquire(None, prepared)
        if not status.is_ok() or len(status.get()) != self.batch:
            raise RuntimeError(f"a get was not served: {status}")
        return status.get()

    def finish(self, way: str, posted: Any) -> None:
        if way == "put":
            status = self._cache.put(None, posted, self._rows())
            if not status.is_ok() or status.get() != self.batch:
                raise RuntimeError(f"a put was not taken: {status}")
            return
        for row, region in zip(self._rows(), posted, strict=True):
            row.copy_(region.to_tensor(self._spec.block_dtype, self._spec.block_shape))
            region.ref_down()


if __name__ == "__main__":
    run(L1)
