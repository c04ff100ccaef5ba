"""Shards, layouts of device blocks, and checksums."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.errors import ConfigError, ProtocolError
from kvrdma.layout import SHARD_NBYTES, BlockLayout, ByteRun, Shard, checksum

SHARD = Shard(1, 0, 32, 8, 16)


@given(st.lists(st.integers(0, 65535), min_size=5, max_size=5))
def test_a_shard_comes_back(numbers: list[int]) -> None:
    try:
        shard = Shard(*numbers)
    except ConfigError:
        assert numbers[1] >= numbers[2] or numbers[3] >= numbers[4]
        return
    raw = shard.encode()
    assert len(raw) == SHARD_NBYTES
    assert Shard.decode(raw) == shard


def test_a_shard_is_the_same_bytes_everywhere() -> None:
    assert SHARD.encode().hex() == "01000000200008001000"


@pytest.mark.parametrize(
    "numbers", [(-1, 0, 1, 0, 1), (0, 0, 65536, 0, 1), (0, 1, 1, 0, 1), (0, 2, 1, 0, 1), (0, 0, 1, 5, 5)]
)
def test_what_is_no_shard(numbers: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="shard"):
        Shard(*numbers)


@given(st.binary(max_size=14))
def test_any_bytes_are_a_shard_or_a_protocol_error(raw: bytes) -> None:
    try:
        shard = Shard.decode(raw)
    except ProtocolError:
        return
    assert shard.encode() == raw


def test_a_layout_adds_up() -> None:
    layout = BlockLayout(4, (ByteRun("k", 4096, 100, 60), ByteRun("v", 8192, 40, 40)))
    assert layout.nbytes == 100


@pytest.mark.parametrize("run", [ByteRun("k", 4096, 10, 11), ByteRun("k", 4096, 10, 0), ByteRun("k", 4096, -10, -20)])
def test_a_run_fits_its_stride(run: ByteRun) -> None:
    with pytest.raises(ConfigError, match="k"):
        BlockLayout(4, (run,))


def test_a_layout_without_runs() -> None:
    with pytest.raises(ConfigError, match="no runs"):
        BlockLayout(4, ())


@pytest.mark.parametrize("n_blocks", [0, -1])
def test_a_layout_without_blocks(n_blocks: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 block"):
        BlockLayout(n_blocks, (ByteRun("k", 4096, 10, 10),))


def test_a_checksum_is_the_same_everywhere() -> None:
    """xxh3-64, seeded by that of key and shard: stored beside blocks in pools, so never to change."""
    assert checksum(b"k" * 16, SHARD.encode(), [b"payload"]) == 6381962862467120405


@given(payload=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_a_checksum_does_not_depend_on_the_parts(payload: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(payload), *(min(cut, len(payload)) for cut in cuts)})
    parts = [np.frombuffer(payload, dtype=np.uint8)[a:b] for a, b in itertools.pairwise(edges)]
    whole = checksum(b"k" * 16, SHARD.encode(), [payload])
    assert checksum(b"k" * 16, SHARD.encode(), parts) == whole


@given(payload=st.binary(min_size=1, max_size=100), bit=st.integers(0, 799))
def test_a_checksum_is_of_key_shard_and_every_bit(payload: bytes, bit: int) -> None:
    whole = checksum(b"k" * 16, SHARD.encode(), [payload])
    changed = bytearray(payload)
    changed[bit // 8 % len(payload)] ^= 1 << bit % 8
    assert checksum(b"k" * 16, SHARD.encode(), [changed]) != whole
    assert checksum(b"l" * 16, SHARD.encode(), [payload]) != whole
    assert checksum(b"k" * 16, Shard(1, 0, 32, 0, 8).encode(), [payload]) != whole
