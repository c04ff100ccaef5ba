"""Shared memory between real processes: a peer that dies, other users, other namespaces."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from serving import PATIENCE_S, Client, Program, Server, eventually

from kvrdma.errors import TransportError
from kvrdma.memory import MemfdSlabs
from kvrdma.testing.transports import make_batch
from kvrdma.transports import Opcode, RemoteRegion
from kvrdma.transports.shm import ShmTransport

pytestmark = pytest.mark.process

NBYTES = 64 << 20
OWNER = f"""
import signal, sys
from kvrdma.memory import MemfdSlabs
from kvrdma.transports import Rights
from kvrdma.transports.shm import ShmTransport
with ShmTransport() as transport:
    memory = MemfdSlabs(lock=False).allocate({NBYTES})
    memory.array()[:] = 7
    remote = transport.export(transport.register(memory), Rights.READ)
    listener = transport.listen("")
    print("exported", listener.contact_address, remote.token.hex(), file=sys.stderr, flush=True)
    signal.pause()
"""

CONNECTS = """
import os, sys
from kvrdma.errors import KVRDMAError
from kvrdma.transports.shm import ShmTransport
if len(sys.argv) > 2:
    os.setuid(int(sys.argv[2]))
try:
    with ShmTransport() as transport:
        transport.connect(sys.argv[1], timeout=5)
    print("connected", file=sys.stderr)
except KVRDMAError as error:
    print("refused:", error, file=sys.stderr)
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")


def test_a_peer_that_is_killed_leaves_its_memory_readable_and_its_transfers_ended() -> None:
    """In the middle of batches: no signal hits the reader, what is said to have arrived has, and no lease is lost."""
    with Program("-c", OWNER) as owner, ShmTransport(threads=1) as transport:
        address, token = owner.says("exported ").split()
        memory = MemfdSlabs(lock=False).allocate(NBYTES)
        region = transport.register(memory)
        endpoint = transport.connect(address, timeout=PATIENCE_S)
        offsets = np.arange(16, dtype=np.int64) * (4 << 20)
        batch = make_batch(
            Opcode.READ, region, RemoteRegion("shm", NBYTES, bytes.fromhex(token)), offsets, offsets,
            np.full(16, 4 << 20, dtype=np.int64),
        )  # fmt: skip
        assert endpoint.post(batch).result(PATIENCE_S).all()
        memory.array()[:] = 0
        posted = [endpoint.post(batch) for _ in range(20)]
        owner.signal(signal.SIGKILL)
        for transfer in posted:
            ok = transfer.result(PATIENCE_S)
            assert ok.all() or transfer.error is not None
        eventually(endpoint.closed)
        for row in np.flatnonzero(np.logical_or.reduce([transfer.ok for transfer in posted])):
            assert (memory.array()[row << 22 : (row + 1) << 22] == 7).all()
        with pytest.raises(TransportError):
            transport.connect(address, timeout=1.0)


@needs_root
@pytest.mark.parametrize("user", [0, 65534])
def test_another_user_gets_nothing(user: int) -> None:
    """Turned away before anything is said; the same program gets in as our own user."""
    with ShmTransport() as transport:
        address = transport.listen("").contact_address
        with Program("-c", CONNECTS, address, str(user)) as other:
            other.ended()
            if user == 0:
                assert other.lines == ["connected"]
            else:
                assert "turned us away: another user" in other.text


@needs_root
def test_a_client_of_another_user_uses_tcp() -> None:
    """The pool does not give it shared memory; it notices, and goes on by the next transport."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serving import *
from kvrdma.transports import transports
transports.get("shm"), transports.get("tcp"), "host".encode("idna")
os.setuid(65534)  # now: another user may not be able to read our files
with Client(sys.argv[1], n=4) as client:
    stored = client.put().result(30).all()
    stats = client.backend.stats(timeout=30)
    print("stored", stored, stats["data_transport"], stats["other_transports"]["shm"], file=sys.stderr)
"""
    with Server() as server, Program("-c", script, server.url) as other:
        assert other.says("stored ").startswith("True tcp shm: ")
        assert "turned us away: another user" in other.text
        assert other.ended() == 0


def test_a_container_of_its_own_network_uses_another_transport() -> None:
    """The same kernel, but no way to the socket: shared memory is not even tried."""
    with ShmTransport() as transport:
        address = transport.listen("").contact_address
        script = (
            "import sys; from kvrdma.transports import negotiate; from kvrdma.transports.shm import ShmTransport\n"
            "print('chosen', *(cls.scheme for cls, _ in negotiate([('shm', sys.argv[1]), ('tcp', 'h:1')])),"
            " file=sys.stderr)\n" + CONNECTS
        )
        command = (
            "import os, sys\n"
            "from kvrdma.transports.shm import transport\n"
            "os.execvp('unshare', ['unshare', '--user', '--map-root-user', '--net', *sys.argv[1:]])"
        )
        with Program("-c", command, sys.executable, "-c", script, address) as inside:
            if inside.ended() != 0:
                pytest.skip(f"no network namespace can be made here: {inside.text}")
            assert inside.lines[0] == "chosen tcp"
            assert "in another network namespace" in inside.lines[1]
        with Program("-c", script, address) as outside:
            assert outside.ended() == 0
            assert outside.lines == ["chosen shm tcp", "connected"]


def test_engine_and_pool_on_one_host_use_shared_memory_by_default() -> None:
    """Neither has to name it; whoever names tcp gets tcp."""
    with Server() as server:
        assert server.stats()["transports"][0] == "shm"
        for url, scheme in ((server.url, "shm"), (server.tcp_url, "tcp")):
            with Client(url) as client:
                assert client.put().result(PATIENCE_S).all()
                client.clear()
                assert client.get().result(PATIENCE_S).all()
                assert all(client.came(row) for row in range(client.n))
                stats = client.backend.stats(timeout=PATIENCE_S)
                assert stats["data_transport"] == scheme
                assert stats["data_connections"] == {"shm": 0, "tcp": 0} | {scheme: 1}
                why = {"shm": ("tcp", "shm comes first"), "tcp": ("shm", "not among tcp")}[scheme]
                assert stats["other_transports"][why[0]] == why[1]


def test_a_pool_that_offers_no_shared_memory_is_not_asked_for_it() -> None:
    with Server(arguments=("-m", "kvrdma", "serve", "--port", "0", "--transports", "tcp")) as server:
        assert server.stats()["transports"] == ["tcp"]
        with Client(f"{server.url}?transports=shm") as client:
            put = client.put()
            assert not put.result(PATIENCE_S).any()
            assert "shm: not offered by the peer" in str(put.error)
            assert "tcp: not among shm" in str(put.error)
