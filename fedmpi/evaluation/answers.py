"""Exact match: greedy answers to instructions, right when they equal the response but for white space around it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmpi.data.corpora import Row
from fedmpi.data.prompts import render
from fedmpi.evaluation.decoding import Decoding
from fedmpi.evaluation.speaker import ModelSpeaker

SLACK = 8  # a token is at least a byte of the response, but for white space around it and the end token


@dataclass(frozen=True)
class Score:
    """`exact` is the share of right answers among `num` rows; by_category: (share, rows); outputs follow the rows."""

    exact: float
    num: int
    by_category: Mapping[str, tuple[float, int]]
    outputs: tuple[str, ...]


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    template: str = "alpaca",
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Score:
    """Answer every row greedily and compare.

    An answer is not followed far beyond the length of its row's response, where it could no longer become right.
    """
    prompts = [render(row.instruction, row.input, template, tokenizer) for row in rows]
    limits = [len(row.output.encode()) + SLACK for row in rows]
    speaker = ModelSpeaker(model, tokenizer, batch_size)
    outputs = speaker.say(prompts, Decoding(max_new_tokens), [row.id for row in rows], limits)
    return _score(rows, [text.strip() for text in outputs])


def _score(rows: Sequence[Row], outputs: Sequence[str]) -> Score:
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, output in zip(rows, outputs, strict=True):
        hits[row.category].append(output == row.output.strip())
    by_category = {name: (sum(right) / len(right), len(right)) for name, right in sorted(hits.items())}
    num_right = sum(map(sum, hits.values()))
    return Score(num_right / max(1, len(rows)), len(rows), by_category, tuple(outputs))
