"""From a row to token ids: the one prompt of training and evaluation. It must never know a model, only a tokenizer."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedmpi.data import Config
from fedmpi.data.corpora import Row
from fedmpi.errors import ConfigError, DataError

IGNORED = -100  # the label that no loss counts
KEPT_PROMPT = 16  # tokens that a prompt keeps beside a response that fills the whole length


@dataclass(frozen=True)
class Template:
    """The text around an instruction, with and without an input, up to where the response begins."""

    with_input: str
    without_input: str
    space: str = ""  # what stands between the prompt and a response and is learnt with the response


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
    ),
    # The bare form of question-answering papers. The blank belongs to the response: a prompt that ends in one is cut otherwise.
    "qa": Template(
        with_input="{input}\n\nQ: {instruction}\nA:",
        without_input="Q: {instruction}\nA:",
        space=" ",
    ),
}
CHAT = "chat"  # the tokenizer's own template
PLACE = re.compile(r"\{(instruction|input)\}")
RESPONSE, FORMS = "{response}", "\n---\n"


@dataclass(frozen=True)
class Example:
    """A tokenised row. Labels are the ids themselves on response and EOS, and -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]
    id: str


@dataclass(frozen=True)
class Pack(Example):
    """Several samples in one row, one after the other; the model must keep them apart."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Of the rows: cut for length, of these in the response, dropped unsupervised; tokens are those kept."""

    rows: int
    cut: int
    dropped: int
    tokens: int
    cut_responses: int = 0


def render(instruction: str, input: str | None, template: str = "alpaca", tokenizer: Any = None) -> str:
    """The prompt up to where the response begins. None and the empty text both mean: no input.

    `chat` is the tokenizer's own template and needs it; the others do not.
    """
    if template == CHAT:
        return _chat(f"{instruction}\n\n{input}" if input else instruction, tokenizer)
    chosen = _template(template)
    text = chosen.with_input if input else chosen.without_input
    if input and "{input}" not in text:
        raise DataError(f"data.template {template} has no place {{input}}, but a row has an input: {input[:40]!r}")
    values = {"instruction": instruction, "input": input or ""}
    return PLACE.sub(lambda place: values[place[1]], text)


def template_hash(name: str, tokenizer: Any = None) -> str | None:
    """Names the exact text of a template in a run record. Only a tokenizer knows what `chat` is; without it, None."""
    if name == CHAT:
        return None if tokenizer is None else _short_hash(_chat_template(tokenizer))
    return _short_hash(json.dumps(asdict(_template(name)), sort_keys=True))


def encode_prompts(prompts: Sequence[str], tokenizer: Any, template: str = "alpaca") -> list[list[int]]:
    """Prompt ids, BOS first where the tokenizer has one; nothing else that a tokenizer might add by itself.

    A chat template writes its own BOS.
    """
    bos = [] if tokenizer.bos_token_id is None or template == CHAT else [tokenizer.bos_token_id]
    return [bos + ids for ids in _encode(prompts, tokenizer)]


def prompt_ids(rows: Sequence[Row], tokenizer: Any, template: str) -> list[list[int]]:
    """The prompts of rows as ids: what training masks and evaluation gives to a model."""
    texts = [render(row.instruction, row.input, template, tokenizer) for row in rows]
    return encode_prompts(texts, tokenizer, template)


def tokenize(rows: Sequence[Row], tokenizer: Any, config: Config) -> tuple[list[Example], Counts]:
    """Token ids and labels of each row. Prompt and response are encoded apart, so that the boundary is exact."""
    prompts = prompt_ids(rows, tokenizer, config.template)
    space = "" if config.template == CHAT else _template(config.template).space
    responses = [[*ids, tokenizer.eos_token_id] for ids in _encode([space + row.output for row in rows], tokenizer)]
    whole = list(zip(prompts, responses, strict=True))
    fitted = [_fit(prompt, response, config.max_length) for prompt, response in whole]
    examples = [_example(prompt, response, row.id) for row, (prompt, response) in zip(rows, fitted, strict=True)]
    kept = [example for example in examples if num_supervised(example.labels)]
    cut = [len(before[1]) > len(after[1]) for before, after in zip(whole, fitted, strict=True) if before != after]
    tokens = sum(len(example.input_ids) for example in kept)
    return kept, Counts(len(rows), len(cut), len(examples) - len(kept), tokens, sum(cut))


def num_supervised(labels: Sequence[int]) -> int:
    """Labels that count after the causal shift: nothing predicts the first token."""
    rest = labels[1:]
    return len(rest) - rest.count(IGNORED)


def _template(name: str) -> Template:
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        allowed = ", ".join([*TEMPLATES, CHAT])
        raise ConfigError(
            f"data.template is {name!r}: allowed are {allowed}, or a file with a template (there is none of this name)"
        )
    return parse_template(path)


@lru_cache(maxsize=8)
def parse_template(path: Path) -> Template:
    """A user's template: text with {instruction}, {input} and, at its end, {response}.

    A line `---` parts two forms, the first for rows with an input, the second for rows without.
    """
    try:
        forms = path.read_text(encoding="utf-8").replace("\r\n", "\n").split(FORMS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template {path} cannot be read: {error}") from None
    if len(forms) > 2:
        raise ConfigError(
            f"data.template {path} has {len(forms)} forms between lines of ---: one, or two (with and without an input)"
        )
    prompts = [_before_response(form, path) for form in forms]
    if len({space for _, space in prompts}) > 1:
        raise ConfigError(f"data.template {path}: before {RESPONSE} one form has a blank and the other none: give both the same")
    return Template(prompts[0][0], prompts[-1][0], prompts[0][1])


def _before_response(form: str, path: Path) -> tuple[str, str]:
    """The prompt and the blanks between it and the response."""
    prompt, response, rest = form.partition(RESPONSE)
    if not response:
        raise ConfigError(f"data.template {path} has no place {RESPONSE}: put it where the answer begins, at the end")
    if rest.strip():
        raise ConfigError(
            f"data.template {path} goes on after {RESPONSE} with {rest.strip()[:20]!r}: end it there; EOS comes by itself"
        )
    if "{instruction}" not in prompt:
        raise ConfigError(f"data.template {path} has no place {{instruction}} before {RESPONSE}")
    return prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :]


def _chat_template(tokenizer: Any) -> str:
    if tokenizer is None:
        raise ConfigError(
            "data.template is chat, which only a model's tokenizer can write, and none is at hand here: give alpaca or qa"
        )
    found = getattr(tokenizer, "chat_template", None)
    if not isinstance(found, str):
        raise ConfigError("data.template is chat, but this model's tokenizer has no chat template: give alpaca, qa or a file")
    return found


def _chat(message: str, tokenizer: Any) -> str:
    _chat_template(tokenizer)
    said = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
