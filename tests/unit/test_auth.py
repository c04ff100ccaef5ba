"""Proofs: what they depend on. Tokens: where they come from."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.auth import NONCE_NBYTES, PROOF_NBYTES, Role, check_proof, derive_secret, make_nonce, prove
from kvrdma.errors import ConfigError
from kvrdma.settings import Settings, find_token

SAID = st.lists(st.binary(max_size=20), max_size=4)


@given(secret=st.binary(max_size=64), said=SAID)
def test_a_proof_holds_for_what_it_was_made_for(secret: bytes, said: list[bytes]) -> None:
    proof = prove(secret, Role.CLIENT, b"purpose", *said)
    assert len(proof) == PROOF_NBYTES
    assert check_proof(proof, secret, Role.CLIENT, b"purpose", *said)
    assert not check_proof(proof, secret, Role.SERVER, b"purpose", *said)
    assert not check_proof(proof, secret, Role.CLIENT, b"purposes", *said)
    assert not check_proof(proof, secret + b"x", Role.CLIENT, b"purpose", *said)
    assert not check_proof(proof[:-1], secret, Role.CLIENT, b"purpose", *said)
    assert not check_proof(derive_secret(secret, b"purpose", *said), secret, Role.CLIENT, b"purpose", *said)


@given(one=SAID, other=SAID)
def test_what_was_said_counts_part_by_part(one: list[bytes], other: list[bytes]) -> None:
    """Moving a byte from one part to the next is saying something else."""
    proof = prove(b"secret", Role.CLIENT, b"purpose", *one)
    assert check_proof(proof, b"secret", Role.CLIENT, b"purpose", *other) == (one == other)


def test_nonces_are_fresh() -> None:
    assert len({make_nonce() for _ in range(1000)}) == 1000
    assert len(make_nonce()) == NONCE_NBYTES


def test_a_token_comes_from_a_file_first(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("  from-the-file-0123456789\n")
    environ = {"KVRDMA_TOKEN": "from-the-environment-0123"}
    assert find_token(str(file), environ) == b"from-the-file-0123456789"
    assert find_token("", environ) == b"from-the-environment-0123"
    assert find_token("", {}) is None


@pytest.mark.parametrize("content", [b"", b" \n", b"secret-of-15-by", b"x" * 5000])
def test_a_token_that_is_no_secret_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="16 to 4096") as raised:
        find_token(str(file), {})
    assert "secret-of" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_a_token_file_that_is_not_there_is_an_error_and_not_an_open_door(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        find_token(str(tmp_path / "nothing"), {"KVRDMA_TOKEN": "from-the-environment-0123"})


def test_the_environments_token_is_no_setting() -> None:
    settings = Settings.from_environment({"KVRDMA_TOKEN": "from-the-environment-0123", "KVRDMA_NAMESPACE": "n"})
    assert settings.namespace == "n"
    assert "from-the-environment" not in repr(settings)
