"""General compressors. What they unpack has a length that is known beforehand; they never give, or set memory aside for, more.

This module must never know what the bytes mean.
"""

import zlib

import numpy

from fedmpi.codecs import Packer
from fedmpi.errors import ProtocolError

_HEADERS = {"deflate": -zlib.MAX_WBITS, "gzip": zlib.MAX_WBITS | 16}  # gzip's header would carry a time; zlib writes 0
SLACK = 1 << 7  # beyond len / 128, what incompressible bytes may grow by in any of the three


def most_bytes(num: int) -> int:
    """More than `num` bytes ever become."""
    return num + num // 128 + SLACK


def pack(packer: Packer, data: memoryview) -> bytes:
    """Compressed bytes, the same for the same input and library."""
    if packer.name == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=packer.level, write_checksum=False).compress(data)
    state = zlib.compressobj(packer.level, zlib.DEFLATED, _HEADERS[packer.name])
    return state.compress(data) + state.flush()


def unpack(packer: Packer, data: memoryview, most: int) -> bytes:
    """The bytes again, at most `most` of them; anything else in `data` is a ProtocolError."""
    try:
        return _unzstd(data, most) if packer.name == "zstd" else _inflate(packer, data, most)
    except zlib.error as broken:
        raise ProtocolError(f"{packer.name} cannot be undone: {broken}") from None


def _unzstd(data: memoryview, most: int) -> bytes:
    import zstandard

    try:
        state = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        frame = zstandard.get_frame_parameters(data)
        if not 0 <= frame.content_size <= most:
            raise ProtocolError(f"zstd claims {frame.content_size} bytes, at most {most} can be meant")
        found = state.decompress(data)
    except zstandard.ZstdError as broken:
        raise ProtocolError(f"zstd cannot be undone: {broken}") from None
    if len(found) != frame.content_size or not state.eof or state.unused_data:
        raise ProtocolError(f"zstd ended after {len(found)} bytes of {frame.content_size}")
    return found


def _inflate(packer: Packer, data: memoryview, most: int) -> bytes:
    state = zlib.decompressobj(_HEADERS[packer.name])
    found = state.decompress(data, most + 1)
    if len(found) > most or not state.eof or state.unused_data:
        raise ProtocolError(f"{packer.name} gave {len(found)} bytes without coming to its end, at most {most} can be meant")
    return found


def shuffle(data: memoryview, width: int) -> memoryview:
    """First bytes of all values, then all second bytes, ...: exponents compress when they stand together."""
    if len(data) % width:
        raise ProtocolError(f"{len(data)} bytes are no values of {width}")
    return numpy.ascontiguousarray(numpy.frombuffer(data, dtype=numpy.uint8).reshape(-1, width).T).data.cast("B")


def unshuffle(data: memoryview, width: int) -> memoryview:
    """The values again."""
    if len(data) % width:
        raise ProtocolError(f"{len(data)} bytes are no values of {width}")
    return numpy.ascontiguousarray(numpy.frombuffer(data, dtype=numpy.uint8).reshape(width, -1).T).data.cast("B")
