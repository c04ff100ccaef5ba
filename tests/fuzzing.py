"""Inputs that are almost right: messages, frames and bytes for fuzzing, all from one seed."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeVar

import msgpack
import numpy as np

from kvrdma import protocol
from kvrdma.protocol import Message

T = TypeVar("T")

MESSAGES: Final[list[type[Message]]] = [
    cls for cls in vars(protocol).values() if isinstance(cls, type) and issubclass(cls, Message) and cls is not Message
]
NUMBERS: Final = sorted(
    {n + d for n in (0, 16, 100, 1 << 8, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 53, 1 << 62) for d in (-1, 0, 1)}
    | {(1 << 63) - 1, 1 << 63, (1 << 64) - 1}
)
_INT64S: Final = [n for n in NUMBERS if n < 1 << 63] + [-n for n in NUMBERS if n <= 1 << 63]
_BOMBS: Final = [  # what begins a value that never comes, is too deep, or is of a type that nobody sends
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xdc\xff\xff",
    b"\x91" * 600,
    b"\x81\xa1a" * 600,
    b"\xd6\xff\0\0\0\0",
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\xc1",
    b"\xa4\xff\xfe\xfd\xfc",
    b"\xed\xa0\x80",
]


class Fuzzer(random.Random):
    """Draws values and bytes. The same seed draws the same ones."""

    def chance(self, p: float) -> bool:
        return self.random() < p

    def number(self) -> int:
        """Not negative, below 2**64, and often where something ends."""
        kind = self.random()
        if kind < 0.4:
            return self.randrange(8)
        return self.choice(NUMBERS) if kind < 0.9 else self.getrandbits(64)

    def int64(self) -> int:
        kind = self.random()
        if kind < 0.4:
            return self.randrange(8)
        return self.choice(_INT64S) if kind < 0.9 else self.getrandbits(64) - (1 << 63)

    def blob(self, most: int = 64) -> bytes:
        return self.randbytes(self.choice((0, 1, 8, 10, 16, 20, 32, self.randrange(most + 1))))

    def text(self) -> str:
        return "".join(self.choices("ab:/%\0ü€\U0001f600", k=self.randrange(12)))

    def value(self, depth: int = 3) -> Any:
        """Whatever msgpack can carry."""
        kind = self.randrange(12 if depth else 9)
        if kind < 2:
            return self.number()
        if kind < 9:
            return (
                self.blob(),
                self.text(),
                None,
                self.chance(0.5),
                -self.number() // 2,
                self.random() * 10.0 ** self.randrange(-300, 300),
                msgpack.ExtType(self.randrange(128), self.blob()),
            )[kind - 2]
        if kind < 11:
            return [self.value(depth - 1) for _ in range(self.randrange(4))]
        return {self.text(): self.value(depth - 1) for _ in range(self.randrange(4))}

    def of_type(self, name: str) -> Any:
        """A value of a message field's type, by the type's name."""
        match name:
            case "int":
                return self.number()
            case "str":
                return self.text()
            case "bytes":
                return self.blob()
            case "list[Any]":
                return [self.value(2) for _ in range(self.randrange(4))]
            case "dict[str, Any]":
                return {self.text(): self.value(2) for _ in range(self.randrange(4))}
        raise AssertionError(f"messages have no field of type {name}")

    def message(self) -> Message:
        """Any message with values of the right types, and no sense."""
        cls = self.choice(MESSAGES)
        return cls(*(self.of_type(str(field.type)) for field in dataclasses.fields(cls)))

    def body(self, message: Message) -> bytes:
        """A frame's body: the message, now and then with a field that is wrong, missing or too much."""
        values = [message.TYPE, *(getattr(message, field.name) for field in dataclasses.fields(message))]
        if self.chance(0.3):
            match self.randrange(4):
                case 0:
                    values[self.randrange(len(values))] = self.value()
                case 1:
                    del values[self.randrange(len(values))]
                case 2:
                    values.insert(self.randrange(len(values) + 1), self.value())
                case 3:
                    values[0] = self.choice((0, -1, 20, 255, 1 << 40, self.randrange(22)))
        raw: bytes = msgpack.packb(values, use_bin_type=True)
        return raw

    def altered(self, message: Message) -> Message:
        """The message with one field of another value of the same type."""
        field = self.choice(dataclasses.fields(message))
        now = getattr(message, field.name)
        if isinstance(now, bytes) and now and self.chance(0.8):
            return dataclasses.replace(message, **{field.name: self.mutated(now)})
        if isinstance(now, list) and now and self.chance(0.8):
            return dataclasses.replace(message, **{field.name: self.rearranged(now)})
        return dataclasses.replace(message, **{field.name: self.of_type(str(field.type))})

    def rearranged(self, values: list[Any]) -> list[Any]:
        """A list with one element altered, doubled, missing or of another kind."""
        values = list(values)
        i = self.randrange(len(values))
        match self.randrange(4):
            case 0:
                del values[i]
            case 1:
                values.insert(i, values[i])
            case 2 if isinstance(values[i], list) and values[i]:
                values[i] = self.rearranged(values[i])
            case _:
                values[i] = self.value(2)
        return values

    def mutated(self, raw: bytes) -> bytes:
        """Bytes with a few changes: bits, bytes, numbers, pieces that go, come twice, or come from elsewhere."""
        data = bytearray(raw)
        for _ in range(self.choice((1, 1, 1, 2, 4))):
            at = self.randrange(len(data) + 1)
            n = self.choice((1, 2, 4, 8, self.randrange(1, 32)))
            match self.randrange(8):
                case 0 | 1 if data:
                    data[at % len(data)] ^= 1 << self.randrange(8)
                case 2 if data:
                    data[at % len(data)] = self.choice((0, 1, 0x7F, 0x80, 0xFF, self.randrange(256)))
                case 3:
                    data[at : at + n] = b""
                case 4:
                    data[at:at] = self.randbytes(n)
                case 5:
                    data[at:at] = data[at : at + n]
                case 6:
                    form = self.choice(("<Q", ">Q", ">I", "<I", ">H"))
                    mask = (1 << 8 * struct.calcsize(form)) - 1
                    word = struct.pack(form, self.number() & mask)
                    data[at : at + len(word)] = word
                case _:
                    data[at:at] = self.choice(_BOMBS)
        return bytes(data[: self.randrange(len(data) + 1)] if self.chance(0.1) else data)

    def spliced(self, first: bytes, second: bytes) -> bytes:
        """The beginning of one and the end of the other."""
        return first[: self.randrange(len(first) + 1)] + second[self.randrange(len(second) + 1) :]

    def frame(self, body: bytes) -> bytes:
        """A control frame, whose length is wrong now and then."""
        length = len(body)
        if self.chance(0.05):
            length = self.choice(
                (0, 1, length + 1, length // 2, protocol.MAX_FRAME, protocol.MAX_FRAME + 1, 0xFFFFFFFF)
            )
        return struct.pack(">I", length) + body

    def columns(self, n_columns: int, n: int) -> bytes:
        """int64 columns as they cross the wire."""
        return np.array([self.int64() for _ in range(n_columns * n)], dtype="<i8").tobytes()

    def portions(self, raw: bytes) -> Iterator[bytes]:
        """The same bytes in one piece or in several."""
        if self.chance(0.5):
            yield raw
            return
        cuts = sorted(self.randrange(len(raw) + 1) for _ in range(self.randrange(1, 5)))
        for first, last in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            yield raw[first:last]

    def one_of(self, *choices: Sequence[T]) -> T:
        return self.choice(self.choice(choices))


class Fuzzing:
    """One test's inputs: as many as the kind of run wants, from the run's seed, and counted."""

    def __init__(self, name: str, seed: int, thorough: bool) -> None:
        self.draw = Fuzzer(f"{name} {seed}")
        self.count = 0
        self._thorough = thorough

    def inputs(self, usual: int, thorough: int) -> Iterator[Fuzzer]:
        """Give what draws, once for each input."""
        for _ in range(thorough if self._thorough else usual):
            self.count += 1
            yield self.draw

    def rows(self, usual: int, thorough: int) -> Iterator[Fuzzer]:
        """Give what draws until so many inputs are counted, which is the caller's: several go out at once."""
        while self.count < (thorough if self._thorough else usual):
            yield self.draw
