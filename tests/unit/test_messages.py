"""Headers and frames: what goes in comes out, and nothing malformed gets through."""

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.errors import ProtocolError
from fedmpi.messages import CHUNK_BYTES, FRAME_BYTES, HEADER_BYTES, Header, Kind, check_frame, chunks, frame

INT32, UINT32, UINT64 = st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
HEADERS = st.builds(Header, st.sampled_from(Kind), INT32, INT32, st.integers(0, 2**46), UINT64, UINT32, st.integers(1, 2**28))


def forged(header: Header, place: int, value: bytes) -> bytes:
    """A header with bytes replaced and its checksum made right again, as a hostile or foreign sender could."""
    body = bytearray(header.pack()[:-8])
    body[place : place + len(value)] = value
    return bytes(body) + struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(body)))


@given(HEADERS)
def test_a_header_comes_back(header: Header) -> None:
    assert len(header.pack()) == HEADER_BYTES
    assert Header.unpack(header.pack()) == header


def test_a_header_is_little_endian_with_magic_and_version_first() -> None:
    data = Header(Kind.UPDATE, round=7, client=-1, length=2**33 + 1, manifest=5, flags=9).pack()
    assert data[:8] == b"FMPI" + bytes([2, 0, Kind.UPDATE, 0])
    assert data[8:40] == bytes.fromhex("07000000ffffffff010000000200000005000000000000000900000000004000")
    assert struct.unpack("<Q", data[56:])[0] == xxhash.xxh3_64_intdigest(data[:56])


@given(HEADERS, st.integers(0, HEADER_BYTES * 8 - 1))
def test_no_single_bit_of_a_header_can_be_damaged_unseen(header: Header, bit: int) -> None:
    data = bytearray(header.pack())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        Header.unpack(data)


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_arbitrary_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Header.unpack(data)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (0, b"HTTP", "b'HTTP'"),
        (4, bytes([9, 0]), "protocol version 2, found 9"),
        (6, bytes([77, 0]), "found 77"),
        (16, b"\xff" * 8, "claims 18446744073709551615"),
        (36, bytes(4), "chunks of 1 to .* says 0"),
        (36, b"\xff" * 4, "says 4294967295"),
        (40, b"\xff" * 4, "note of at most 1048576 bytes, the header claims 4294967295"),
    ],
)
def test_a_header_says_what_is_wrong_with_it(place: int, value: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        Header.unpack(forged(Header(Kind.UPDATE), place, value))


@pytest.mark.parametrize("length", [0, 63, 65])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match=f"64 bytes, found {length}"):
        Header.unpack(bytes(length))


@given(st.integers(0, 10_000), st.integers(1, 3_000))
def test_chunks_cover_a_payload_once_and_in_order(num_bytes: int, chunk_bytes: int) -> None:
    covered = [index for piece in chunks(num_bytes, chunk_bytes) for index in range(piece.start, piece.stop)]
    assert covered == list(range(num_bytes))
    assert all(0 < piece.stop - piece.start <= chunk_bytes for piece in chunks(num_bytes, chunk_bytes))


def test_chunks_of_more_than_2_gib_are_counted_not_made() -> None:
    pieces = list(chunks(5 << 30, CHUNK_BYTES))
    assert (len(pieces), pieces[-1].stop) == (1280, 5 << 30)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_a_frame_holds_for_its_chunk_alone(data: bytes, index: int) -> None:
    chunk, framing = memoryview(data), frame(memoryview(data), index)
    assert len(framing) == FRAME_BYTES
    check_frame(framing, chunk, index)
    damaged = bytes([data[0] ^ 1]) + data[1:]
    for wrong in ((memoryview(damaged), index), (chunk, index ^ 1), (memoryview(data + b"x"), index)):
        with pytest.raises(ProtocolError, match=f"chunk {wrong[1]}"):
            check_frame(framing, *wrong)
