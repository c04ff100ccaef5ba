"""A client's control connection: frames in and out with bounds in size and time, and the proof that comes first."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

from kvrdma import protocol
from kvrdma.auth import NONCE_NBYTES, Role, check_proof, derive_secret, make_nonce, prove
from kvrdma.errors import AuthenticationError, ProtocolError
from kvrdma.protocol import Challenge, ErrorReply, FrameDecoder, Hello, Message, Proof
from kvrdma.transports.tcp import keep_alive

FRAME_TIMEOUT_S: Final = 15.0
CHUNK_NBYTES: Final = 1 << 16
_MAX_UNSENT: Final = 64 << 20
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Proved:
    """A client that proved itself: what it calls itself, the server's proof for it, its data streams' secret."""

    seq: int  # of the message that waits for an answer
    client: str
    proof: bytes
    stream_secret: bytes = field(repr=False)


class Connection:
    """Messages of one client. A client that does not read, or begins a frame and stops, is not waited for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = writer.get_extra_info("peername")[:2]
        self.peer = f"{host}:{port}"
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder(peer=self.peer, max_frame=protocol.MAX_GREETING_FRAME)
        keep_alive(writer.get_extra_info("socket"))  # a client that vanished without a word holds leases
        writer.write(protocol.preface())

    def send(self, message: Message) -> None:
        """Queue a message. A client that lets 64 MiB pile up is cut off."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _MAX_UNSENT:
            self._writer.transport.abort()
        else:
            self._writer.write(protocol.encode(message))

    async def authenticate(self, token: bytes | None) -> Proved:
        """Have the client prove that it knows the token.

        Raises:
            AuthenticationError: it does not.
            ProtocolError, EOFError: it sent something else, or left.
        """
        hello = await self._only(Hello)
        if len(hello.nonce) != NONCE_NBYTES:
            raise ProtocolError(f"hello: a nonce has {NONCE_NBYTES} bytes, not {len(hello.nonce)}")
        secret, said = token or b"", (hello.nonce, make_nonce())
        self.send(Challenge(hello.seq, said[1], int(token is not None)))
        proof = await self._only(Proof)
        if not check_proof(proof.proof, secret, Role.CLIENT, protocol.PURPOSE, *said):
            self.send(ErrorReply(proof.seq, "the proof does not hold: this client has another token than the server"))
            raise AuthenticationError("its proof does not hold: it has another token, or none")
        self._decoder.max_frame = protocol.MAX_FRAME
        return Proved(
            proof.seq,
            hello.client,
            prove(secret, Role.SERVER, protocol.PURPOSE, *said),
            derive_secret(secret, protocol.STREAMS, *said),
        )

    async def messages(self) -> AsyncIterator[Message]:
        """Every message until the client leaves.

        Raises:
            ProtocolError: nonsense, or half a frame and then silence.
        """
        loop = asyncio.get_running_loop()
        deadline: float | None = None  # of the frame that has begun
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    data = await self._reader.read(CHUNK_NBYTES)
            except TimeoutError:
                if deadline is None or loop.time() < deadline:
                    raise  # of the socket: the client has vanished
                raise ProtocolError(f"a frame that was not whole after {FRAME_TIMEOUT_S:g} s") from None
            if not data:
                return
            whole = False
            for message in self._decoder.feed(data):
                whole = True
                yield message
            if not self._decoder.partial:
                deadline = None
            elif whole or deadline is None:
                deadline = loop.time() + FRAME_TIMEOUT_S

    async def close(self) -> None:
        """Send what is queued, for at most a second, and end."""
        self._writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)
        self._writer.transport.abort()  # of a client that reads nothing: `Server.wait_closed` would wait for it

    async def _only(self, cls: type[M]) -> M:
        """The next message, which must be of one kind and come alone."""
        while True:
            data = await self._reader.read(CHUNK_NBYTES)
            if not data:
                raise EOFError("left before it had proved itself")
            messages = list(self._decoder.feed(data))
            if not messages:
                continue
            if len(messages) > 1 or not isinstance(messages[0], cls):
                raise ProtocolError(f"a {cls.__name__.lower()}, and nothing else, must come here")
            return messages[0]
