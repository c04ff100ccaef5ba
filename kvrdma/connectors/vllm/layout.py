"""Where a vLLM rank's KV blocks lie in its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvrdma.connectors.vllm.identity import attention_spec
from kvrdma.errors import ConfigError
from kvrdma.layout import BlockLayout, ByteRun

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheConfig


def make_layout(kv_cache_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]) -> BlockLayout:
    """One run a layer, in the group's order.

    Raises:
        ConfigError: a layer whose block is not one contiguous range of bytes.
    """
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    page = int(attention_spec(kv_cache_config).page_size_bytes)
    runs = []
    for name in kv_cache_config.kv_cache_groups[0].layer_names:
        cache = group_kernel_blocks(kv_caches[name], kv_cache_config.num_blocks)
        if not _is_dense(cache[0]) or cache[0].numel() * cache.element_size() != page:
            raise ConfigError(
                f"{name}: a block of shape {tuple(cache.shape[1:])} and strides {cache.stride()[1:]} is not one "
                f"range of {page} bytes; kvrdma needs the layout LBHNC or LBNHC"
            )
        runs.append(ByteRun(name, cache.data_ptr(), cache.stride(0) * cache.element_size(), page))
    device = str(next(iter(kv_caches.values())).device)
    return BlockLayout(kv_cache_config.num_blocks, tuple(runs), device, keepalive=kv_caches)


def _is_dense(block: torch.Tensor) -> bool:
    """Whether the elements fill one range without gaps, in whatever order of their dimensions."""
    expected = 1
    for stride, size in sorted(zip(block.stride(), block.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
