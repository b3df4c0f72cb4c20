"""Where the time of a GSM8K evaluation goes, and what batching brings.

    python benchmarks/evaluation.py [--model builtin:tiny] [--data TEST.JSONL --shots SHOTS.TXT] [--rows 32] [--batch 16]

It prints one JSON line. `share_in_generate` is the time inside the model's generation (its own bookkeeping and our look for stop
strings included) of all time from the first question to the written result; `share_in_forward` counts forward passes alone.
Answers of one row at a time and of a batch alternate; they must be equal. Answers are as long as the task's own: up to 256 tokens.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmpi import data, models
from fedmpi.data.corpora import Row
from fedmpi.evaluation import gsm8k
from fedmpi.evaluation.decoding import Decoding
from fedmpi.evaluation.speaker import ModelSpeaker
from fedmpi.result import Result


@dataclass
class Forward:
    """Seconds in forward passes of a model."""

    seconds: float = 0.0
    began: float = 0.0

    def watch(self, model: Any) -> None:
        """From now on."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.began


def questions(asked: argparse.Namespace) -> list[Row]:
    """The real test file where one is given, else sums in its form."""
    if asked.data:
        return data.load(data.Config(name="gsm8k", path=asked.data), 0).train[: asked.rows]
    sums = [(n, n * 7 % 90) for n in range(1, asked.rows + 1)]
    texts = [f"Ann has {a} apples and buys {b} more. How many apples does she have now?" for a, b in sums]
    return [Row(text, "", f"{a} + {b} = {a + b}\n#### {a + b}", "", f"q{a}") for text, (a, b) in zip(texts, sums, strict=True)]


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """The shares of one evaluation, and the ratio of the two ways to answer."""
    config = models.Config(asked.model)
    model, tokenizer = models.load_model(config), models.load_tokenizer(config)
    forward = Forward()
    forward.watch(model)
    task = gsm8k.build(questions(asked), asked.shots, None, "alpaca", Decoding(max_new_tokens=asked.tokens))
    speaker = ModelSpeaker(model, tokenizer, asked.batch)
    task.ask(speaker, range(min(asked.batch, len(task.rows))))  # warm-up
    speaker.seconds, forward.seconds = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        Result(Path(folder), "gsm8k", {}, task).make(speaker, 4 * asked.batch)
        whole = time.perf_counter() - began
    shares = {"share_in_generate": speaker.seconds / whole, "share_in_forward": forward.seconds / whole, "gsm8k_s": whole}
    return {**shares, **batching(asked, task, model, tokenizer)}


def batching(asked: argparse.Namespace, task: gsm8k.Gsm8k, model: Any, tokenizer: Any) -> dict[str, Any]:
    """One at a time and batched, in turns."""
    rows = task.rows
    prompts, keys = [task.prompt(row, 0) for row in rows], [row.id for row in rows]
    seconds: dict[int, list[float]] = {1: [], asked.batch: []}
    answers: dict[int, list[str]] = {}
    for _ in range(asked.repeat):
        for size, spent in seconds.items():
            began = time.perf_counter()
            answers[size] = ModelSpeaker(model, tokenizer, size).say(prompts, Decoding(max_new_tokens=asked.tokens), keys)
            spent.append(time.perf_counter() - began)
    one, batched = (statistics.median(spent) for spent in seconds.values())
    same = sum(a == b for a, b in zip(answers[1], answers[asked.batch], strict=True))
    return {"one_at_a_time_s": one, "batched_s": batched, "batching_ratio": one / batched, "equal_answers": f"{same}/{len(rows)}"}


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--data")
    parser.add_argument("--shots")
    for name, default in {"rows": 32, "batch": 16, "tokens": gsm8k.DECODING.max_new_tokens, "repeat": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    about = {"model": asked.model, "rows": asked.rows, "batch": asked.batch, "tokens": asked.tokens, "threads": asked.threads}
    print(json.dumps({"benchmark": "evaluation", **about, **measure(asked)}))


if __name__ == "__main__":
    main()
