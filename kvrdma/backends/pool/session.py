"""One connection to a pool server: the control socket, and the endpoint that moves the bytes."""

from __future__ import annotations

import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Final, TypeVar

from kvrdma import protocol
from kvrdma.auth import Role, check_proof, derive_secret, make_nonce, prove
from kvrdma.errors import (
    AuthenticationError,
    BackendError,
    ClosedError,
    DeadlineError,
    KVRDMAError,
    ProtocolError,
    TransportError,
)
from kvrdma.keys import KeySpace
from kvrdma.protocol import (
    PURPOSE,
    STREAMS,
    Challenge,
    ErrorReply,
    FrameDecoder,
    Goodbye,
    Hello,
    HelloReply,
    Message,
    Proof,
)
from kvrdma.settings import TOKEN_VARIABLE
from kvrdma.transports import Endpoint

logger = logging.getLogger(__name__)

_CHUNK: Final = 1 << 16
_NOTE_S: Final = 1.0  # for what wants no reply
M = TypeVar("M", bound=Message)


class Session:
    """Requests and replies by number over one socket. When anything breaks, all of it ends, at once.

    Raises:
        TransportError, DeadlineError: the server cannot be reached.
        ProtocolError: it is none, or speaks another version.
        AuthenticationError: it has another token, or only one of both sides has any.
    """

    def __init__(self, host: str, port: int, *, name: str, token: bytes | None, timeout: float) -> None:
        self.peer = f"{host}:{port}"
        self._guard = threading.Lock()
        self._send_guard = threading.Lock()
        self._waiting: dict[int, Future[Message]] = {}
        self._numbers = itertools.count(1)
        self._error: KVRDMAError | None = None
        self._endpoint: Endpoint | None = None
        self._endpoint_guard = threading.Lock()
        self._keyspaces: dict[bytes, int] = {}
        try:
            self._sock = socket.create_connection((host, port), timeout=timeout)
        except TimeoutError:
            raise DeadlineError(f"pool server {self.peer}: no connection within {timeout} s") from None
        except OSError as error:
            raise TransportError(f"pool server {self.peer}: cannot be reached: {error.strerror or error}") from error
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 12_000)
        self._decoder = FrameDecoder(peer=f"pool server {self.peer}")
        self._reader = threading.Thread(target=self._read, name="kvrdma-pool-reader", daemon=True)
        try:
            self._sock.settimeout(timeout)
            self._sock.sendall(protocol.preface())
            self._sock.settimeout(None)
            self._reader.start()
            self._greet(name, token, Deadline(timeout))
        except KVRDMAError:  # first: a DeadlineError is an OSError too
            self.close()
            raise
        except OSError as error:
            self.close()
            raise TransportError(f"pool server {self.peer}: {error.strerror or error}") from error

    def _greet(self, name: str, token: bytes | None, deadline: Deadline) -> None:
        """Prove that we know the token, and see to it that the server does."""
        nonce = make_nonce()
        challenge = self.call(lambda seq: Hello(seq, name, nonce), Challenge, timeout=deadline.left())
        if challenge.has_token and token is None:
            raise AuthenticationError(
                f"pool server {self.peer}: it wants a token; give its file as token_file, or the token in "
                f"{TOKEN_VARIABLE}"
            )
        if token is not None and not challenge.has_token:
            raise AuthenticationError(
                f"pool server {self.peer}: it has no token, and this client was given one; start it with "
                "--token-file, or take the token from this client"
            )
        secret, said = token or b"", (nonce, challenge.nonce)
        proof = prove(secret, Role.CLIENT, PURPOSE, *said)
        try:
            self.hello = self.call(lambda seq: Proof(seq, proof), HelloReply, timeout=deadline.left())
        except BackendError as error:
            raise AuthenticationError(str(error)) from None
        if not check_proof(self.hello.proof, secret, Role.SERVER, PURPOSE, *said):
            raise AuthenticationError(f"pool server {self.peer}: it does not know the token")
        self.stream_secret = derive_secret(secret, STREAMS, *said)

    @property
    def broken(self) -> bool:
        """Whether it has ended."""
        return self._error is not None

    def call(self, make: Callable[[int], Message], reply: type[M], *, timeout: float) -> M:
        """Send a request and wait for its reply.

        Raises:
            BackendError: the server refused it, and said why.
            DeadlineError: no reply within `timeout` seconds; the session lives on, unless a part was sent.
            TransportError, ProtocolError: the session has ended.
        """
        seq = next(self._numbers)
        future: Future[Message] = Future()
        deadline = time.monotonic() + timeout
        with self._guard:
            if self._error is not None:
                raise self._error
            self._waiting[seq] = future
        try:
            self.send(make(seq), timeout=timeout)
        except DeadlineError:
            with self._guard:
                self._waiting.pop(seq, None)
            raise
        try:
            answer = future.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError:
            with self._guard:
                self._waiting.pop(seq, None)
            if future.done():
                answer = future.result()
            else:
                raise DeadlineError(f"pool server {self.peer}: no reply within {timeout:.3g} s") from None
        if isinstance(answer, ErrorReply):
            raise BackendError(f"pool server {self.peer}: {answer.text}")
        if not isinstance(answer, reply):
            error = ProtocolError(f"pool server {self.peer}: {type(answer).__name__} is no answer here")
            self.end(error)
            raise error
        return answer

    def send(self, message: Message, *, timeout: float = _NOTE_S) -> None:
        """Send a message that wants no reply; raises as `call` does."""
        raw = memoryview(protocol.encode(message))
        deadline = time.monotonic() + timeout
        n = 0
        try:
            if not self._send_guard.acquire(timeout=max(0.0, timeout)):
                raise DeadlineError(f"pool server {self.peer}: other messages took longer than {timeout:.3g} s")
            try:
                while n < len(raw):
                    try:
                        n += self._sock.send(raw[n:], socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        if not wait_until_writable(self._sock, deadline - time.monotonic()):
                            raise DeadlineError(f"pool server {self.peer}: took no bytes for {timeout:.3g} s") from None
            finally:
                self._send_guard.release()
        except DeadlineError as late:
            if n:  # nothing that followed half a frame could be read
                self.end(late)
            raise
        except OSError as error:
            broken = TransportError(f"pool server {self.peer}: {error.strerror or error}")
            self.end(broken)
            raise broken from error

    def keyspace(self, keyspace: KeySpace, *, timeout: float) -> int:
        """The server's number for a key space, which it is told of once."""
        digest = keyspace.digest
        if digest not in self._keyspaces:
            answer = self.call(
                lambda seq: protocol.OpenKeySpace(seq, keyspace.to_fields(), digest),
                protocol.KeySpaceReply,
                timeout=timeout,
            )
            self._keyspaces[digest] = answer.keyspace
        return self._keyspaces[digest]

    def endpoint(self, connect: Callable[[Session, float], Endpoint], *, timeout: float) -> Endpoint:
        """The endpoint of this session, made at its first use."""
        with self._endpoint_guard:
            if self._endpoint is None:
                endpoint = connect(self, timeout)
                self._endpoint = endpoint
                endpoint.add_close_callback(
                    lambda: self.end(TransportError(f"pool server {self.peer}: the data connection ended"))
                )
                if self._error is not None:
                    endpoint.abort()
                    raise self._error
            return self._endpoint

    def end(self, error: KVRDMAError) -> None:
        """End everything: whoever waits gets `error`. Idempotent, from any thread.

        When it returns the endpoint is aborted, whoever began it: no slot of ours is read any more.
        """
        with self._guard:
            first = self._error is None
            if first:
                self._error = error
            waiting, self._waiting = self._waiting, {}
        if first:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("pool server %s: the socket was down already", self.peer)
        if self._endpoint is not None:
            self._endpoint.abort()
        for future in waiting.values():  # last: whoever waits lets go of memory that the endpoint was reading
            future.set_exception(error)

    def close(self) -> None:
        """Say goodbye and end."""
        if not self.broken:
            try:
                self.send(Goodbye(0, "client closes"))
            except KVRDMAError:
                logger.debug("pool server %s: left before the goodbye", self.peer)
        self.end(ClosedError(f"pool server {self.peer}: session closed"))
        if self._reader.is_alive() and threading.current_thread() is not self._reader:
            self._reader.join()
        self._sock.close()

    def _read(self) -> None:
        error: KVRDMAError = TransportError(f"pool server {self.peer}: closed the connection")
        try:
            while chunk := self._sock.recv(_CHUNK):
                for message in self._decoder.feed(chunk):
                    if isinstance(message, Goodbye):
                        error = TransportError(f"pool server {self.peer}: {message.text}")
                        return
                    with self._guard:
                        future = self._waiting.pop(message.seq, None)
                    if future is not None:
                        future.set_result(message)
                    elif isinstance(message, protocol.GetReply):  # too late: nobody reads under its lease
                        self.send(protocol.Release(0, message.lease, b""))
        except OSError as broken:
            error = TransportError(f"pool server {self.peer}: {broken.strerror or broken}")
        except KVRDMAError as nonsense:  # or a send that failed
            error = nonsense
        finally:
            self.end(error)


def wait_until_writable(sock: socket.socket, timeout: float) -> bool:
    """Whether a socket takes bytes within `timeout` seconds."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return timeout > 0 and bool(poll.poll(timeout * 1000))


class Deadline:
    """What is left of a time-out that several steps share."""

    def __init__(self, timeout: float) -> None:
        self._until = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds left; raises `DeadlineError` where there are none."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise DeadlineError("the time-out is over before the next step could begin")
        return left
