"""From a row to token ids: the one prompt of training and evaluation. It must never know a model, only a tokenizer."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedmpi.data import Config
from fedmpi.data.corpora import Row
from fedmpi.errors import ConfigError

IGNORED = -100  # the label that no loss counts
KEPT_PROMPT = 16  # tokens that a prompt keeps beside a response that fills the whole length


@dataclass(frozen=True)
class Template:
    """The text around an instruction, with and without an input."""

    with_input: str
    without_input: str


# Alpaca's published prompt (Stanford, 2023), kept word by word: adapters are comparable only under the same one.
TEMPLATES: Mapping[str, Template] = {
    "alpaca": Template(
        with_input=(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        ),
        without_input=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:\n"
        ),
    )
}


@dataclass(frozen=True)
class Example:
    """A tokenised row. Labels are the ids themselves on response and EOS, and -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]
    id: str


@dataclass(frozen=True)
class Counts:
    """Of the rows: cut for length, of these in the response, dropped unsupervised; tokens are those kept."""

    rows: int
    cut: int
    dropped: int
    tokens: int
    cut_responses: int = 0


def render(instruction: str, input: str | None, template: str = "alpaca") -> str:
    """The prompt up to where the response begins. None and the empty text both mean: no input."""
    chosen = _template(template)
    if input:
        return chosen.with_input.format(instruction=instruction, input=input)
    return chosen.without_input.format(instruction=instruction)


def template_hash(name: str) -> str:
    """Names the exact text of a template in a run record."""
    return hashlib.sha256(json.dumps(asdict(_template(name)), sort_keys=True).encode()).hexdigest()[:16]


def encode_prompts(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Prompt ids, BOS first where the tokenizer has one; nothing else that a tokenizer might add by itself."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [bos + ids for ids in _encode(prompts, tokenizer)]


def tokenize(rows: Sequence[Row], tokenizer: Any, config: Config) -> tuple[list[Example], Counts]:
    """Token ids and labels of each row. Prompt and response are encoded apart, so that the boundary is exact."""
    prompts = encode_prompts([render(row.instruction, row.input, config.template) for row in rows], tokenizer)
    responses = [[*ids, tokenizer.eos_token_id] for ids in _encode([row.output for row in rows], tokenizer)]
    whole = list(zip(prompts, responses, strict=True))
    fitted = [_fit(prompt, response, config.max_length) for prompt, response in whole]
    examples = [_example(prompt, response, row.id) for row, (prompt, response) in zip(rows, fitted, strict=True)]
    kept = [example for example in examples if num_supervised(example.labels)]
    cut = [len(before[1]) > len(after[1]) for before, after in zip(whole, fitted, strict=True) if before != after]
    tokens = sum(len(example.input_ids) for example in kept)
    return kept, Counts(len(rows), len(cut), len(examples) - len(kept), tokens, sum(cut))


def num_supervised(labels: Sequence[int]) -> int:
    """Labels that count after the causal shift: nothing predicts the first token."""
    return sum(label != IGNORED for label in labels[1:])


def _template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"data.template is {name!r}: allowed are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    bare = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **bare)["input_ids"]  # type: ignore[no-any-return]


def _fit(prompt: list[int], response: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """A long prompt loses its left; a response that needs more than the rest loses its right end, EOS included."""
    room = max(max_length - len(response), min(KEPT_PROMPT, len(prompt)))
    prompt = prompt[-room:] if len(prompt) > room else prompt
    return prompt, response[: max_length - len(prompt)]


def _example(prompt: list[int], response: list[int], row_id: str) -> Example:
    return Example(prompt + response, [IGNORED] * len(prompt) + response, row_id)
