"""The ucx transport without a connection: the library, what UCX is told, addresses, and frames."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrdma.auth import Role
from kvrdma.errors import ConfigError, ProtocolError, TransportError
from kvrdma.transports.base import Rights
from kvrdma.transports.ucx import Lanes, UcxTransport, declarations, library, settings, wire
from kvrdma.transports.ucx.transport import parse_address


def ports(root: Path, states: dict[str, str]) -> Path:
    for name, state in states.items():
        folder = root / name.replace(":", "/ports/")
        folder.mkdir(parents=True)
        (folder / "state").write_text(state)
    return root


class TestLibrary:
    def test_a_second_copy_is_found_under_any_name(self) -> None:
        line = "7f0000000000-7f0000001000 r-xp 00000000 00:2a 7 "
        ours, theirs = "/usr/lib/libucp.so.0.0.0", "/venv/nixl_cu12.libs/libucp-cf1d2a3b.so.0.0.0"
        lines = [line + ours, line + ours, line + theirs, line + "/usr/lib/libucs.so.0", line.rstrip(), line + "[heap]"]
        assert library.mapped_libraries(lines) == sorted([ours, theirs])

    def test_the_copy_that_is_there_is_taken(self) -> None:
        assert library.choose_library([]) == "libucp.so.0"
        assert library.choose_library(["/nixl/libucp-1.so.0"]) == "/nixl/libucp-1.so.0"

    def test_two_copies_are_refused_by_name(self) -> None:
        with pytest.raises(TransportError, match=r"/a/libucp\.so\.0 and /b/libucp\.so\.0"):
            library.choose_library(["/a/libucp.so.0", "/b/libucp.so.0"])

    def test_none_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "LIBRARY", "libucp-of-nobody.so.0")
        monkeypatch.setattr(library, "mapped_libraries", list)
        with pytest.raises(TransportError, match=r"libucp-of-nobody.*apt-get install libucx0"):
            library.load_library.__wrapped__()

    def test_one_without_its_functions_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "LIBRARY", "libc.so.6")
        monkeypatch.setattr(library, "mapped_libraries", list)
        with pytest.raises(TransportError, match=r"libc\.so\.6 is older than 1\.13"):
            library.load_library.__wrapped__()

    @pytest.mark.parametrize("version", [(1, 12, 1), (0, 99, 0), (2, 0, 0)])
    def test_versions_that_are_refused(self, version: tuple[int, int, int]) -> None:
        with pytest.raises(TransportError, match=r"UCX 1\.13"):
            library.check_version("libucp.so.0", version)

    def test_handlers_of_signals_stay_the_processs_own(self) -> None:
        code = """
import signal
from kvrdma.transports.ucx.library import load_library
def caught():
    line = next(line for line in open("/proc/self/status") if line.startswith("SigCgt"))
    return int(line.split()[1], 16)
before = caught()
load_library()
assert caught() == before, hex(caught() ^ before)
"""
        need_ucx()
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_a_copy_of_somebody_elses_is_used_and_a_second_refused(self, tmp_path: Path) -> None:
        """For real: a copy under another name, as a wheel brings it."""
        original = need_ucx()
        copy = tmp_path / "libucp-cf1d2a3b.so.0"
        copy.write_bytes(Path(original).read_bytes())
        code = f"""
import ctypes
ctypes.CDLL({str(copy)!r})
from kvrdma.errors import TransportError
from kvrdma.transports.ucx.library import load_library
assert load_library().path == {str(copy)!r}, load_library().path
load_library.cache_clear()
ctypes.CDLL({original!r})
try:
    load_library()
except TransportError as error:
    assert {str(copy)!r} in str(error) and {original!r} in str(error), error
else:
    raise AssertionError("two copies were accepted")
