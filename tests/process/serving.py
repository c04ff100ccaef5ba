"""Real processes for the tests beside this file: a pool server, clients of it, and a client by hand."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvrdma import protocol
from kvrdma.auth import PROOF_NBYTES, Role, derive_secret, make_nonce, prove
from kvrdma.backends import GetTransfer, PutTransfer
from kvrdma.backends.pool import PoolBackend
from kvrdma.errors import KVRDMAError
from kvrdma.keys import KeySpace, block_keys, pack_keys
from kvrdma.layout import Shard, checksum
from kvrdma.memory import PinnedPool
from kvrdma.settings import Settings, Url
from kvrdma.transports import Endpoint, RemoteRegion, Transport
from kvrdma.transports.tcp import wire

SPACE = KeySpace(
    model="m",
    weights="w",
    config="c",
    kv_dtype="bfloat16",
    attention="a",
    head_size=64,
    layers=2,
    block_tokens=4,
)
SHARD = Shard(0, 0, 2, 0, 1)
PATIENCE_S = 30.0


def eventually(holds: Callable[[], object], timeout: float = PATIENCE_S) -> None:
    """Wait until something holds; fail where it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"did not come to hold within {timeout} s"
        time.sleep(0.005)


class Program:
    """A Python process whose lines on stderr are kept; ended with the test."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def says(self, what: str) -> str:
        """Wait for a line that holds some text; the rest of that line."""

        def found() -> bool:
            return any(what in line for line in self.lines) or self.process.poll() is not None

        eventually(found)
        line = next((line for line in self.lines if what in line), None)
        assert line is not None, f"ended with {self.process.returncode}: {self.text}"
        return line.split(what, 1)[1]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, timeout: float = PATIENCE_S) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(timeout)
        self._reader.join()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Server(Program):
    """`kvrdma serve`, listening."""

    def __init__(
        self, *, port: int = 0, capacity: str = "64MiB", arguments: Sequence[str] = (), token_file: str = ""
    ) -> None:
        self.token_file = token_file
        super().__init__(*(arguments or ("-m", "kvrdma", "serve", "--port", str(port), "--capacity", capacity)))
        try:
            self.port = int(self.says("listening on ").rsplit(":", 1)[1])
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"kvrdma://127.0.0.1:{self.port}"

    @property
    def tcp_url(self) -> str:
        """For tests in which the other end must be at work for bytes to move."""
        return f"{self.url}?transports=tcp"

    def stats(self) -> dict[str, Any]:
        """Ask on a connection of its own."""
        with PoolBackend(Url.parse(self.url), Settings(token_file=self.token_file)) as backend:
            return backend.stats(timeout=PATIENCE_S)


class Client:
    """Blocks with known content in a pool of their own, and a backend that moves them.

    The first half of the pool holds what is put, the second half is the target of gets.
    """

    def __init__(
        self, url: str, *, n: int = 8, nbytes: int = 64 << 10, space: KeySpace = SPACE, first: int = 0
    ) -> None:
        self.n = n
        self.keys = some_keys(n, space=space, first=first)
        self.batch = pack_keys(self.keys)
        self.pool = PinnedPool(nbytes, 2 * n)
        self.content = np.random.default_rng(first).integers(0, 256, (n, nbytes), dtype=np.uint8)
        for slot, row in enumerate(self.content):
            self.pool.view(slot)[:] = row
        self.checksums = np.array(
            [checksum(key, SHARD.encode(), [row]) for key, row in zip(self.keys, self.content, strict=True)],
            dtype=np.uint64,
        )
        self.backend = PoolBackend(Url.parse(url), Settings())
        self.backend.use_keyspace(space)
        for memory in self.pool.memories:
            self.backend.register(memory)

    def put(self, rows: slice = slice(None), *, timeout: float = PATIENCE_S) -> PutTransfer:
        slots = np.arange(self.n, dtype=np.int64)[rows]
        with self.pool.lease(slots) as lease:
            return self.backend.put(
                self.batch[rows], SHARD, self.pool.spans(slots), self.checksums[rows], hold=lease, timeout=timeout
            )

    def get(self, rows: slice = slice(None), *, timeout: float = PATIENCE_S) -> GetTransfer:
        slots = np.arange(self.n, 2 * self.n, dtype=np.int64)[rows]
        with self.pool.lease(slots, exclusive=True) as lease:
            return self.backend.get_into(self.batch[rows], SHARD, self.pool.spans(slots), hold=lease, timeout=timeout)

    def came(self, row: int) -> bool:
        """Whether the target of a get holds the block's content."""
        return np.array_equal(self.pool.view(self.n + row), self.content[row])

    def clear(self) -> None:
        """Wipe the targets."""
        for row in range(self.n):
            self.pool.view(self.n + row)[:] = 0

    def found(self) -> list[bool]:
        present: list[bool] = self.backend.lookup(self.batch, [SHARD], timeout=PATIENCE_S).present.tolist()
        return present

    def usable(self) -> bool:
        """Whether the server answers this client."""
        try:
            self.backend.stats(timeout=PATIENCE_S)
        except KVRDMAError:
            return False
        return True

    def close(self) -> None:
        """Every lease must have come back by now."""
        self.backend.close()
        assert self.pool.n_leases == 0
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RawClient:
    """The control protocol by hand, for clients that do not behave."""

    def __init__(self, port: int, *, hello: bool = True) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.decoder = protocol.FrameDecoder(peer="pool server")
        self._messages: list[protocol.Message] = []
        self._numbers = iter(range(1, 1 << 30))
        if hello:
            self.greet()

    def greet(self, token: bytes = b"") -> None:
        """Open the conversation as a client does that knows the token."""
        nonce = make_nonce()
        self.sock.sendall(protocol.preface())
        challenge = self.call(protocol.Hello(self.number(), "by hand", nonce), protocol.Challenge)
        said = (nonce, challenge.nonce)
        proof = prove(token, Role.CLIENT, protocol.PURPOSE, *said)
        self.hello = self.call(protocol.Proof(self.number(), proof), protocol.HelloReply)
        self.stream_secret = derive_secret(token, protocol.STREAMS, *said)

    def connect_data(self, transport: Transport, **how: Any) -> Endpoint:
        """Open the data connection through a transport."""
        given = {"ticket": self.hello.ticket, "secret": self.stream_secret, **how}
        return transport.connect(self.data_address, timeout=PATIENCE_S, **given)

    def join_data(self, sock: socket.socket) -> None:
        """Open the data connection by hand, on a socket that is not connected yet."""
        host, port = self.data_address.rsplit(":", 1)
        sock.connect((host, int(port)))
        greeting = wire.Greeting(make_nonce(), 0, 1, self.hello.ticket)
        sock.sendall(greeting.encode())
        challenge = wire.decode_challenge(sock.recv(wire.CHALLENGE_NBYTES, socket.MSG_WAITALL))
        sock.sendall(greeting.prove(Role.CLIENT, self.stream_secret, challenge))
        sock.recv(PROOF_NBYTES, socket.MSG_WAITALL)

    def send(self, message: protocol.Message) -> None:
        self.sock.sendall(protocol.encode(message))

    def receive(self) -> protocol.Message:
        """The next message; raises EOFError at the end."""
        while not self._messages:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError
            self._messages += self.decoder.feed(data)
        return self._messages.pop(0)

    def call(self, message: protocol.Message, reply: type[Any]) -> Any:
        self.send(message)
        answer = self.receive()
        assert isinstance(answer, reply), answer
        return answer

    def number(self) -> int:
        return next(self._numbers)

    def open(self, space: KeySpace = SPACE) -> int:
        message = protocol.OpenKeySpace(self.number(), space.to_fields(), space.digest)
        keyspace: int = self.call(message, protocol.KeySpaceReply).keyspace
        return keyspace

    @property
    def data_address(self) -> str:
        address: str = dict(self.hello.offers)["tcp"]
        return address

    def at_end(self) -> bool:
        """Whether the server has closed the connection, after what it had to say."""
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionError):
            return True

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lookup_request(raw: RawClient, keyspace: int, n: int) -> protocol.LookupRequest:
    return protocol.LookupRequest(raw.number(), keyspace, packed_keys(n), [SHARD.encode()])


