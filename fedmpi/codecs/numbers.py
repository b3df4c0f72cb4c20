"""How one value is written: whole, as half a float, or in 8, 4, 2 or 1 bits that share a scale with their block.

Decoding is a product of two exactly known float32 numbers, so it gives the same bits on every machine. The error of a value x in a
block whose largest magnitude is m, with `step` the distance of two neighbouring levels (m / 127, m / 7, m / 1):

    bf16              |x| * 2**-8      (2**-134 for denormals)
    fp16              |x| * 2**-11     (2**-25 below 2**-14); magnitudes from 65520 on are refused
    int8, int4, int2  step / 2 to the nearest level, below one step when rounded at random (whose mean is x)
    nf4               0.152 * m, half the widest gap of its levels
    sign              the larger of a and m - a, where a is the block's mean magnitude: the one level that loses least

with a few units in the last place of float32 for the scale. This module must never know where the values come from.
"""

from statistics import NormalDist

import numpy
import torch

from fedmpi.codecs import Number
from fedmpi.errors import NonFinite

SCALE_BYTES = 4
TOP = {"int8": 127, "int4": 7, "int2": 1}  # the largest level; the lowest is its negative
BITS = {"int8": 8, "int4": 4, "int2": 2, "nf4": 4, "sign": 1}
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def num_bytes(number: Number, num: int) -> int:
    """Exactly what `num` values take."""
    if number.name in BITS:
        blocks = -(-num // number.block)
        return blocks * SCALE_BYTES + -(-num * BITS[number.name] // 8)
    return num * (2 if number.name in _HALVES else 4)


def write(number: Number, values: torch.Tensor, seed: int) -> torch.Tensor:
    """The bytes of flat float32 values. `seed` decides where rounding is at random."""
    if number.name not in BITS:
        return _write_float(number, values)
    blocks = _in_blocks(values, number.block)
    most = blocks.abs().amax(1, keepdim=True)
    if not bool(most.amax().isfinite()):
        raise NonFinite("a value to be sent is not finite")
    if number.name == "sign":
        scales, levels = _mean_magnitudes(blocks, values.numel()), (blocks >= 0).to(torch.uint8)
    elif number.name == "nf4":
        scales, levels = most, _nf4_levels(blocks, most)
    else:
        scales, levels = most / TOP[number.name], _int_levels(number, blocks, most, seed)
    packed = _pack(levels.view(-1)[: values.numel()], BITS[number.name])
    return torch.cat([scales.view(-1).view(torch.uint8), packed])


def require(number: Number, values: torch.Tensor) -> None:
    """Raise a NonFinite where `write` may."""
    low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
    if not bool(torch.stack([low, high]).to(_HALVES.get(number.name, torch.float32)).isfinite().all()):
        raise NonFinite(f"a value to be sent is not finite in {number.name}")


def read(number: Number, data: torch.Tensor, num: int) -> torch.Tensor:
    """The float32 values in exactly `num_bytes` bytes. Any bytes are values; what they mean is checked where they are used."""
    if number.name not in BITS:
        return _aligned(data).view(_HALVES.get(number.name, torch.float32)).float()
    blocks = -(-num // number.block)
    scales = _aligned(data[: blocks * SCALE_BYTES]).view(torch.float32).view(-1, 1)
    levels = _in_blocks(_unpack(data[blocks * SCALE_BYTES :], BITS[number.name], num), number.block)
    values = _NF4[levels.int()] if number.name == "nf4" else _whole_numbers(levels, number).float()
    return values.mul_(scales).view(-1)[:num]


def _write_float(number: Number, values: torch.Tensor) -> torch.Tensor:
    written = values.to(_HALVES.get(number.name, torch.float32))
    if not bool(written.abs().amax().isfinite()):
        raise NonFinite(f"a value to be sent is not finite in {number.name}")
    return written.contiguous().view(torch.uint8)


def _in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of one block each, the last one filled up with zeros."""
    missing = -values.numel() % block
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, block)


def _mean_magnitudes(blocks: torch.Tensor, num: int) -> torch.Tensor:
    """Of each block; of the last one over what is in it."""
    sums = blocks.abs().sum(1, dtype=torch.float64)
    sums[:-1] /= blocks.shape[1]
    sums[-1] /= num - (len(blocks) - 1) * blocks.shape[1]
    return sums.float()


def _int_levels(number: Number, blocks: torch.Tensor, most: torch.Tensor, seed: int) -> torch.Tensor:
    """Whole numbers from 0; the middle stands for zero. A block too small for its scale to be a number is zero throughout."""
    top = TOP[number.name]
    scales = most / top
    per_step = torch.where(scales > torch.finfo(torch.float32).tiny, 1 / scales, 0.0)
    levels = blocks * per_step
    if number.stochastic:
        draws = numpy.random.Generator(numpy.random.SFC64(seed)).random(levels.numel(), dtype=numpy.float32)
        levels.add_(torch.from_numpy(draws).view_as(levels)).floor_()
    else:
        levels.round_()
    return levels.clamp_(-top, top).add_(top).to(torch.uint8)


def _whole_numbers(levels: torch.Tensor, number: Number) -> torch.Tensor:
    """Levels around zero."""
    if number.name == "sign":
        return levels.to(torch.int16).mul_(2).sub_(1)
    top = TOP[number.name]
    return levels.clamp_(max=2 * top).to(torch.int16).sub_(top)


def _quantiles_of_a_normal() -> torch.Tensor:
    """The 16 levels of NF4 (Dettmers et al., arXiv 2305.14314): quantiles of a normal distribution, 8 above zero and 7 below."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2  # half a level from the end, on either count
    quantile = NormalDist().inv_cdf
    above = [quantile(outermost + (0.5 - outermost) * place / 8) for place in range(8)]
    below = [-quantile(outermost + (0.5 - outermost) * place / 7) for place in range(7)]
    return torch.tensor(sorted([*above, *below, 0.0])) / above[0]


_NF4 = _quantiles_of_a_normal()


def _nf4_levels(blocks: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """The nearest of the 16. Fifteen comparisons of a whole chunk are faster than a search for each value."""
    shares = blocks / torch.where(most > 0, most, 1.0)
    levels = torch.zeros(blocks.shape, dtype=torch.uint8)
    for edge in (_NF4[1:] + _NF4[:-1]) / 2:
        levels.add_(shares > edge)
    return levels


def _pack(levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Several levels to a byte, the first in its lowest bits."""
    per_byte = 8 // bits
    if per_byte == 1:
        return levels
    columns = _in_blocks(levels, per_byte)
    packed = columns[:, 0].clone()
    for place in range(1, per_byte):
        packed |= columns[:, place] << (bits * place)
    return packed


def _unpack(data: torch.Tensor, bits: int, num: int) -> torch.Tensor:
    per_byte = 8 // bits
    if per_byte == 1:
        return data.clone()
    columns = torch.empty(data.numel(), per_byte, dtype=torch.uint8)
    for place in range(per_byte):
        columns[:, place] = (data >> (bits * place)) & ((1 << bits) - 1)
    return columns.view(-1)[:num]


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Bytes that may be viewed as numbers."""
    return data if data.data_ptr() % 4 == 0 and data.storage_offset() % 4 == 0 else data.clone()
