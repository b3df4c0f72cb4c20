"""Local training against transformers' Trainer with peft: the same model, LoRA, samples, batch and steps, without logging.

    python benchmarks/local_training.py [--steps 20] [--repeats 5] [--batch_size 8] [--layers 12] [--hidden 128] [--vocab 2048]

Both run in this process and take turns; a time is that of Trainer.train() and of fit(), without making the model or the
Trainer. Prints one JSON line; `ratio` is the median time of fit() over that of Trainer.train(): below 1, fit() is faster.
`cpu_ratio` is the same of processor time, which a busy machine disturbs less.
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import peft
import torch
import transformers

from fedmpi.data.batching import collate
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.training import Config, fit

PAD = 0


def model_with_lora(arguments: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 32),
        pad_token_id=PAD,
    )
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).to(arguments.device)


def samples(count: int, length: int, vocab: int) -> list[Example]:
    """Lengths spread over the upper half of `length`; the last third of each sample is supervised, as in instruction data."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        size = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        ids = torch.randint(3, vocab, (size,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * (2 * size // 3) + ids[2 * size // 3 :], str(index)))
    return made


def ours(arguments: argparse.Namespace, data: list[Example]) -> Callable[[], None]:
    model = model_with_lora(arguments)
    config = Config(steps=arguments.steps, batch_size=arguments.batch_size, precision=arguments.precision)

    def run() -> None:
        assert fit(model, data, config, seed=0, pad_id=PAD).steps == arguments.steps

    return run


def theirs(arguments: argparse.Namespace, data: list[Example]) -> Callable[[], None]:
    model = model_with_lora(arguments)
    settings = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="local_training_"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        use_cpu=arguments.device == "cpu",
        bf16=arguments.precision == "bf16",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def padded(rows: list[Example]) -> dict[str, torch.Tensor]:
        batch = collate(rows, PAD)
        return {key: getattr(batch, key) for key in ("input_ids", "attention_mask", "labels")}

    trainers = [
        transformers.Trainer(model, settings, train_dataset=data, data_collator=padded) for _ in range(arguments.repeats + 1)
    ]

    def run() -> None:
        with contextlib.redirect_stdout(sys.stderr):  # it prints its metrics whatever its settings
            assert trainers.pop().train().global_step == arguments.steps

    return run


def interleaved(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of every run, after one that warms up; who is first changes from turn to turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in sorted(runs, reverse=bool(turn % 2)):
            started, worked = time.perf_counter(), time.process_time()
            runs[name]()
            if turn:
                times[name].append((time.perf_counter() - started, time.process_time() - worked))
    return times


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 20, "repeats": 5, "batch_size": 8, "layers": 12, "hidden": 128, "vocab": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    return parser.parse_args()


def main() -> None:
    arguments = options()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    data = samples(arguments.steps * arguments.batch_size, arguments.length, arguments.vocab)
    runs = {"fedmpi": ours(arguments, data), "trainer": theirs(arguments, data)}
    times = interleaved(runs, arguments.repeats)
    medians = {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}
    worked = {name: statistics.median(cpu for _, cpu in values) for name, values in times.items()}
    figures = {
        "benchmark": "local_training",
        "ratio": round(medians["fedmpi"] / medians["trainer"], 3),
        "cpu_ratio": round(worked["fedmpi"] / worked["trainer"], 3),
        "fedmpi_steps_per_s": round(arguments.steps / medians["fedmpi"], 2),
        "trainer_steps_per_s": round(arguments.steps / medians["trainer"], 2),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, {arguments.device}",
        "command": f"python {shlex.join(sys.argv)}",
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
