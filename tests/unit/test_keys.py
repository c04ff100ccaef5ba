"""Block keys: equal everywhere, for ever, and different wherever blocks are not interchangeable."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.errors import ConfigError
from kvrdma.keys import BlockKey, KeyChain, KeySpace, block_keys, pack_keys, unpack_keys

SPACE = KeySpace(
    model="org/model",
    weights="9f86d081884c7d65",
    config="2c26b46b68ffc68f",
    kv_dtype="bfloat16",
    attention="FLASH_ATTN/NHD",
    head_size=128,
    layers=32,
    block_tokens=4,
    namespace="team",
)
TOKENS = [0, 1, 2, 3, 128_255, 2_147_483_647, 5, 6, -1, 8, 9, 10, 11]

# Written down once. Stored blocks are found by these on other machines, under other Pythons and in later versions:
# a change here makes every pool forget what it holds, and needs a new LAYOUT_VERSION.
DIGEST = "c45b9906c65e1962eb8775228fef05e03e84c07828c1279421a22d4bdfacf49f"
KEYS = ["7317c6a123a36d51468487cb92063a42", "c55742cb9be8fe6109e9c5e7402cc6b7", "8d5627c2ff5a3c6d8170bf900c140969"]
KEYS_WITH_EXTRAS = [
    "7317c6a123a36d51468487cb92063a42",
    "e22b11e8ccf56669387db7cc8419db16",
    "887558c8f3d44a46ce350984bcaf5584",
]
EXTERNAL = "93fe9bd0bd8227307e2b45969710bdcc"
EXTERNAL_WITH_PARENT = "24d07fea5f41f179229cfe39b70aac8d"

CHANGES = {
    "model": "org/other",
    "weights": "9f86d081884c7d66",
    "config": "",
    "kv_dtype": "fp8_e4m3",
    "attention": "FLASHINFER/HND",
    "head_size": 64,
    "layers": 31,
    "block_tokens": 2,
    "namespace": "",
    "epoch": "0" * 31 + "1",
    "layout_version": 2,
}


def extras(block: int) -> bytes:
    return b"lora" if block == 1 else b""


def hexed(keys: list[bytes]) -> list[str]:
    return [key.hex() for key in keys]


def test_golden_vectors() -> None:
    assert SPACE.digest.hex() == DIGEST
    assert hexed(block_keys(SPACE, TOKENS)) == KEYS
    assert hexed(block_keys(SPACE, TOKENS, extras=extras)) == KEYS_WITH_EXTRAS
    assert BlockKey.external(SPACE, "sglang", b"\0hash").hex() == EXTERNAL
    assert BlockKey.external(SPACE, "sglang", b"\0hash", parent=bytes.fromhex(KEYS[0])).hex() == EXTERNAL_WITH_PARENT


@pytest.mark.parametrize("seed", ["0", "12345"])
def test_equal_in_every_process(seed: str) -> None:
    """Whatever PYTHONHASHSEED is there."""
    program = f"from kvrdma.keys import *; print([k.hex() for k in block_keys({SPACE!r}, {TOKENS!r})])"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == repr(KEYS)


def test_every_field_is_tried() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(KeySpace)}


@pytest.mark.parametrize("field", CHANGES)
def test_any_field_changes_every_key(field: str) -> None:
    other = dataclasses.replace(SPACE, **{field: CHANGES[field]})
    assert other.digest != SPACE.digest
    assert not set(block_keys(other, TOKENS)) & set(block_keys(SPACE, TOKENS))
    assert BlockKey.external(other, "e", b"x") != BlockKey.external(SPACE, "e", b"x")
    assert SPACE.differs(other) == other.differs(SPACE) == [field]


def test_fields_do_not_run_into_each_other() -> None:
    one = dataclasses.replace(SPACE, model="ab", weights="c")
    two = dataclasses.replace(SPACE, model="a", weights="bc")
    assert one.digest != two.digest


def test_fields_come_back() -> None:
    assert KeySpace.from_fields(SPACE.to_fields()) == SPACE
    assert SPACE.differs(SPACE) == []


@pytest.mark.parametrize(
    "change",
    [
        {"head_size": "128"},
        {"layers": True},
        {"layers": 32.0},
        {"model": None},
        {"model": b"org/model"},
        {"kv_dtype": "auto"},
        {"block_tokens": 0},
        {"epoch": ""},
        {"epoch": "0" * 31},
        {"epoch": "z" * 32},
    ],
)
def test_what_is_no_key_space(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        KeySpace.from_fields({**SPACE.to_fields(), **change})


def test_missing_and_unknown_fields_are_named() -> None:
    fields = SPACE.to_fields()
    with pytest.raises(ConfigError, match="colour"):
        KeySpace.from_fields({**fields, "colour": "red"})
    del fields["epoch"]
    with pytest.raises(ConfigError, match="epoch"):
        KeySpace.from_fields(fields)


def test_a_key_is_of_all_tokens_before_it() -> None:
    for i in range(12):
        changed = list(TOKENS)
        changed[i] ^= 1
        same = [a == b for a, b in zip(block_keys(SPACE, changed), block_keys(SPACE, TOKENS), strict=True)]
        assert same == [block < i // 4 for block in range(3)]


def test_extras_tell_blocks_apart() -> None:
    plain, marked = block_keys(SPACE, TOKENS), block_keys(SPACE, TOKENS, extras=extras)
    assert [a == b for a, b in zip(plain, marked, strict=True)] == [True, False, False]
    assert block_keys(SPACE, TOKENS, extras=lambda _: b"") == plain


def test_only_full_blocks_have_keys() -> None:
    assert [len(block_keys(SPACE, TOKENS[:n])) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


@given(
    tokens=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=5),
)
def test_grown_tokens_give_the_same_keys(tokens: list[int], cuts: list[int]) -> None:
    """Whatever the steps in which a sequence grew, as a list or an array."""
    whole = block_keys(SPACE, tokens)
    chain = KeyChain(SPACE)
    for cut in sorted(cuts):
        assert chain.advance(tokens[:cut])
    assert chain.advance(np.array(tokens, dtype=np.int32))
    assert list(chain.keys) == whole
    assert len(chain) == len(whole)
    assert chain.advance(tokens[:1])
    assert list(chain.keys) == whole


def test_slices_give_the_same_keys() -> None:
    """With hardly any time each call hashes a slice, and says whether more is to come."""
    tokens = np.arange(4 * 1000, dtype=np.int32)
    calls: list[int] = []

    def note(block: int) -> bytes:
        calls.append(block)
        return block.to_bytes(2, "little")

    whole = block_keys(SPACE, tokens, extras=lambda block: block.to_bytes(2, "little"))
    chain = KeyChain(SPACE, extras=note)
    turns = 0
    while not chain.advance(tokens, budget_s=1e-9) and turns < 10_000:
        turns += 1
        assert list(chain.keys) == whole[: len(chain)]
    while not chain.advance(tokens, budget_s=10.0):
        pass
    assert list(chain.keys) == whole
    assert calls == list(range(1000))  # each block once


@given(st.lists(st.binary(min_size=16, max_size=16), max_size=20))
def test_packed_keys_come_back(keys: list[bytes]) -> None:
    """Trailing zeros too."""
    batch = pack_keys(keys)
    assert batch.dtype == np.uint8
    assert batch.shape == (len(keys), 16)
    assert unpack_keys(batch) == keys
    assert unpack_keys(batch[::-1]) == keys[::-1]


# -- an engine's own hashes


def test_external_keys_are_a_domain_of_their_own() -> None:
    """No choice of the opaque part gives a token's key, and engines do not meet each other."""
    message = bytes(16) + np.array(TOKENS[:4], dtype="<i4").tobytes()
    external = BlockKey.external(SPACE, "", message)
    assert external not in block_keys(SPACE, TOKENS)
    assert len(external) == 16


@pytest.mark.parametrize(
    "other",
    [
        lambda: BlockKey.external(SPACE, "f", b"hash"),
        lambda: BlockKey.external(SPACE, "e", b"hash\0"),
        lambda: BlockKey.external(SPACE, "e", b""),
        lambda: BlockKey.external(SPACE, "eh", b"ash"),
        lambda: BlockKey.external(SPACE, "e", b"hash", parent=b"p" * 16),
    ],
)
def test_external_keys_differ(other: Callable[[], bytes]) -> None:
    assert other() != BlockKey.external(SPACE, "e", b"hash")


@pytest.mark.parametrize("parent", [b"", b"short", b"p" * 17])
def test_a_parent_is_a_key(parent: bytes) -> None:
    """Of another length it could run into what stands beside it."""
    with pytest.raises(ConfigError, match="parent"):
        BlockKey.external(SPACE, "e", b"hash", parent=parent)
