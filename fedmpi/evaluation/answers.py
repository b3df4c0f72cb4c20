"""Exact match: greedy answers to instructions, right when they equal the response but for white space around it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedmpi.data.corpora import Row
from fedmpi.data.prompts import encode_prompts, render
from fedmpi.evaluation.loss import inference

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
    """Answer every row greedily and compare. Prompts of like length stand in one batch, padded on their left.

    An answer is not followed far beyond the length of its row's response, where it could no longer become right.
    """
    prompts = encode_prompts([render(row.instruction, row.input, template) for row in rows], tokenizer)
    limits = [min(max_new_tokens, len(row.output.encode()) + SLACK) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    outputs = [""] * len(rows)
    with inference(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, text in zip(chosen, _answers(model, tokenizer, prompts, limits, chosen), strict=True):
                outputs[index] = text
    return _score(rows, outputs)


def _answers(
    model: Any, tokenizer: Any, all_prompts: Sequence[Sequence[int]], limits: Sequence[int], chosen: Sequence[int]
) -> list[str]:
    """What the model says after each chosen prompt, up to its end token or the prompt's limit, stripped."""
    prompts = [all_prompts[index] for index in chosen]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    full = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max(limits[index] for index in chosen),
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    said = zip(full[:, width:].tolist(), (limits[index] for index in chosen), strict=True)
    answers = [_until(answer[:limit], tokenizer.eos_token_id) for answer, limit in said]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _score(rows: Sequence[Row], outputs: Sequence[str]) -> Score:
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, output in zip(rows, outputs, strict=True):
        hits[row.category].append(output == row.output.strip())
    by_category = {name: (sum(right) / len(right), len(right)) for name, right in sorted(hits.items())}
    num_right = sum(map(sum, hits.values()))
    return Score(num_right / max(1, len(rows)), len(rows), by_category, tuple(outputs))
