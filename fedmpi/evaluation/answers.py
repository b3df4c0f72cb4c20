"""Exact match: greedy answers to instructions, right when they equal the response but for white space around it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedmpi.data.prompts import encode_prompts, render
from fedmpi.evaluation.loss import inference


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
    rows: Sequence[Any],
    template: str = "alpaca",
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> Score:
    """Answer every row greedily and compare. Prompts of like length stand in one batch, padded on their left."""
    prompts = encode_prompts([render(row.instruction, row.input, template) for row in rows], tokenizer)
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    outputs = [""] * len(rows)
    with inference(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            answers = _answers(model, tokenizer, [prompts[index] for index in chosen], max_new_tokens)
            for index, text in zip(chosen, answers, strict=True):
                outputs[index] = text
    return _score(rows, outputs)


def _answers(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """What the model says after each prompt, up to its end token, stripped."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    full = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    answers = [_until(answer, tokenizer.eos_token_id) for answer in full[:, width:].tolist()]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _score(rows: Sequence[Any], outputs: Sequence[str]) -> Score:
    hits: dict[str, list[bool]] = defaultdict(list)
    for row, output in zip(rows, outputs, strict=True):
        hits[row.category].append(output == row.output.strip())
    by_category = {name: (sum(right) / len(right), len(right)) for name, right in sorted(hits.items())}
    num_right = sum(map(sum, hits.values()))
    return Score(num_right / max(1, len(rows)), len(rows), by_category, tuple(outputs))
