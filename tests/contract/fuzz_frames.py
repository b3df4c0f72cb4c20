"""A fuzzer for what comes over a link: sound streams of every kind of message, damaged in every way, read by the real receiver.

    python -m tests.contract.fuzz_frames --frames 10000000 --seed 0

Damage: flipped bits, random bytes, frames left out, doubled, exchanged or cut, lengths that lie (with a checksum made to fit). The
receiver must come to an end with a ProtocolError or the end of the stream, hand on only what was really sent, and never ask for
more memory than it was told to accept.
"""

import argparse
import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from fedmpi.errors import FedmpiError
from fedmpi.manifest import manifest_of
from fedmpi.messages import HEADER_BYTES, STREAM, Header, Kind
from fedmpi.transports.link import Link
from fedmpi.transports.outgoing import Outgoing, Traffic

CHUNK_BYTES = 256
LIMIT_BYTES = 1 << 16


class Ended(ConnectionError):
    """The stream is over."""


@dataclass
class Tape:
    """A wire that plays pieces back, or records those written to it."""

    pieces: list[bytes] = field(default_factory=list)
    num_read: int = 0
    _rest: memoryview = field(default_factory=lambda: memoryview(b""))

    def write(self, *parts: memoryview) -> None:
        """Record."""
        self.pieces += [bytes(part) for part in parts]

    def flush(self) -> None:
        """All is recorded."""

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Play back."""
        for part in parts:
            self.num_read += 1
            filled = 0
            while filled < len(part):
                if not self._rest:
                    if not self.pieces:
                        raise Ended("end of the tape")
                    self._rest = memoryview(self.pieces.pop(0))
                taken = min(len(part) - filled, len(self._rest))
                part[filled : filled + taken] = self._rest[:taken]
                filled, self._rest = filled + taken, self._rest[taken:]

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass
class Hub:
    """Takes what a link hands on, as a transport does, and keeps watch over what it asks for."""

    limit_bytes: int = LIMIT_BYTES
    in_chunks: frozenset[Kind] = frozenset({Kind.UPDATE})
    got: list[tuple[Any, ...]] = field(default_factory=list)
    error: Exception | None = None

    def take(self, link: Link, num_bytes: int, *_: Any) -> torch.Tensor:
        """A buffer, never a large one."""
        assert num_bytes <= self.limit_bytes, f"{num_bytes} bytes asked for, {self.limit_bytes} are the limit"
        return torch.empty(num_bytes, dtype=torch.uint8)

    def spoil(self, link: Link) -> None:
        """It will not come."""

    def arrived(self, link: Link, header: Header, payload: torch.Tensor | None, *more: Any) -> None:
        """Remember what came."""
        self.got.append((header, None if payload is None else payload.numpy().tobytes(), *more))

    def lost(self, link: Link, error: Exception) -> None:
        """Why the link is of no use any more."""
        self.error = error


@dataclass
class Stream:
    """A payload whose chunks have lengths of their own."""

    chunks: list[bytes]

    def __len__(self) -> int:
        return CHUNK_BYTES * len(self.chunks)

    def __getitem__(self, place: slice) -> memoryview:
        return memoryview(self.chunks[place.start // CHUNK_BYTES])


def sound(rng: random.Random) -> list[bytes]:
    """The pieces of a few messages as a link writes them."""
    tensors = {f"t{i}": torch.randn(rng.randint(0, 90)) for i in range(3)}
    manifest = manifest_of(tensors)
    payloads = [
        (Header(Kind.HEARTBEAT), None),
        (Header(Kind.MANIFEST, manifest=manifest.hash), memoryview(manifest.to_json())),
        (Header(Kind.BROADCAST, 3), memoryview(rng.randbytes(rng.choice((1, 200, 256, 257, 1000))))),
        (Header(Kind.UPDATE, 3, 1), memoryview(rng.randbytes(rng.choice((5, 256, 900))))),
        (Header(Kind.FAILURE, 3, 2), memoryview(b'{"kind": "K", "message": "M"}')),
    ]
    rng.shuffle(payloads)
    tape = Tape()
    link = Link(1, tape, Hub(), Traffic(), Traffic(), 1.0)
    for header, payload in payloads:
        link.send(Outgoing(header, payload, CHUNK_BYTES))
    coded = Stream([rng.randbytes(rng.randint(0, CHUNK_BYTES)) for _ in range(rng.randint(1, 5))])
    link.send(Outgoing(Header(Kind.CODED, 3, 1, flags=STREAM, chunk_bytes=CHUNK_BYTES), coded, CHUNK_BYTES, b"{}"))
    return tape.pieces


def play(pieces: Sequence[bytes]) -> tuple[Hub, int]:
    """What the receiver makes of these pieces, and how many it read."""
    tape, hub = Tape(list(pieces)), Hub()
    Link(1, tape, hub, Traffic(), Traffic(), 1.0)._receive()
    return hub, tape.num_read


def damage(pieces: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """The same stream with one to three things wrong with it."""
    found = list(pieces)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(found))
        match rng.randint(0, 7):
            case 0:
                found[at] = _flipped(found[at], rng)
            case 1:
                found[at] = rng.randbytes(len(found[at]))
            case 2 if len(found) > 1:
                del found[at]
            case 3:
                found.insert(at, found[at])
            case 4:
                other = rng.randrange(len(found))
                found[at], found[other] = found[other], found[at]
            case 5:
                found[at] = found[at][: rng.randint(0, len(found[at]))]
            case 6:
                found[at] += rng.randbytes(rng.randint(1, 80))
            case _:
                found[at] = _lying(found[at], rng)
    return found


def _flipped(piece: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(piece)
    if damaged:
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _lying(piece: bytes, rng: random.Random) -> bytes:
    """A header whose numbers are made up and whose checksum fits: what a stranger who knows the format would send."""
    if len(piece) != HEADER_BYTES:
        return _flipped(piece, rng)
    made_up = bytearray(piece[:-8])
    at = rng.randrange(6, len(made_up) - 8)
    made_up[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 1 << 20, 1 << 31, 1 << 40, (1 << 64) - 1, rng.getrandbits(64))))
    return bytes(made_up) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(made_up)))


def fuzz(num_frames: int, seed: int) -> tuple[int, int]:
    """Read at least so many damaged frames; gives frames read and streams refused. Raises where the receiver does anything else."""
    rng, frames, refused = random.Random(seed), 0, 0
    while frames < num_frames:
        pieces = sound(rng)
        whole, _ = play(pieces)
        assert isinstance(whole.error, FedmpiError) and "end of the tape" in str(whole.error), whole.error
        sent = b"".join(part[1] or b"" for part in whole.got)
        for _ in range(200):
            hub, num_read = play(damage(pieces, rng))
            frames += num_read
            assert isinstance(hub.error, FedmpiError) or hub.error is None, hub.error
            refused += "broke the protocol" in str(hub.error)
            for header, payload, *_ in hub.got:  # a checksum stands between a damaged payload and the program
                for start in range(0, len(payload or b""), CHUNK_BYTES):
                    assert payload[start : start + CHUNK_BYTES] in sent, f"{header} was handed on with bytes that nobody sent"
    return frames, refused


def main() -> None:
    """Print what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    frames, refused = fuzz(asked.frames, asked.seed)
    took_s = time.monotonic() - began
    print(f"{frames} pieces of damaged streams read, {refused} streams refused, {took_s:.0f} s, nothing else happened")


if __name__ == "__main__":
    main()
