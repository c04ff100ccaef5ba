"""Policies by name, with their options: `s3fifo`, `s3fifo?threshold=1&ghost_ratio=2`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast
from urllib.parse import parse_qsl

from kvrdma.errors import ConfigError
from kvrdma.plugins import Registry
from kvrdma.policies.base import EvictionPolicy, OffloadPolicy
from kvrdma.settings import read_options

PolicyMaker: TypeAlias = Callable[[int], EvictionPolicy]
"""Makes an eviction policy for a capacity in blocks."""

policies: Registry[type[EvictionPolicy]] = Registry("policy", "kvrdma.policies")
offload_policies: Registry[type[OffloadPolicy]] = Registry("offload mode", "kvrdma.offload")


def open_policy(text: str) -> PolicyMaker:
    """Find an eviction policy by name, and read the options behind its name.

    Raises:
        ConfigError: an unknown name or option (with the nearest one), or a value that cannot be meant.
    """
    name, mark, query = text.partition("?")
    cls = policies.get(name)
    if not mark:
        return cls
    if cls.options_type is None:
        raise ConfigError(f"policy {text!r}: {name} has no options")
    try:
        given = parse_qsl(query or name, strict_parsing=True, keep_blank_values=True)
    except ValueError:
        raise ConfigError(f"policy {text!r}: options must look like {name}?name=value&name=value") from None
    if len(dict(given)) != len(given):
        raise ConfigError(f"policy {text!r}: an option is given twice")
    options: Any = read_options(cast("type[Any]", cls.options_type), dict(given), where=f"policy {text!r}")
    return partial(cast("Callable[..., EvictionPolicy]", cls), options=options)
