"""Finds and loads the one libucp of this process."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvrdma.errors import TransportError
from kvrdma.transports.ucx.declarations import Ucp

LIBRARY: Final = "libucp.so.0"
MINIMUM: Final = (1, 13, 0)
_MAPPED_LIBRARY: Final = re.compile(r"/libucp[-.0-9a-zA-Z]*\.so[.0-9]*$")
# UCX would take over the handlers of SIGSEGV and its like, and of SIGHUP, in the moment in which it is loaded.
_WHILE_LOADING: Final = {"UCX_HANDLE_ERRORS": "none", "UCX_DEBUG_SIGNO": "0"}
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Library:
    """A libucp that is loaded: its functions, where it lies, and its version."""

    ucp: Ucp
    path: str
    version: tuple[int, int, int]

    def explain(self, status: int) -> str:
        """A status in UCX's words."""
        return f"{self.ucp.ucs_status_string(status).decode(errors='replace')} ({status})"

    def check(self, what: str, status: int) -> None:
        """Raise `TransportError` where UCX says that something failed."""
        if status < 0:
            raise TransportError(f"ucx: {what}: {self.explain(status)}")


def mapped_libraries(maps: Iterable[str] | None = None) -> list[str]:
    """The paths of every libucp that is in this process already, from the lines of /proc/self/maps."""
    lines = Path("/proc/self/maps").read_text().splitlines() if maps is None else maps
    paths = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return sorted({path for path in paths if _MAPPED_LIBRARY.search(path)})


def choose_library(mapped: list[str]) -> str:
    """Which libucp to load, by path or by name; raises `TransportError` where two are in the process.

    Two copies of UCX in one process patch the same functions of libc and have been seen to wait for each other
    for ever. So the copy that somebody else (NIXL, ucxx) has brought is used.
    """
    if len(mapped) > 1:
        raise TransportError(
            f"ucx: two copies of UCX are in this process, and can hang it: {' and '.join(mapped)}. Keep one: have all "
            "of them use the same libucp, or leave ucx out of the order of transports"
        )
    return mapped[0] if mapped else LIBRARY


@functools.cache
def load_library() -> Library:
    """Load libucp, once a process.

    Raises:
        TransportError: there is none, it is older than 1.13, or there are two.
    """
    with _loading:
        path = choose_library(mapped_libraries())
        try:
            with _signals_left_alone():
                ucp = Ucp(path)
        except OSError as error:
            raise TransportError(
                f"ucx: {path} cannot be loaded ({error}). Install UCX {_dotted(MINIMUM[:2])} or newer, on Debian: "
                "apt-get install libucx0"
            ) from None
        except AttributeError as error:
            raise TransportError(f"ucx: {path} is older than {_dotted(MINIMUM[:2])} ({error})") from None
        version = read_version(ucp)
        check_version(path, version)
        mapped = mapped_libraries()
        choose_library(mapped)
        return Library(ucp, mapped[0] if mapped else path, version)


def read_version(ucp: Ucp) -> tuple[int, int, int]:
    """Major, minor, release."""
    numbers = [ctypes.c_uint() for _ in range(3)]
    ucp.ucp_get_version(*(ctypes.byref(number) for number in numbers))
    major, minor, release = (number.value for number in numbers)
    return major, minor, release


def check_version(path: str, version: tuple[int, int, int]) -> None:
    """Raise `TransportError` where the version is too old for what is declared here."""
    if version < MINIMUM or version[0] != MINIMUM[0]:
        raise TransportError(
            f"ucx: {path} is version {_dotted(version)}; UCX {_dotted(MINIMUM[:2])} or a newer {MINIMUM[0]}.x is needed"
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@contextmanager
def _signals_left_alone() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _WHILE_LOADING}
    os.environ.update(_WHILE_LOADING)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
