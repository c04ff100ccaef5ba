"""Registries: every family of parts by name, open to third parties through entry points."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from kvrdma.errors import ConfigError
from kvrdma.settings import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Parts of one kind by name. An entry point is imported when its name is first asked for.

    kvrdma's own parts are entry points of kvrdma's; those of other distributions stand beside them.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._loaded: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._loaded, *(point.name for point in entry_points(group=self.group))}))

    def add(self, name: str, part: T) -> None:
        """Add a part from within the process (tests, notebooks); an entry point needs no call."""
        self._loaded[name] = part

    def get(self, name: str) -> T:
        """Find a part by name.

        Raises:
            ConfigError: no such name (with the nearest one), or its module cannot be imported.
        """
        if name not in self._loaded:
            points = entry_points(group=self.group, name=name)
            if not points:
                raise ConfigError(f"unknown {self.kind} {name!r}{nearest(name, self)}")
            try:
                self._loaded[name] = cast("T", next(iter(points)).load())
            except (ImportError, AttributeError) as error:
                raise ConfigError(f"{self.kind} {name!r} cannot be imported: {error}") from error
        return self._loaded[name]
