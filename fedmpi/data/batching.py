"""Batches: examples in a seeded order, padded to the longest of each. It must never know where examples come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy
import torch

from fedmpi.data.prompts import IGNORED, Example, Pack, num_supervised
from fedmpi.errors import DataError
from fedmpi.seeding import seed_for

POOL = 50  # batches from whose examples groups of like length are made


@dataclass(frozen=True)
class Batch:
    """Right-padded tensors (rows, longest). The mask comes from lengths: a pad id may also be a real token."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    ids: tuple[str, ...]
    num_supervised: int  # labels that count after the causal shift
    num_tokens: int  # without padding
    num_examples: int
    position_ids: torch.Tensor | None = None  # of packed rows: they begin anew at each sample

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        rows: list[int] = self.attention_mask.sum(1).tolist()
        if self.position_ids is None:
            return rows
        places = (row[:num].tolist() for row, num in zip(self.position_ids, rows, strict=True))
        ends = (here + 1 for row in places for here, following in zip(row, [*row[1:], 0], strict=True) if not following)
        return list(ends)


class ByLength(list[Example]):
    """Examples that batches draw in groups of like length."""


def pack(examples: Sequence[Example], max_length: int) -> list[Pack]:
    """The examples in few rows of at most `max_length` tokens: the longest first, each where it leaves the least room.

    The first token of a sample follows on nothing, so nothing is to predict it.
    """
    rows: list[list[Example]] = []
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by the tokens that they have room for
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        left = next((left for left in range(size, max_length) if with_room[left]), max_length)
        place = with_room[left].pop() if with_room[left] else len(rows)
        if place == len(rows):
            rows.append([])
        rows[place].append(example)
        with_room[left - size].append(place)
    return [_packed(row) for row in rows]


def _packed(row: Sequence[Example]) -> Pack:
    ids = [token for example in row for token in example.input_ids]
    labels = [label for example in row for label in [IGNORED, *example.labels[1:]]]
    return Pack(ids, labels, ", ".join(example.id for example in row), tuple(len(example.input_ids) for example in row))


def batches(examples: Sequence[Example], batch_size: int, seed: int, pad_id: int) -> Iterator[Batch]:
    """An endless stream: each epoch is a permutation of its own drawn from the seed; its last short batch is kept."""
    if not examples:
        raise DataError("there is no example to train on: every row was dropped, or there were none")
    return _stream(examples, batch_size, seed, pad_id)


def _stream(examples: Sequence[Example], batch_size: int, seed: int, pad_id: int) -> Iterator[Batch]:
    for epoch in count():
        rng = numpy.random.default_rng(seed_for(seed, "epoch", epoch))
        order = rng.permutation(len(examples)).tolist()
        groups = _grouped(examples, order, batch_size, rng) if isinstance(examples, ByLength) else _cut(order, batch_size)
        for group in groups:
            yield collate([examples[i] for i in group], pad_id)


def _grouped(examples: Sequence[Example], order: list[int], batch_size: int, rng: numpy.random.Generator) -> list[list[int]]:
    """The permutation in pools, each sorted by length and cut into batches; then the batches in a random order.

    Pools keep it random which examples meet; an epoch has as many batches as without groups.
    """
    pools = _cut(order, batch_size * POOL)
    cut = [group for pool in pools for group in _cut(sorted(pool, key=lambda i: -len(examples[i].input_ids)), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch of these examples, in this order."""
    lengths = [len(example.input_ids) for example in examples]
    longest = max(lengths)
    packed = [example for example in examples if isinstance(example, Pack)]
    return Batch(
        input_ids=_pad([example.input_ids for example in examples], longest, pad_id),
        attention_mask=_pad([[1] * length for length in lengths], longest, 0),
        labels=_pad([example.labels for example in examples], longest, IGNORED),
        ids=tuple(example.id for example in examples),
        num_supervised=sum(num_supervised(example.labels) for example in examples),
        num_tokens=sum(lengths),
        num_examples=len(examples) + sum(len(row.lengths) - 1 for row in packed),
        position_ids=_pad([_positions(row.lengths) for row in packed], longest, 0) if packed else None,
    )


def _positions(lengths: Sequence[int]) -> list[int]:
    return [place for length in lengths for place in range(length)]


def _pad(rows: Sequence[list[int]], longest: int, filler: int) -> torch.Tensor:
    padded = [row + [filler] * (longest - len(row)) for row in rows]
    return torch.from_numpy(numpy.array(padded, dtype=numpy.int64))  # torch reads lists half as fast
