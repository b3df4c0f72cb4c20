"""A model as a speaker: batched answers, padded on their left, and the loss of texts. It must never know a task.

A sampled token is the largest of logits plus Gumbel noise, which is an exact draw; each prompt has a generator of its own.
So a prompt's answer depends on its key and the seed, not on its neighbours in a batch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fedmpi import models
from fedmpi.data.batching import collate
from fedmpi.data.prompts import IGNORED, Example, encode_prompts, num_supervised
from fedmpi.errors import ConfigError
from fedmpi.evaluation.decoding import LEAST_PROMPT, Decoding, Measure, cut_at
from fedmpi.evaluation.loss import inference
from fedmpi.models.logits import supervised_logits
from fedmpi.seeding import seed_for

UNKNOWN_CONTEXT = 2048  # where a model does not say how much it reads
TAIL = 8  # tokens of the prompt that an answer is decoded with: alone, its first space could be lost
LOOK_EVERY = 16  # tokens between two looks for stop strings
PLAIN: dict[str, Any] = {  # a checkpoint's own generation settings never decide
    **{"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
}


@dataclass
class ModelSpeaker:
    """A causal language model and its tokenizer. `seconds` is the time that was spent in the model."""

    model: Any
    tokenizer: Any
    batch_size: int = 16
    seconds: float = 0.0
    cut: int = 0  # prompts that lost their left end because they did not fit
    context: int = field(init=False)

    def __post_init__(self) -> None:
        known = getattr(self.model.config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
        self.context = int(known) - models.virtual_positions(self.model)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in self._ids(prompts)]

    def encode(self, prompt: str, continuation: str, name: str) -> Example:
        """An example in which the continuation alone is supervised; the two are encoded apart, as in training."""
        ids = self._ids([prompt])[0]
        more = self.tokenizer([continuation], add_special_tokens=False)["input_ids"][0]
        return Example(ids + more, [IGNORED] * len(ids) + more, name)

    def say(self, prompts: Sequence[str], decoding: Decoding, keys: Sequence[str], limits: Sequence[int] = ()) -> list[str]:
        """An answer to each prompt, up to its end token, a stop string or its limit. Prompts of like length share a batch."""
        encoded = [self._fitted(ids, decoding) for ids in self._ids(prompts)]
        tops = [min(decoding.max_new_tokens, limit) for limit in limits] or [decoding.max_new_tokens] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        answers = [""] * len(encoded)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = [encoded[index] for index in chosen]
            said = self._generate(batch, decoding, [keys[index] for index in chosen], max(tops[index] for index in chosen))
            for index, prompt, ids in zip(chosen, batch, said, strict=True):
                answers[index] = cut_at(self._text(prompt, ids[: tops[index]]), decoding.stop)
        return answers

    def measure(self, examples: Sequence[Example]) -> list[Measure]:
        """The loss of each example, summed over its supervised tokens in float64."""
        pad = self._pad()
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
        found: dict[int, Measure] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            with inference(self.model), self._clock():
                device = next(self.model.parameters()).device
                logits, targets = supervised_logits(self.model, collate([examples[index] for index in chosen], pad), device)
                losses = cross_entropy(logits.float(), targets, reduction="none").double().cpu()
                hits = (logits.argmax(-1) == targets).cpu()
            counts = [num_supervised(examples[index].labels) for index in chosen]
            parts = zip(chosen, torch.split(losses, counts), torch.split(hits, counts), strict=True)
            found |= {index: Measure(float(loss.sum()), len(loss), int(hit.sum())) for index, loss, hit in parts}
        return [found[index] for index in range(len(examples))]

    def _ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Prompt ids with one BOS, where the tokenizer has it: chat templates write their own."""
        found, bos = encode_prompts(prompts, self.tokenizer), self.tokenizer.bos_token_id
        return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in found]

    def _fitted(self, ids: list[int], decoding: Decoding) -> list[int]:
        room = self.context - decoding.max_new_tokens
        if room < LEAST_PROMPT:
            raise ConfigError(
                f"max_new_tokens {decoding.max_new_tokens} leaves {room} of the model's {self.context} tokens to the prompt: "
                f"give at most {self.context - LEAST_PROMPT}"
            )
        self.cut += len(ids) > room
        return ids[-room:]

    def _generate(self, prompts: Sequence[list[int]], decoding: Decoding, keys: Sequence[str], longest: int) -> list[list[int]]:
        """New tokens after each prompt, up to the end token."""
        pad, end, width = self._pad(), self.tokenizer.eos_token_id, max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        draws = [_Draw(decoding, keys)] if decoding.temperature else []
        with inference(self.model), self._clock():
            model, inputs = models.to_continue(self.model, ids, mask)
            start = width if "input_ids" in inputs else 0  # where new tokens begin in what comes back
            looks = [_Stopped(self.tokenizer, start, decoding.stop)] if decoding.stop else []
            full = model.generate(
                **inputs,
                max_new_tokens=longest,
                eos_token_id=end,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList(draws),
                stopping_criteria=StoppingCriteriaList(looks),
                **PLAIN,
            )
        return [row[: row.index(end)] if end in row else row for row in full[:, start:].tolist()]

    def _text(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        """What the answer adds to the prompt's text, white space included."""
        tail = list(prompt[-TAIL:])
        before, whole = self.tokenizer.batch_decode([tail, [*tail, *answer]], skip_special_tokens=True)
        if whole.startswith(before):
            return str(whole[len(before) :])
        return str(self.tokenizer.batch_decode([list(answer)], skip_special_tokens=True)[0])

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def open_speaker(
    config: models.Config, adapter: Path | None, device: str, batch_size: int, load: Callable[..., Any] = models.load_model
) -> ModelSpeaker:
    """The model, with the adapter of a PEFT folder on it where one is given."""
    tokenizer, model = models.load_tokenizer(config), load(config, device)
    return ModelSpeaker(model if adapter is None else models.adapted(model, adapter), tokenizer, batch_size)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Turns the greedy choice into a draw, each row from its own generator."""

    def __init__(self, decoding: Decoding, keys: Sequence[str]) -> None:
        self.decoding = decoding
        self.generators = [torch.Generator().manual_seed(seed_for(decoding.seed, "say", key)) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Temperature, top-k, top-p, noise."""
        scores = scores.float() / self.decoding.temperature
        if 0 < self.decoding.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.decoding.top_k).values[:, -1:], -torch.inf)
        if self.decoding.top_p < 1:
            ordered, places = scores.sort(descending=True)
            shares = ordered.softmax(-1)
            gone = shares.cumsum(-1) - shares >= self.decoding.top_p
            scores = scores.masked_fill(torch.zeros_like(gone).scatter(-1, places, gone), -torch.inf)
        size = scores.shape[-1]
        noise = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in self.generators])
        return scores - noise.clamp_min(1e-30).log().to(scores.device)


class _Stopped(StoppingCriteria):  # type: ignore[misc]
    """Ends rows that hold a stop string. It looks now and then only: what a row says beyond the string is cut off later."""

    def __init__(self, tokenizer: Any, width: int, stops: Sequence[str]) -> None:
        self.tokenizer, self.width, self.stops = tokenizer, width, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Which rows are done."""
        rows = input_ids[:, self.width :]
        if rows.shape[1] % LOOK_EVERY:
            return torch.zeros(len(rows), dtype=torch.bool, device=input_ids.device)
        texts = self.tokenizer.batch_decode(rows.tolist(), skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)
