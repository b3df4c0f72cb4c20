"""Which chain a run is best served by: what each candidate costs here, and what it may lose, against what the links carry.

The cost of a chain is the time that a round waits for its exchange, reckoned as if nothing of it were hidden: that is its worst.
This module must never know links or rounds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedmpi.codecs import RAW, parse
from fedmpi.codecs.coder import Coder

SAMPLE = 1 << 18  # values: a chunk of a message
MARGIN = 0.98  # a chain that is not this much quicker than none is not worth its error


@dataclass(frozen=True)
class Candidate:
    """A chain, and the most that a value can lose in one message, as a share of the largest magnitude in its block."""

    chain: str
    bound: float


CANDIDATES = (
    Candidate(RAW, 0.0),
    Candidate("shuffle,zstd", 0.0),
    Candidate("bf16", 2**-8),
    Candidate("int8", 1 / 254),
    Candidate("delta,int8,ef", 1 / 254),  # the same share of a difference, which is smaller; and sent later
    Candidate("delta,int4,ef", 1 / 14),
    Candidate("delta,int4,ef,zstd", 1 / 14),
)


@dataclass(frozen=True)
class Cost:
    """Of one value in a chain, on a rank: seconds both ways, and bytes."""

    encode_s: float
    decode_s: float
    num_bytes: float


@dataclass(frozen=True)
class Way:
    """What moves a message one way: seconds before its first byte, and for each byte of all messages together."""

    latency_s: float
    byte_s: float
    copies: int  # messages of a round this way, which share the links

    def seconds(self, num: int, cost: Cost) -> float:
        """Until all messages of so many values are there."""
        return self.latency_s + num * self.copies * cost.num_bytes * self.byte_s


def within(budget: float) -> tuple[str, ...]:
    """The candidates whose bound the budget allows."""
    return tuple(one.chain for one in CANDIDATES if one.bound <= budget)


def measure(chains: Sequence[str], num: int = SAMPLE) -> dict[str, Cost]:
    """What the chains cost on this rank, on values that are hard to pack: normally distributed."""
    values = torch.randn(num, generator=torch.Generator().manual_seed(0))
    return {chain: _cost(Coder(parse(chain)), values) for chain in chains if chain != RAW} | {RAW: Cost(0.0, 0.0, 4.0)}


def _cost(coder: Coder, values: torch.Tensor) -> Cost:
    seconds = []
    for _ in range(3):  # the first one warms up
        began = time.perf_counter()
        data = coder.encode(values)
        encoded = time.perf_counter()
        coder.decode(data, len(values))
        seconds.append((encoded - began, time.perf_counter() - encoded))
    encode_s, decode_s = (min(each) / len(values) for each in zip(*seconds[1:], strict=True))
    return Cost(encode_s, decode_s, len(data) / len(values))


def slowest(costs: Sequence[Mapping[str, Cost]]) -> dict[str, Cost]:
    """A round waits for its slowest rank."""
    return {
        chain: replace(one, encode_s=max(c[chain].encode_s for c in costs), decode_s=max(c[chain].decode_s for c in costs))
        for chain, one in costs[0].items()
    }


def exposed(num: int, cost: Cost, down: Way, up: Way) -> float:
    """Seconds of a round that `num` values take: down, coded once and read everywhere; up, coded everywhere and read in turn."""
    there = num * (cost.encode_s + cost.decode_s) + down.seconds(num, cost)
    return there + num * (cost.encode_s + up.copies * cost.decode_s) + up.seconds(num, cost)


def best(num: int, costs: Mapping[str, Cost], down: Way, up: Way) -> tuple[str, dict[str, float]]:
    """The chain of the least exposed time, `raw` unless it is clearly beaten; and the seconds of all."""
    seconds = {chain: exposed(num, cost, down, up) for chain, cost in costs.items()}
    chosen = min(seconds, key=lambda chain: seconds[chain])
    return (chosen if seconds[chosen] < MARGIN * seconds[RAW] else RAW), seconds
