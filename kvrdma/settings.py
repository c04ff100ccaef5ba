"""Settings and URLs: text from a user becomes one frozen, checked tree, or an error that names the mend.

Every option is a field of a frozen dataclass with a parser in its metadata; the same machinery reads
vLLM's `kv_connector_extra_config`, the environment (`KVRDMA_*`), and the options of a URL.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlsplit

from kvrdma.errors import ConfigError

ENV_PREFIX: Final = "KVRDMA_"
TOKEN_VARIABLE: Final = "KVRDMA_TOKEN"  # noqa: S105 - the name of a variable
MIN_TOKEN_NBYTES: Final = 16
MAX_TOKEN_NBYTES: Final = 4096
_UNITS: Final = {
    "": 1,
    **{unit: 1000 ** (i + 1) for i, unit in enumerate("kmgt")},
    **{f"{unit}i": 1024 ** (i + 1) for i, unit in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", re.IGNORECASE)

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant: `; did you mean 'x'?`, or list what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none'}"


def parse_size(value: object) -> int:
    """Read bytes: an int, or text such as 64KiB, 1.5GiB, 10MB."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("bytes, such as 1073741824, '64KiB' or '1.5GiB'")
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])


def parse_seconds(value: object) -> float:
    """Read a time-out in seconds: finite and above zero."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if isinstance(value, bool) or not (0 < seconds < math.inf):
        raise ValueError("seconds above 0, such as 0.5 or 30")
    return seconds


def parse_count(value: object) -> int:
    """Read a whole number of at least 1."""
    try:
        count = int(value)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        count = 0
    if isinstance(value, (bool, float)) or count < 1:
        raise ValueError("a whole number of at least 1")
    return int(count)


def parse_share(value: object) -> float:
    """Read a share: above 0 and at most 1."""
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if isinstance(value, bool) or not (0 < share <= 1):
        raise ValueError("a share above 0 and at most 1, such as 0.5")
    return share


def parse_ratio(value: object) -> float:
    """Read a ratio: 0 or more."""
    try:
        ratio = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if isinstance(value, bool) or not (0 <= ratio < math.inf):
        raise ValueError("a number of at least 0, such as 0.9")
    return ratio


def parse_text(value: object) -> str:
    """Read text."""
    if not isinstance(value, str):
        raise ValueError("text")
    return value


def parse_names(value: object) -> tuple[str, ...]:
    """Read an order of names: a list, or text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("names, such as 'shm,tcp' or ['shm', 'tcp']")
    return tuple(name for part in parts if (name := part.strip()))


def one_of(*built: str, later: tuple[str, ...] = ()) -> Callable[[object], str]:
    """Accept one of `built`; what is only planned is refused by name rather than ignored."""

    def parse(value: object) -> str:
        if value in later:
            raise ValueError(f"one of {', '.join(built)}: {value!r} is planned but not built yet")
        if value not in built:
            raise ValueError(f"one of {', '.join(built)}" + nearest(str(value), built))
        return str(value)

    return parse


def not_built(value: object) -> str:
    """Refuse a setting whose part is not built yet."""
    raise ValueError("left out: the part behind it is planned but not built yet")


def option(default: Any, parse: Callable[[object], Any], help_: str) -> Any:
    """Declare a field that a user may set as text."""
    return field(default=default, metadata={"parse": parse, "help": help_})


def read_options(cls: type[T], given: Mapping[str, object], *, where: str) -> T:
    """Build a dataclass of options from what a user wrote.

    Raises:
        ConfigError: an unknown name (with the nearest one) or a value that cannot be meant.
    """
    known: dict[str, Field[Any]] = {f.name: f for f in fields(cls) if "parse" in f.metadata}  # type: ignore[arg-type]
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown option {name!r}{nearest(name, known)}")
        try:
            values[name] = known[name].metadata["parse"](value)
        except ValueError as error:
            raise ConfigError(f"{where}: {name}={value!r}: must be {error}") from None
    missing = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything an operator can set. In vLLM: the keys of `kv_connector_extra_config`."""

    l1_bytes: int = option(4 << 30, parse_size, "pinned CPU memory of the whole engine, all ranks together")
    l2: str = option("", parse_text, "URL of the store below the CPU cache, such as kvrdma://host:7700")
    policy: str = option("lru", parse_text, "eviction policy of the CPU cache, by name: lru, fifo, s3fifo")
    offload: str = option("all", parse_text, "which blocks go to L2: all, hot or cold")
    namespace: str = option("", parse_text, "keeps caches apart that would otherwise share")
    weights_version: str = option("", parse_text, "names the weights where they are not files")
    fingerprint: str = option("sampled", one_of("sampled", "full"), "how the weights' content is read: sampled or full")
    token_file: str = option("", parse_text, "file with the pool's token; without it KVRDMA_TOKEN is taken, if set")
    transports: tuple[str, ...] = option((), parse_names, "order of transports; others are never used")
    streams: int = option(1, parse_count, "connections a peer for the tcp transport")
    budget_dir: str = option("", not_built, "where the host's NIC budget lies (planned)")
    nic_rate: str = option("", not_built, "bytes per second of the host's NIC budget (planned)")
    gate: str = option("off", one_of("off", later=("on", "auto")), "load or recompute: off")
    coordination: str = option("engine", one_of("engine", later=("group",)), "how ranks agree: engine")
    connect_timeout: float = option(2.0, parse_seconds, "seconds to reach L2")
    lookup_timeout: float = option(0.25, parse_seconds, "seconds L2 may take to say what it has")
    fetch_timeout: float = option(5.0, parse_seconds, "seconds a fetch from L2 may take")
    put_timeout: float = option(30.0, parse_seconds, "seconds an offload to L2 may take")
    waiting_share: float = option(0.5, parse_share, "share of L1 that waiting requests may hold")
    save_share: float = option(0.1, parse_share, "share of device blocks that saves may hold")

    @classmethod
    def read(cls, given: Mapping[str, object], *, where: str = "settings") -> Settings:
        """Read a mapping, such as vLLM's `kv_connector_extra_config`; raises `ConfigError`."""
        return read_options(cls, given, where=where)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Settings:
        """Read `KVRDMA_L1_BYTES` and its like from an environment; raises `ConfigError`."""
        given = {
            name.removeprefix(ENV_PREFIX).lower(): value
            for name, value in environ.items()
            if name.startswith(ENV_PREFIX) and name != TOKEN_VARIABLE
        }
        return cls.read(given, where=f"environment ({ENV_PREFIX}*)")


