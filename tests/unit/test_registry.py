"""Parts by name, and which transport is taken."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from kvrdma.backends import backends, open_backend
from kvrdma.errors import ConfigError, TransportError
from kvrdma.plugins import Registry
from kvrdma.policies import EvictionPolicy, OffloadPolicy, offload_policies, policies
from kvrdma.settings import Settings
from kvrdma.transports import Transport, check_order, negotiate, transports
from kvrdma.transports.inproc import InprocTransport
from kvrdma.transports.tcp import TcpTransport


class OtherTransport(InprocTransport):
    scheme: ClassVar[str] = "other"

    @classmethod
    def can_reach(cls, address: str) -> bool:
        return address != "far"


class BrokenTransport(OtherTransport):
    scheme: ClassVar[str] = "broken"

    @classmethod
    def usable(cls) -> str | None:
        return "no such device"


@pytest.fixture
def third_party() -> Iterator[None]:
    """Two transports of somebody else's, for one test."""
    before = dict(transports._loaded)
    transports.add("other", OtherTransport)
    transports.add("broken", BrokenTransport)
    yield
    transports._loaded = before


def chosen(offers: list[tuple[str, str]], order: tuple[str, ...] = ()) -> list[str]:
    return [cls.scheme for cls, _ in negotiate(offers, order)]


@pytest.fixture
def name() -> Iterator[str]:
    """The address of a listener in this process."""
    with InprocTransport() as transport:
        yield transport.listen("").contact_address


# -- registries


def test_ours_are_there() -> None:
    assert {"inproc", "tcp"} <= set(transports)
    assert {"memory", "kvrdma"} <= set(backends)
    assert "lru" in set(policies)
    assert "all" in set(offload_policies)
    assert transports.get("tcp") is TcpTransport
    assert issubclass(policies.get("lru"), EvictionPolicy)
    assert issubclass(offload_policies.get("all"), OffloadPolicy)


@pytest.mark.parametrize(
    ("registry", "wrong", "right"),
    [
        (transports, "tpc", "tcp"),
        (policies, "lur", "lru"),
        (backends, "memroy", "memory"),
        (offload_policies, "al", "all"),
    ],
)
def test_an_unknown_name_names_the_nearest(registry: Registry[Any], wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown {registry.kind} '{wrong}'.*{right}"):
        registry.get(wrong)
    with pytest.raises(ConfigError, match="known:"):
        registry.get("zzzzzzzz")


def test_a_part_of_ones_own(third_party: None) -> None:
    assert transports.get("other") is OtherTransport
    assert "other" in list(transports)
    check_order(["other", "tcp"])


def test_a_part_that_cannot_be_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module is not there, or has no such name: an error that says which part."""
    info = tmp_path / "thirdparty-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[kvrdma.transports]\ngone = no_such_module_here:Transport\nnameless = kvrdma.errors:NoSuchName\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"gone", "nameless"} <= set(transports)
    for part in ("gone", "nameless"):
        with pytest.raises(ConfigError, match=rf"transport '{part}' cannot be imported"):
            transports.get(part)
    with pytest.raises(TransportError, match="gone: transport 'gone' cannot be imported"):
        negotiate([("gone", "a:1")])


def test_open_backend() -> None:
    with open_backend("memory://?capacity=8MiB", Settings()) as backend:
        assert backend.stats(timeout=1.0)["capacity_bytes"] == 8 << 20
    for url in ("nope://h", "memory://host", "memory://?capacity=1", "memory://?capcity=8MiB", "kvrdma://a,b"):
        with pytest.raises(ConfigError):
            open_backend(url, Settings())
    with pytest.raises(ConfigError, match="did you mean 'tcp'"):
        open_backend("kvrdma://h?transports=tpc", Settings())


# -- negotiation


def test_the_default_order(name: str, third_party: None) -> None:
    """In process first, tcp last, somebody else's before tcp."""
    offers = [("tcp", "h:1"), ("other", "near"), ("inproc", name)]
    assert chosen(offers) == ["inproc", "other", "tcp"]
    assert chosen(offers[::-1]) == ["inproc", "other", "tcp"]
    assert negotiate([("tcp", "h:1")]) == [(TcpTransport, "h:1")]


def test_the_users_order_wins(name: str, third_party: None) -> None:
    offers = [("inproc", name), ("tcp", "h:1"), ("other", "near")]
    assert chosen(offers, ("tcp", "inproc")) == ["tcp", "inproc"]
    assert chosen(offers, ("other", "tcp", "inproc")) == ["other", "tcp", "inproc"]


def test_what_the_order_does_not_name_is_never_used(name: str, third_party: None) -> None:
    """Not even where nothing else is left."""
    assert chosen([("inproc", name), ("tcp", "h:1")], ("tcp",)) == ["tcp"]
    with pytest.raises(TransportError, match="tcp: not among broken"):
        negotiate([("tcp", "h:1"), ("broken", "near")], ("broken",))
    with pytest.raises(TransportError, match="not among other"):
        negotiate([("tcp", "h:1"), ("other", "far")], ("other",))


def test_every_refusal_has_a_reason(third_party: None) -> None:
    with pytest.raises(TransportError) as caught:
        negotiate([("pigeon", "h"), ("other", "far"), ("broken", "near"), ("inproc", "nobody")])
    for text in ("pigeon: not known here", "other: far cannot be reached", "broken: no such device", "inproc: nobody"):
        assert text in str(caught.value)
    with pytest.raises(TransportError, match="no offers"):
        negotiate([])


def test_an_order_with_an_unknown_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tcp'"):
        negotiate([("tcp", "h:1")], ("tpc",))


def test_a_transport_says_that_it_can_be_used() -> None:
    for scheme in ("tcp", "inproc"):
        cls: type[Transport] = transports.get(scheme)
        assert cls.usable() is None
        assert cls.scheme == scheme
