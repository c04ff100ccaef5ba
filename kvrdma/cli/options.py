"""What the commands' options have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvrdma.errors import ConfigError

T = TypeVar("T")


def read_option(name: str, value: object, parse: Callable[[object], T]) -> T:
    """Read an option by a parser of `kvrdma.settings`; raises `ConfigError`, which names the option."""
    try:
        return parse(value)
    except ValueError as error:
        raise ConfigError(f"{name} {value!r}: must be {error}") from None