"""
        subprocess.run([sys.executable, "-c", code], check=True)


def need_ucx() -> str:
    """The path of libucp; skips where there is none."""
    try:
        return library.load_library().path
    except TransportError as error:
        pytest.skip(f"{error}")


def test_the_layouts_are_those_of_ucp_h() -> None:
    """Offsets as a C compiler gives them for UCX 1.13 and for master of 2026."""
    for struct, offsets in (
        (declarations.Params, {"features": 8, "mt_workers_shared": 48}),
        (declarations.WorkerParams, {"thread_mode": 8}),
        (declarations.EpParams, {"address": 8, "err_mode": 16, "err_handler": 24, "user_data": 40}),
        (declarations.MemMapParams, {"address": 8, "length": 16, "flags": 24, "prot": 28, "memory_type": 32}),
        (declarations.RequestParam, {"flags": 4, "callback": 16, "user_data": 32, "memory_type": 48, "memh": 64}),
    ):
        assert {name: getattr(struct, name).offset for name in offsets} == offsets
    assert ctypes.sizeof(declarations.RequestParam) >= 72


def test_a_pointer_that_is_a_status() -> None:
    assert declarations.status_of(None) == 0
    assert declarations.status_of((1 << 64) - 6) == -6
    assert declarations.status_of(0x7F00_0000_1000) is None


class TestSettings:
    def test_ports_that_are_up(self, tmp_path: Path) -> None:
        root = ports(tmp_path, {"mlx5_0:1": "4: ACTIVE\n", "mlx5_1:1": "1: DOWN\n", "rxe0:2": "4: ACTIVE\n"})
        assert settings.rdma_ports(root) == ["mlx5_0:1", "rxe0:2"]
        assert settings.lanes_here(root) is Lanes.RDMA

    def test_no_port_no_rdma(self, tmp_path: Path) -> None:
        assert settings.lanes_here(ports(tmp_path, {"mlx5_1:1": "1: DOWN\n"})) is Lanes.LOOPBACK
        assert settings.lanes_here(tmp_path / "nothing") is Lanes.LOOPBACK

    def test_only_versions_that_need_it_get_the_cure(self) -> None:
        assert settings.variables(Lanes.RDMA, (1, 13, 1))["UD_ETH_DGID_CHECK"] == "n"
        assert settings.variables(Lanes.RDMA, (1, 18, 1))["UD_ETH_DGID_CHECK"] == "n"
        assert "UD_ETH_DGID_CHECK" not in settings.variables(Lanes.RDMA, (1, 19, 0))

    def test_rdma_lanes_have_no_way_around(self) -> None:
        found = settings.variables(Lanes.RDMA, (1, 13, 1), "rxe0:1")
        assert set(found["TLS"].split(",")) == {"rc", "ud"}
        assert found["NET_DEVICES"] == "rxe0:1"

    def test_the_emulation_stays_on_this_host(self) -> None:
        assert settings.variables(Lanes.LOOPBACK, (1, 13, 1)) == {"TLS": "tcp", "NET_DEVICES": "lo"}

    def test_without_a_port_it_is_not_usable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvrdma.transports.ucx.transport.rdma_ports", list)
        monkeypatch.setattr("kvrdma.transports.ucx.core.rdma_ports", list)
        need_ucx()
        assert "no RDMA port" in str(UcxTransport.usable())
        with pytest.raises(TransportError, match="no RDMA port"):
            UcxTransport()

    def test_a_device_for_the_emulation_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="mlx5_0:1"):
            UcxTransport(lanes=Lanes.LOOPBACK, device="mlx5_0:1")


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("10.0.0.1:7", ("10.0.0.1", 7, None)),
            ("host:7?lanes=rdma", ("host", 7, Lanes.RDMA)),
            ("[::1]:7?lanes=loopback", ("::1", 7, Lanes.LOOPBACK)),
        ],
    )
    def test_what_is_understood(self, text: str, expected: tuple[str, int, Lanes | None]) -> None:
        assert parse_address(text) == expected

    @pytest.mark.parametrize("text", ["10.0.0.1:0", "[::1]:0", "h:0?lanes=rdma"])
    def test_port_0_is_for_listening(self, text: str) -> None:
        assert parse_address(text, allow_zero=True)[1] == 0
        with pytest.raises(ConfigError):
            parse_address(text)

    @pytest.mark.parametrize(
        "text", ["", "host", "host:7/x", "host:7?lane=rdma", "host:7?lanes=tcp", "a:1,b:2", "h:70000"]
    )
    def test_what_is_not(self, text: str) -> None:
        with pytest.raises(ConfigError):
            parse_address(text)

    def test_only_rdma_is_reached_unasked(self) -> None:
        assert UcxTransport.can_reach("10.0.0.1:7?lanes=rdma")
        for other in ("10.0.0.1:7?lanes=loopback", "10.0.0.1:7", "nonsense"):
            assert not UcxTransport.can_reach(other)


class TestWire:
    @given(
        frames=st.lists(
            st.builds(
                wire.Frame,
                st.sampled_from(wire.Kind),
                st.integers(0, 2**64 - 1),
                st.binary(max_size=200),
            )
        ),
        cuts=st.lists(st.integers(1, 40)),
    )
    def test_frames_come_whole_however_they_are_cut(self, frames: list[wire.Frame], cuts: list[int]) -> None:
        raw = b"".join(frame.encode() for frame in frames)
        reader, found = wire.FrameReader(), []
        for cut in cuts:
            found += reader.feed(raw[:cut])
            raw = raw[cut:]
        found += reader.feed(raw)
        assert found == frames

    @given(raw=st.binary(max_size=400))
    def test_anything_else_is_a_protocol_error_at_worst(self, raw: bytes) -> None:
        for decode in (wire.Hello.decode, wire.Grant.decode, lambda data: list(wire.FrameReader().feed(data))):
            try:
                decode(raw)
            except ProtocolError:
                continue

    @given(worker=st.binary(min_size=1, max_size=300), key=st.binary(min_size=1, max_size=100))
    def test_hello_there_and_back(self, worker: bytes, key: bytes) -> None:
        hello = wire.Hello(worker, 4096, key, bytes(range(wire.PROBE_NBYTES)))
        assert wire.Hello.decode(hello.encode()) == hello

    @pytest.mark.parametrize("rights", [Rights.READ, Rights.WRITE, Rights.READ | Rights.WRITE])
    def test_grant_there_and_back(self, rights: Rights) -> None:
        grant = wire.Grant(7, 1 << 40, 1 << 30, rights, b"packed")
        assert wire.Grant.decode(grant.encode()) == grant

    def test_a_grant_that_wraps_around_is_refused(self) -> None:
        with pytest.raises(ProtocolError):
            wire.Grant.decode(wire.Grant(7, (1 << 64) - 8, 64, Rights.READ, b"packed").encode())

    def test_another_version_says_which(self) -> None:
        raw = bytearray(wire.Greeting(b"ticket").encode())
        raw[6] += 1
        with pytest.raises(ProtocolError, match=f"version {wire.VERSION + 1}, this side {wire.VERSION}"):
            wire.Greeting.decode(bytes(raw))
        with pytest.raises(ProtocolError, match="does not speak"):
            wire.decode_challenge(b"HTTP/1.1 400 Bad Request....."[: wire.CHALLENGE_NBYTES])

    def test_a_proof_is_of_one_connection_and_role(self) -> None:
        greeting, other = wire.Greeting(b"t"), wire.Greeting(b"t")
        proof = greeting.prove(Role.CLIENT, b"secret", b"c" * 16)
        assert greeting.check(proof, Role.CLIENT, b"secret", b"c" * 16)
        assert not other.check(proof, Role.CLIENT, b"secret", b"c" * 16)
        assert not greeting.check(proof, Role.SERVER, b"secret", b"c" * 16)
        assert not greeting.check(proof, Role.CLIENT, b"secret", b"d" * 16)
