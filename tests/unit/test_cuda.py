"""The CUDA copier: what can be held without a device, and the same as on the CPU with one."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from kvrdma.layout import BlockLayout, ByteRun
from kvrdma.memory import PinnedPool
from kvrdma.memory.cuda import copy_columns


def test_columns_name_every_run_of_every_block() -> None:
    layout = BlockLayout(10, (ByteRun("a", 1000, 50, 50), ByteRun("b", 9000, 80, 30)))
    with PinnedPool(layout.nbytes, 8, slab_nbytes=4 * 128) as pool:  # four slots a slab
        device, host, sizes = copy_columns(layout, pool, np.array([2, 7]), np.array([1, 6]))
        assert device.tolist() == [1000 + 2 * 50, 9000 + 2 * 80, 1000 + 7 * 50, 9000 + 7 * 80]
        first, second = (pool.view(slot).ctypes.data for slot in (1, 6))
        assert host.tolist() == [first, first + 50, second, second + 50]
        assert sizes.tolist() == [50, 30, 50, 30]


def cuda_device() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device(), reason="needs a CUDA device: run it on a machine that has one")
def test_gather_and_scatter_on_a_device() -> None:
    import torch

    from kvrdma.memory.cuda import CudaCopier

    layers = [torch.randint(0, 255, (40, 4096), dtype=torch.uint8, device="cuda") for _ in range(3)]
    layout = BlockLayout(
        40, tuple(ByteRun(str(i), x.data_ptr(), 4096, 4096) for i, x in enumerate(layers)), "cuda:0", layers
    )
    with PinnedPool(layout.nbytes, 40, slab_nbytes=16 * layout.nbytes) as pool:
        copier = CudaCopier("cuda:0")
        copier.register(layout, pool)
        blocks, slots = np.arange(40)[::-1].copy(), np.random.default_rng(0).permutation(40)
        before = [layer.clone() for layer in layers]
        copier.gather(0, blocks, slots, after=copier.fence()).wait()
        for layer in layers:
            layer.zero_()
        copier.scatter(0, blocks, slots, after=copier.fence()).wait()
        copier.close()
    assert all(torch.equal(a, b) for a, b in zip(before, layers, strict=True))
