"""A message on its way out: the pieces that it is written in, and the count of what went.

On the wire stand a header; where note and payload are small together, one piece of both; else the note in a piece, and the payload
in chunks. Each piece comes behind a frame with its length, its number and its checksum. This module must never know a wire, or
what a payload means.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedmpi.messages import FRAME_BYTES, HEADER_BYTES, STREAM, Header, Kind, Payload, chunks, frame, frame_length

SMALL_BYTES = 64 << 10  # payloads up to this travel in one piece with their frame, and need no permit
CONTROL = frozenset({Kind.HEARTBEAT, Kind.STOP_WANTED, Kind.BYE, Kind.ABORT})
NOTE = 0xFFFFFFFF  # the number of a note that is a piece of its own


@dataclass
class Traffic:
    """What went one way over the links to one peer: whole messages only, liveness and leave-taking apart."""

    messages: int = 0
    payload_bytes: int = 0
    header_bytes: int = 0
    control_bytes: int = 0

    def count(self, header: Header, payload_bytes: int) -> None:
        """Add one message, whose payload took so many bytes."""
        num_pieces = 1 if is_small(header) else bool(header.note) - (-header.length // header.chunk_bytes)
        around = HEADER_BYTES + header.note + (num_pieces * FRAME_BYTES if header.note + header.length else 0)
        if header.kind in CONTROL:
            self.control_bytes += around + payload_bytes
        else:
            self.messages += 1
            self.payload_bytes += payload_bytes
            self.header_bytes += around


class Outgoing:
    """A message to one or several peers. Each chunk is checksummed once, when the first of them comes to it."""

    def __init__(self, header: Header, payload: Payload | None, chunk_bytes: int, note: bytes = b"") -> None:
        self.payload: Payload = memoryview(b"") if payload is None else payload
        self._note = note.ljust(-(-len(note) // 8) * 8)  # so that what comes behind it is aligned
        each = header.chunk_bytes if header.flags & STREAM else chunk_bytes
        self.header = replace(header, length=len(self.payload), chunk_bytes=each, note=len(self._note))
        self._frames: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    @property
    def payload_bytes(self) -> int:
        """What the payload took, once it has been sent."""
        if not self.header.flags & STREAM:
            return self.header.length
        return sum(frame_length(framing, self.header.chunk_bytes) for framing in self._frames.values())

    def parts(self) -> Iterator[tuple[memoryview, ...]]:
        """What is written at once, one after the other."""
        head: tuple[memoryview, ...] = (_writable(self.header.pack()),)
        if is_small(self.header):
            both = memoryview(self._note + self.payload[: len(self.payload)])
            yield (*head, _writable(frame(both, 0) + both)) if both else head
            return
        if self._note:
            head += (_writable(frame(memoryview(self._note), NOTE) + self._note),)
        for index, place in enumerate(chunks(len(self.payload), self.header.chunk_bytes)):
            yield (*head, *self._framed(index, place))
            head = ()

    def _framed(self, index: int, place: slice) -> tuple[memoryview, memoryview]:
        chunk = self.payload[place]
        with self._lock:
            if index not in self._frames:
                self._frames[index] = _writable(frame(chunk, index))
            return self._frames[index], chunk


def _writable(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def is_small(header: Header) -> bool:
    """Whether both sides treat note and payload as one piece with its frame."""
    return not header.flags & STREAM and header.note + header.length <= min(SMALL_BYTES, header.chunk_bytes)
