"""What goes over a link: a 64-byte header, perhaps a note, then a payload in checksummed chunks.

A payload is a sequence of chunks, each of a fixed number of bytes but for the last. Whatever can be sliced can be sent: chunk by
chunk, `payload[place]` gives the bytes of that place. It is asked once for each peer, when that comes to the place, and gives all
of them the same: a slice of memory, or what is put together on the way. In a stream the chunks stand for so many bytes, and have
lengths of their own.

Nothing that came from outside is believed before it was checked: every malformed input is a ProtocolError that says what was
expected and what was found, raised before memory is set aside for it. This module must never know who is at the other end, over
what the bytes go, or that there are tensors.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import xxhash

from fedmpi.errors import ProtocolError

MAGIC = b"FMPI"
VERSION = 2
HEADER_BYTES = 64
FRAME_BYTES = 16
STREAM = 1  # a flag: each chunk has a length of its own, which its frame says; `length` and `chunk_bytes` say what they stand for
CHUNK_BYTES = 4 << 20
MAX_CHUNK_BYTES = 1 << 28  # what Open MPI surely carries in one message, and far above what helps
MAX_PAYLOAD_BYTES = 1 << 46
MAX_NOTE_BYTES = 1 << 20

_HEADER = struct.Struct("<4sHHiiQQIII12x")
_CHECKSUM = struct.Struct("<Q")
_FRAME = struct.Struct("<IIQ")


class Kind(IntEnum):
    """What a message is for."""

    HELLO = 1
    WELCOME = 2
    ROUND = 3
    BROADCAST = 4
    UPDATE = 5
    FAILURE = 6
    HEARTBEAT = 7
    STOP_WANTED = 8
    BYE = 9
    ABORT = 10
    MANIFEST = 11
    FAREWELL = 13
    QUESTION = 14
    ANSWER = 15
    FOLD = 16
    SUPPLY = 17
    CODED = 18  # a broadcast or an update under a codec chain
    ADDED = 19  # the figures of a client whose update its rank has added to its sum
    SUM = 20  # what a rank has added up
    TOGETHER = 21  # a collective follows, which all ranks take part in
    STUCK = 22  # a turn makes no step and cannot be interrupted; its rank's answers may come some day
    SEAL = 23  # what a client says when its coded update has left


@dataclass(frozen=True)
class Header:
    """The fixed-size announcement of a message. The link that sends it fills in `length`, `note` and `chunk_bytes`."""

    kind: Kind
    round: int = -1
    client: int = -1
    length: int = 0
    manifest: int = 0
    flags: int = 0
    chunk_bytes: int = CHUNK_BYTES
    note: int = 0  # bytes of the note that comes before the payload

    def pack(self) -> bytes:
        """The 64 bytes that go over the wire."""
        numbers = (self.round, self.client, self.length, self.manifest, self.flags, self.chunk_bytes, self.note)
        body = _HEADER.pack(MAGIC, VERSION, self.kind, *numbers)
        return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))

    @staticmethod
    def unpack(data: bytes | bytearray | memoryview) -> "Header":
        """The header in `data`; a ProtocolError says which part of it is wrong."""
        if len(data) != HEADER_BYTES:
            raise ProtocolError(f"a header has {HEADER_BYTES} bytes, found {len(data)}")
        body = bytes(data[: _HEADER.size])
        magic, version, kind, *numbers = _HEADER.unpack(body)
        if magic != MAGIC:
            raise ProtocolError(f"a header begins with {MAGIC!r}, found {magic!r}: no fedmpi speaks there")
        if version != VERSION:
            raise ProtocolError(f"expected protocol version {VERSION}, found {version}: install it alike on all ranks")
        _same_checksum("header", xxhash.xxh3_64_intdigest(body), _CHECKSUM.unpack(data[_HEADER.size :])[0])
        if kind not in set(Kind):
            raise ProtocolError(f"expected a message kind in {min(Kind)}..{max(Kind)}, found {kind}")
        return _plausible(Header(Kind(kind), *numbers))


def _plausible(header: Header) -> Header:
    if not 0 < header.chunk_bytes <= MAX_CHUNK_BYTES:
        raise ProtocolError(f"expected chunks of 1 to {MAX_CHUNK_BYTES} bytes, the header says {header.chunk_bytes}")
    if header.note > MAX_NOTE_BYTES:
        raise ProtocolError(f"expected a note of at most {MAX_NOTE_BYTES} bytes, the header claims {header.note}")
    if header.length > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"expected at most {MAX_PAYLOAD_BYTES} payload bytes, the header claims {header.length}")
    return header


def _same_checksum(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise ProtocolError(f"checksum of the {what} is {expected:016x}, but {found:016x} was sent: damaged bytes")


def chunks(num_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """The slices that a payload of `num_bytes` is sent in."""
    return (slice(start, min(start + chunk_bytes, num_bytes)) for start in range(0, num_bytes, chunk_bytes))


def frame(chunk: memoryview, index: int) -> bytes:
    """The 16 bytes that go before a chunk."""
    return _FRAME.pack(len(chunk), index, xxhash.xxh3_64_intdigest(chunk))


def frame_length(data: bytes | bytearray | memoryview, stands_for: int) -> int:
    """How long the chunk behind this frame is, in a stream: not much more than the bytes that it stands for."""
    length, _, _ = _FRAME.unpack(data)
    if length > (most := stands_for + stands_for // 4 + 1024):
        raise ProtocolError(f"a chunk that stands for {stands_for} bytes takes at most {most}, its frame says {length}")
    return int(length)


def check_frame(data: bytes | bytearray | memoryview, chunk: memoryview, index: int) -> None:
    """Raise a ProtocolError unless `chunk` is what its frame announced."""
    length, number, checksum = _FRAME.unpack(data)
    if (length, number) != (len(chunk), index):
        raise ProtocolError(f"expected chunk {index} of {len(chunk)} bytes, its frame says {number} of {length}")
    _same_checksum(f"chunk {index}", xxhash.xxh3_64_intdigest(chunk), checksum)


class Payload(Protocol):
    """What can be sent, see above: a memoryview of bytes is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> memoryview: ...
