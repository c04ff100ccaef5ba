"""The tcp transport's bytes, almost right: its machines end a connection, and touch no byte that is not theirs."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from by_hand import NBYTES, Bench, HandLoop
from fuzzing import Fuzzer, Fuzzing

from kvrdma.errors import ProtocolError
from kvrdma.transports import Opcode, RemoteRegion, Rights, TransferBatch
from kvrdma.transports.regions import TOKEN_NBYTES
from kvrdma.transports.tcp import wire
from kvrdma.transports.tcp.wire import Frame, Greeting, Header


def test_greetings(fuzzing: Fuzzing) -> None:
    for draw in fuzzing.inputs(500, 100_000):
        greeting = Greeting(
            draw.randbytes(16), draw.randrange(3), draw.randrange(4), draw.randbytes(draw.randrange(33))
        )
        raw = draw.mutated(greeting.encode())[: wire.GREETING_NBYTES].ljust(wire.GREETING_NBYTES, b"\0")
        with suppress(ProtocolError):
            assert len(Greeting.decode(raw).encode()) == wire.GREETING_NBYTES
        challenge = wire.encode_challenge(draw.randbytes(16))
        raw = draw.mutated(challenge)[: wire.CHALLENGE_NBYTES].ljust(wire.CHALLENGE_NBYTES, b"\0")
        try:
            assert wire.encode_challenge(wire.decode_challenge(raw)) == raw
        except ProtocolError:
            assert raw != challenge


def test_headers_and_bodies(fuzzing: Fuzzing) -> None:
    for draw in fuzzing.inputs(500, 100_000):
        raw = draw.mutated(any_frame(draw, [bytes(TOKEN_NBYTES)])).ljust(wire.HEADER_NBYTES, b"\0")
        try:
            header = Header.decode(raw[: wire.HEADER_NBYTES])
        except ProtocolError:
            continue
        body = raw[wire.HEADER_NBYTES :].ljust(header.body_nbytes, b"\xff")[: header.body_nbytes]
        if header.frame in {Frame.READ_REQUEST, Frame.WRITE_REQUEST}:
            tokens, *columns = wire.decode_request(header, body)
            assert all(len(token) == TOKEN_NBYTES for token in tokens)
            assert [len(column) for column in columns] == [header.n_ranges] * 3


# -- an endpoint, whose loop is turned by hand


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def unexpected() -> Iterator[list[str]]:
    """What the transport logs with a traceback: exceptions that it did not mean to raise."""
    found: list[str] = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                found.append(self.format(record))

    logger, catch = logging.getLogger("kvrdma.transports"), Catch()
    logger.addHandler(catch)
    logger.setLevel(logging.ERROR)
    yield found
    logger.removeHandler(catch)
    logger.setLevel(logging.NOTSET)


def any_frame(draw: Fuzzer, tokens: list[bytes]) -> bytes:
    """A frame that makes sense, or nearly."""
    n = draw.randrange(5)
    rows, offsets, sizes = (
        np.array([draw.int64() if draw.chance(0.1) else draw.randrange(most) for _ in range(n)], dtype=np.int64)
        for most in (2, NBYTES, NBYTES // 4)
    )
    named = [
        draw.choice(tokens) if draw.chance(0.9) else draw.randbytes(TOKEN_NBYTES) for _ in range(draw.randrange(3))
    ]
    op, priority = draw.randrange(6), draw.randrange(3)
    match draw.randrange(8):
        case 0 | 1 | 2:
            return wire.encode_request(Frame.READ_REQUEST, op, priority, named, rows, offsets, sizes, 0)
        case 3 | 4 | 5:
            payload = draw.randbytes(int(np.clip(sizes, 0, NBYTES).sum()))
            size = len(payload) if draw.chance(0.95) else draw.randrange(1 << 27)
            return wire.encode_request(Frame.WRITE_REQUEST, op, priority, named, rows, offsets, sizes, size) + payload
        case 6:
            return wire.encode_note(draw.choice((Frame.CANCEL, Frame.CANCEL, Frame.GOODBYE)), op)
    status = np.array([draw.randrange(3) for _ in range(n)], dtype=np.uint8)
    frame = draw.choice((Frame.READ_REPLY, Frame.WRITE_REPLY))
    return wire.encode_reply(frame, op, priority, status, draw.randrange(9) if frame is Frame.READ_REPLY else 0)


def drive(loop: HandLoop, there: socket.socket, raw: bytes, draw: Fuzzer) -> bytes:
    """Feed bytes in portions and turn the loop; what came back."""
    back = bytearray()

    def take() -> None:
        try:
            while part := there.recv(1 << 16):
                back.extend(part)
        except (BlockingIOError, ConnectionError):
            return

    for portion in draw.portions(raw):
        rest = memoryview(portion)
        while rest and loop.handlers:
            try:
                rest = rest[there.send(rest) :]
            except BlockingIOError:
                pass
            except OSError:
                break
            loop.turn()
            take()
    for _ in range(3):
        loop.turn()
        take()
    return bytes(back)


def test_requests_to_an_endpoint(fuzzing: Fuzzing, bench: Bench, unexpected: list[str]) -> None:
    """Whatever a peer asks, it reads and writes what was exported to it and with those rights, and nothing else."""
    tokens, answered = list(bench.tokens.values()), 0
    for draw in fuzzing.inputs(1000, 100_000):
        endpoint, loop, there = bench.connect()
        only_read = draw.chance(0.5)
        bench.exported[:] = 0x55
        raw = b"".join(
            any_frame(draw, [bench.tokens[Rights.READ]] if only_read else tokens) for _ in range(draw.randrange(1, 5))
        )
        if draw.chance(0.5):
            raw = draw.mutated(raw)
        answered += bool(drive(loop, there, raw, draw))
        endpoint.abort()
        there.close()
        assert not loop.handlers
        assert bench.guarded()
        assert (bench.target == 0xEE).all()
        assert not only_read or (bench.exported == 0x55).all()
        assert unexpected == []
    assert answered


def test_replies_to_an_endpoint(fuzzing: Fuzzing, bench: Bench, unexpected: list[str]) -> None:
    """Whatever a peer answers, a READ writes only where it was to write, and ends with its endpoint."""
    remote, served = RemoteRegion("tcp", NBYTES, bytes(TOKEN_NBYTES)), 0
    for draw in fuzzing.inputs(750, 80_000):
        endpoint, loop, there = bench.connect()
        bench.target[:] = 0xEE
        n, size = draw.randrange(1, 5), draw.choice((8, 100))
        rows = np.zeros(n, dtype=np.int64)
        offsets = np.arange(n, dtype=np.int64) * 2 * size
        batch = TransferBatch(
            Opcode.READ, [bench.local], [remote], rows, offsets, rows, offsets, np.full(n, size, dtype=np.int64)
        )
        transfers = [endpoint.post(batch, timeout=60) for _ in range(draw.randrange(1, 3))]
        raw = b""
        for op in range(1, len(transfers) + 1):
            status = np.array([draw.chance(0.2) for _ in range(n)], dtype=np.uint8)
            payload = b"\xaa" * int((status == 0).sum() * size)
            raw += wire.encode_reply(Frame.READ_REPLY, op, 0, status, len(payload)) + payload
        if draw.chance(0.8):
            raw = draw.mutated(raw)
        drive(loop, there, raw, draw)
        endpoint.abort()
        there.close()
        mine = np.zeros(NBYTES, dtype=np.bool_)
        mine[(offsets[:, None] + np.arange(size)).ravel()] = True
        assert (bench.target[~mine] == 0xEE).all()
        assert bench.guarded()
        assert all(transfer.done() for transfer in transfers)
        served += any(transfer.ok.any() for transfer in transfers)
        assert unexpected == []
    assert served
