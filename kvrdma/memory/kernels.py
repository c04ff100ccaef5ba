"""Kernels that run on the device. Imported only where there is one: needs Triton."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def move_ranges(rows, runs, index, n_runs, row_words, to_rows: tl.constexpr, step: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program for each range of each block. `runs` holds the runs' addresses, strides (bytes), places in a row and
    sizes (words of 8 bytes), int64[4, n_runs]; `rows` is int64[:, row_words]."""
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    block = tl.load(index + row)
    there = (tl.load(runs + run) + block * tl.load(runs + n_runs + run)).to(tl.pointer_type(tl.int64))
    here = rows + row * row_words + tl.load(runs + 2 * n_runs + run)
    words = tl.load(runs + 3 * n_runs + run)
    for first in range(0, words, step):
        at = first + tl.arange(0, step)
        inside = at < words
        if to_rows:
            tl.store(here + at, tl.load(there + at, mask=inside), mask=inside)
        else:
            tl.store(there + at, tl.load(here + at, mask=inside), mask=inside)
