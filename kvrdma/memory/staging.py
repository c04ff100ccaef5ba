"""Blocks put together on the device: their ranges become one, which a copy to or from the host moves at once.

A block is one range a layer, and a DMA engine takes a fraction of a microsecond for each, however short it is:
ranges of 8 KiB, as eight-way tensor parallelism makes them, reach a fifth of the bus to the host and a fifteenth
from it. Device memory is some fifty times faster than the bus, so a kernel gathers a block's ranges there first.
Needs Triton, which comes with torch for CUDA.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from kvrdma.errors import ConfigError
from kvrdma.layout import BlockLayout, Int64s

STAGE_NBYTES: Final = 32 << 20  # of device memory, for each direction and group of layers
_WORD_NBYTES: Final = 8


class Stage:
    """A buffer on the device of `n_rows` whole blocks, and what moves blocks into and out of it.

    Calls are queued on the caller's current stream, one behind the other; `index` is an int64 tensor of block
    numbers on the device, at most `n_rows` of them, each once where it is unpacked.

    Raises:
        ConfigError: ranges that do not lie on multiples of 8 bytes.
        ImportError: no Triton. It and torch raise errors of their own where there is no memory or no compiler.
    """

    def __init__(self, layout: BlockLayout, device: Any, *, nbytes: int = STAGE_NBYTES) -> None:
        import torch

        from kvrdma.memory.kernels import move_ranges

        columns = np.array([(run.address, run.block_stride, run.nbytes) for run in layout.runs], dtype=np.int64).T
        if (columns % _WORD_NBYTES).any():
            raise ConfigError(f"block layout: ranges that do not lie on multiples of {_WORD_NBYTES} bytes")
        addresses, strides, words = columns[0], columns[1], columns[2] // _WORD_NBYTES
        self.n_rows = max(1, min(layout.n_blocks, nbytes // layout.nbytes))
        self._row_nbytes = layout.nbytes
        self._rows = torch.empty((self.n_rows, layout.nbytes // _WORD_NBYTES), dtype=torch.int64, device=device)
        self._runs = torch.from_numpy(np.stack([addresses, strides, np.cumsum(words) - words, words])).to(device)
        self._move: Any = move_ranges
        first = torch.zeros(1, dtype=torch.int64, device=device)
        self.pack(first)  # compiles; nothing runs on the device's blocks yet
        self.unpack(first)
        torch.cuda.current_stream(device).synchronize()

    def addresses(self, n: int) -> Int64s:
        """Of the first `n` rows."""
        first = int(self._rows.data_ptr())
        return np.arange(first, first + n * self._row_nbytes, self._row_nbytes, dtype=np.int64)

    def pack(self, index: Any) -> None:
        """Copy blocks into the first rows, in the order of the index."""
        self._launch(index, to_rows=True)

    def unpack(self, index: Any) -> None:
        """Copy the first rows into blocks."""
        self._launch(index, to_rows=False)

    def _launch(self, index: Any, *, to_rows: bool) -> None:
        grid = (len(index), self._runs.shape[1])
        self._move[grid](self._rows, self._runs, index, grid[1], self._rows.shape[1], to_rows=to_rows, step=1024)