def get_request(raw: RawClient, keyspace: int, n: int) -> protocol.GetRequest:
    return protocol.GetRequest(raw.number(), keyspace, SHARD.encode(), packed_keys(n))


def put_request(
    raw: RawClient,
    keyspace: int,
    content: NDArray[np.uint8],
    region: RemoteRegion,
    *,
    timeout: float = PATIENCE_S,
) -> protocol.PutRequest:
    """A put of the first blocks, which lie one behind the other in a region."""
    n, nbytes = content.shape
    rows = np.arange(n, dtype=np.int64)
    shard = SHARD.encode()
    checksums = [checksum(key, shard, [row]) for key, row in zip(some_keys(n), content, strict=True)]
    return protocol.PutRequest(
        raw.number(),
        keyspace,
        shard,
        packed_keys(n),
        np.array(checksums, dtype="<u8").tobytes(),
        [[region.scheme, region.nbytes, region.token]],
        protocol.pack_columns(rows, np.zeros_like(rows), rows * nbytes, np.full_like(rows, nbytes)),
        int(timeout * 1000),
    )


def some_keys(n: int, *, space: KeySpace = SPACE, first: int = 0) -> list[bytes]:
    return block_keys(space, np.arange(first * space.block_tokens, (first + n) * space.block_tokens, dtype=np.int32))


def packed_keys(n: int) -> bytes:
    return pack_keys(some_keys(n)).tobytes()
