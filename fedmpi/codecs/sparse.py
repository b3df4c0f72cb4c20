"""The largest values of a chunk and where they stand, close to the least number of bits that this takes.

Positions are ascending; what is written is the gap before each, by Rice's code: the low bits of the gap as they are, the rest in
unary. For gaps of random positions that is within 0.1 bit of the entropy of the choice. The bytes are

    low bits per gap (1) | bytes of the unary part (4) | unary part | low bits

This module must never know what the values are or how they are written.
"""

import math
import struct

import numpy
import torch
from numpy.typing import NDArray

from fedmpi.errors import NonFinite, ProtocolError

_HEAD = struct.Struct("<BI")
_MOST_LOW = 31


def num_kept(share: float, num: int) -> int:
    """How many of `num` values are sent: at least one of any."""
    return min(num, max(1, round(share * num)))


def most_bytes(share: float, num: int) -> int:
    """More than the positions of a chunk ever take."""
    kept = num_kept(share, num)
    low = _low_bits(num, kept)
    return _HEAD.size + -(-(kept + (num >> low)) // 8) + -(-kept * low // 8)


def choose(values: torch.Tensor, share: float) -> torch.Tensor:
    """Ascending positions of the values that are largest in magnitude; of equal ones, those that come first."""
    kept = num_kept(share, values.numel())
    magnitudes = values.abs().numpy()
    if not numpy.isfinite(magnitudes.max()):
        raise NonFinite("a value to be sent is not finite")
    threshold = numpy.partition(magnitudes, len(magnitudes) - kept)[len(magnitudes) - kept]
    chosen = magnitudes > threshold
    chosen[numpy.flatnonzero(magnitudes == threshold)[: kept - int(chosen.sum())]] = True
    return torch.from_numpy(numpy.flatnonzero(chosen))


def write(positions: torch.Tensor, num: int) -> bytes:
    """The bytes of ascending positions below `num`."""
    gaps = numpy.diff(positions.numpy(), prepend=-1) - 1
    low = _low_bits(num, len(gaps))
    ends = numpy.cumsum((gaps >> low) + 1)
    unary = numpy.zeros(int(ends[-1]), dtype=bool)
    unary[ends - 1] = True
    lows = (gaps[:, None] >> numpy.arange(low)) & 1
    first = numpy.packbits(unary, bitorder="little").tobytes()
    return _HEAD.pack(low, len(first)) + first + numpy.packbits(lows.astype(bool), bitorder="little").tobytes()


def read(data: memoryview, kept: int, num: int) -> tuple[torch.Tensor, int]:
    """`kept` ascending positions below `num`, and how many bytes they took; every part of the bytes is checked."""
    if len(data) < _HEAD.size:
        raise ProtocolError(f"positions take at least {_HEAD.size} bytes, found {len(data)}")
    low, first = _HEAD.unpack(data[: _HEAD.size])
    last = -(-kept * low // 8)
    end = _HEAD.size + first + last
    if low > _MOST_LOW or end > len(data):
        raise ProtocolError(f"positions claim {low} low bits and {first} bytes in unary, found {len(data)} bytes for all")
    ends = numpy.flatnonzero(_bits(data[_HEAD.size : _HEAD.size + first]))
    if len(ends) != kept:
        raise ProtocolError(f"expected {kept} positions, found {len(ends)}")
    lows = _bits(data[_HEAD.size + first : end])[: kept * low].reshape(kept, low)
    gaps = ((numpy.diff(ends, prepend=-1) - 1) << low) + (lows.astype(numpy.int64) << numpy.arange(low)).sum(1)
    positions = numpy.cumsum(gaps + 1) - 1
    if kept and positions[-1] >= num:
        raise ProtocolError(f"expected positions below {num}, found {positions[-1]}")
    return torch.from_numpy(positions), end


def _bits(data: memoryview) -> NDArray[numpy.uint8]:
    return numpy.unpackbits(numpy.frombuffer(data, dtype=numpy.uint8), bitorder="little")


def _low_bits(num: int, kept: int) -> int:
    """The best number for gaps of `num / kept` on average: the power of two next to their median."""
    return max(0, round(math.log2(max(1.0, num / kept * math.log(2)))))