def find_token(file: str, environ: Mapping[str, str] | None = None) -> bytes | None:
    """The pool's token: the content of a file, else `KVRDMA_TOKEN` of the environment, else None.

    White space around it does not count. No message ever has a part of it.

    Raises:
        ConfigError: the file cannot be read, or a token that is too short to be a secret.
    """
    if file:
        where = f"token_file {file}"
        try:
            with Path(file).open("rb") as opened:
                token = opened.read(MAX_TOKEN_NBYTES + 2).strip()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
    else:
        where = f"environment: {TOKEN_VARIABLE}"
        text = (os.environ if environ is None else environ).get(TOKEN_VARIABLE)
        if text is None:
            return None
        token = os.fsencode(text).strip()
    if not MIN_TOKEN_NBYTES <= len(token) <= MAX_TOKEN_NBYTES:
        raise ConfigError(
            f"{where}: holds {len(token)} bytes; a token has {MIN_TOKEN_NBYTES} to {MAX_TOKEN_NBYTES}, such as "
            "the output of: openssl rand -hex 32"
        )
    return token


@dataclass(frozen=True, slots=True)
class Url:
    """A URL that configures a backend or transport: `scheme://host:port,host:port/path?option=value`."""

    scheme: str
    hosts: tuple[tuple[str, int | None], ...]
    path: str
    options: Mapping[str, str]
    text: str

    @classmethod
    def parse(cls, text: str) -> Url:
        """Split a URL; raises `ConfigError` where it is none."""
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise ConfigError(f"URL {_without_options(text)!r}: {error}") from None
        if not parts.scheme or "://" not in text:
            raise ConfigError(f"URL {_without_options(text)!r}: must look like scheme://host:port?option=value")
        if parts.fragment or "@" in parts.netloc:
            raise ConfigError(f"URL with scheme {parts.scheme!r}: no user, password or #fragment may be in it")
        hosts = tuple(_host(part, text) for part in parts.netloc.split(",") if part)
        try:
            pairs = parse_qsl(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
        except ValueError:
            raise ConfigError(
                f"URL {_without_options(text)!r}: options must look like ?name=value&name=value"
            ) from None
        options = dict(pairs)
        if len(options) != len(pairs):
            raise ConfigError(f"URL {_without_options(text)!r}: an option is given twice")
        return cls(parts.scheme.lower(), hosts, parts.path, options, text)

    def read_options(self, cls: type[T]) -> T:
        """Read the URL's options into a dataclass; raises `ConfigError`."""
        return read_options(cls, self.options, where=f"URL {_without_options(self.text)!r}")

    def one_host(self, *, default_port: int) -> tuple[str, int]:
        """Give the only host and its port; raises `ConfigError` where there are none or several."""
        if len(self.hosts) != 1:
            raise ConfigError(
                f"URL {_without_options(self.text)!r}: exactly one host is needed, such as {self.scheme}://host"
            )
        if self.path not in {"", "/"}:
            raise ConfigError(
                f"URL {_without_options(self.text)!r}: no path is expected after the host, got {self.path!r}"
            )
        host, port = self.hosts[0]
        return host, default_port if port is None else port


def host_and_port(host: str, port: int | str) -> str:
    """An address as it is written: host:port, or [host]:port where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _without_options(text: str) -> str:
    """A URL as an error may show it: somebody may have written a secret among its options."""
    return text.partition("?")[0]


def _host(part: str, text: str) -> tuple[str, int | None]:
    try:
        split = urlsplit(f"//{part}")
        host, port = split.hostname, split.port
        if host:
            host.encode("idna")  # what the resolver would do with it: labels of 1 to 63 characters
    except ValueError:
        host, port = None, None
    if not host or port == 0 or part.endswith(":"):
        raise ConfigError(f"URL {text!r}: {part!r} is not host:port, with a port in 1..65535")
    return host, port
