"""Settings and URLs: what is read, and what an error says where it cannot be."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.errors import ConfigError
from kvrdma.settings import (
    Settings,
    Url,
    option,
    parse_count,
    parse_names,
    parse_seconds,
    parse_share,
    parse_size,
    read_options,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (123, 123),
        (1 << 70, 1 << 70),
        ("0", 0),
        ("123", 123),
        ("64KiB", 64 << 10),
        ("64 kib", 64 << 10),
        (" 1.5GiB ", 3 << 29),
        ("10MB", 10**7),
        ("10m", 10**7),
        ("2TiB", 2 << 40),
        ("1B", 1),
        ("9007199254740993", (1 << 53) + 1),
        ("9007199254740993KiB", ((1 << 53) + 1) << 10),
        ("0.1kB", 100),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", -1, 1.5, True, None, "1.5.0", "1e9", "1PiB", "KiB", "1 2", "inf", [1]])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="bytes"):
        parse_size(text)


@given(st.integers(0, 1 << 80))
def test_any_whole_number_is_a_size(n: int) -> None:
    assert parse_size(str(n)) == n


@pytest.mark.parametrize(("value", "expected"), [(1, 1.0), ("0.25", 0.25), (2.5, 2.5)])
def test_seconds(value: object, expected: float) -> None:
    assert parse_seconds(value) == expected


@pytest.mark.parametrize("value", [0, -1, "x", "", None, math.inf, math.nan, "nan", "inf", True, 10**400, [], "1s"])
def test_what_are_no_seconds(value: object) -> None:
    with pytest.raises(ValueError, match="seconds"):
        parse_seconds(value)


@pytest.mark.parametrize("value", [0, -1, "x", "1.5", 1.0, math.inf, math.nan, True, None, "9" * 5000])
def test_what_is_no_count(value: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(value)


@pytest.mark.parametrize("value", [0, -0.1, 1.1, "x", None, math.nan, math.inf, 10**400, True])
def test_what_is_no_share(value: object) -> None:
    with pytest.raises(ValueError, match="share"):
        parse_share(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", ()), ("tcp", ("tcp",)), (" shm , tcp,", ("shm", "tcp")), (["shm", "tcp"], ("shm", "tcp"))],
)
def test_names(value: object, expected: tuple[str, ...]) -> None:
    assert parse_names(value) == expected


@pytest.mark.parametrize("value", [1, None, [1], {"tcp": 1}])
def test_what_are_no_names(value: object) -> None:
    with pytest.raises(ValueError, match="names"):
        parse_names(value)


# -- the tree


def test_what_is_given_is_read_and_the_rest_has_defaults() -> None:
    settings = Settings.read({"l1_bytes": "2GiB", "l2": "kvrdma://h:7700", "transports": "tcp", "save_share": 0.2})
    assert settings.l1_bytes == 2 << 30
    assert settings.transports == ("tcp",)
    assert dataclasses.replace(settings, l1_bytes=4 << 30, l2="", transports=(), save_share=0.1) == Settings()


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().l1_bytes = 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("l1_byte", "l1_bytes"),
        ("L1_BYTES", "l1_bytes"),
        ("transport", "transports"),
        ("fetch_time_out", "fetch_timeout"),
    ],
)
def test_a_misspelt_name_names_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*did you mean '{meant}'"):
        Settings.read({name: "1"})


def test_a_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError, match=r"known: .*l1_bytes.*waiting_share"):
        Settings.read({"xyzzy": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate", "on"),
        ("coordination", "group"),
        ("budget_dir", "/dev/shm"),
        ("nic_rate", "1GiB"),
    ],
)
def test_what_is_not_built_yet_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*planned but not built yet"):
        Settings.read({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("l1_bytes", "many"),
        ("streams", 0),
        ("streams", math.inf),
        ("fetch_timeout", "soon"),
        ("waiting_share", 2),
        ("l2", 5),
        ("fingerprint", "none"),
        ("offload", []),
    ],
)
def test_a_value_that_cannot_be_meant_names_the_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"my place: {name}=.*must be"):
        Settings.read({name: value}, where="my place")


def test_a_near_choice_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sampled'"):
        Settings.read({"fingerprint": "sample"})


def test_the_environment() -> None:
    settings = Settings.from_environment(
        {"KVRDMA_L1_BYTES": "1GiB", "KVRDMA_TRANSPORTS": "tcp,inproc", "PATH": "/bin", "kvrdma_l2": "x"}
    )
    assert settings == Settings(l1_bytes=1 << 30, transports=("tcp", "inproc"))
    with pytest.raises(ConfigError, match=r"environment.*l1_byte.*did you mean"):
        Settings.from_environment({"KVRDMA_L1_BYTE": "1"})


def test_what_must_be_given() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Options:
        path: str = option(dataclasses.MISSING, parse_names, "needed")

    with pytest.raises(ConfigError, match="path must be given"):
        read_options(Options, {}, where="here")


def test_every_setting_has_a_help() -> None:
    for field in dataclasses.fields(Settings):
        assert field.metadata["help"]


# -- URLs


def test_the_parts_of_a_url() -> None:
    url = Url.parse("KVRDMA://h1:7700,[::1]:7701,h3/path?rate=1GiB&empty=")
    assert url.scheme == "kvrdma"
    assert url.hosts == (("h1", 7700), ("::1", 7701), ("h3", None))
    assert url.path == "/path"
    assert url.options == {"rate": "1GiB", "empty": ""}


def test_one_host() -> None:
    assert Url.parse("kvrdma://h").one_host(default_port=7700) == ("h", 7700)
    assert Url.parse("kvrdma://h:1/").one_host(default_port=7700) == ("h", 1)
    for text in ("kvrdma://", "kvrdma://a,b", "kvrdma://h/path"):
        with pytest.raises(ConfigError, match=text):
            Url.parse(text).one_host(default_port=7700)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:7700",
        "kvrdma",
        "kvrdma:h",
        "://h",
        "kvrdma://h:0",
        "kvrdma://h:",
        "kvrdma://h:65536",
        "kvrdma://h:x",
        "kvrdma://:7700",
        "kvrdma://[::1",
        "kvrdma://[not-an-address]:1",
        "kvrdma://h\u2100:1",
        "kvrdma://h?rate",
        "kvrdma://h?a=1&a=2",
        "kvrdma://h?a=1&&b=2",
    ],
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Url.parse(text)


@pytest.mark.parametrize("text", ["kvrdma://user:secret@h:1", "kvrdma://h#secret"])
def test_a_secret_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Url.parse(text)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_url_or_a_config_error(text: str) -> None:
    for candidate in (text, f"tcp://{text}"):
        try:
            Url.parse(candidate)
        except ConfigError:
            continue


def test_options_of_a_url() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Options:
        capacity: int = option(7, parse_size, "how much")

    assert Url.parse("memory://?capacity=1KiB").read_options(Options) == Options(1024)
    assert Url.parse("memory://").read_options(Options) == Options(7)
    with pytest.raises(ConfigError, match=r"memory://.*capacitty.*did you mean 'capacity'"):
        Url.parse("memory://?capacitty=1").read_options(Options)
