"""Local training against transformers' Trainer with peft: the same model, LoRA, samples, batch and steps, without logging.

    python benchmarks/local_training.py [--shape tiny|1b|7b] [--steps 20] [--repeats 5] [--batch_size 8] [--precision fp32]
    python benchmarks/local_training.py --shape 7b --batch_size 8 --length 512 --precision bf16 --device cuda

Both run in this process and take turns; a time is that of Trainer.train() and of fit(), without making the model or the
Trainer. Prints one JSON line; `ratio` is the median time of fit() over that of Trainer.train(): below 1, fit() is faster.
`cpu_ratio` is the same of processor time, which a busy machine disturbs less. `mfu` is the operations that fit() counts over
what the GPU's data sheet promises for dense bf16, null where that is not known or the precision is another: give --peak_tflops
then. They are those of the model: its head counts for every token, though fit() computes it where something is to be predicted.
Peak memory is that of the GPU during the run, less the other one's model. 1b and 7b are a Llama's shapes with random weights in the
precision's own type, every sample of full length; tiny is in fp32, with lengths spread over the upper half.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping

import torch
import transformers

from fedmpi.data.batching import collate
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.models.library import peft
from fedmpi.training import Config, fit

PAD = 0
# vocabulary, hidden size, intermediate size, layers, heads, key-value heads
SHAPES = {
    "tiny": (2048, 128, 341, 12, 4, 4),
    "1b": (128256, 2048, 8192, 16, 32, 8),
    "7b": (32000, 4096, 11008, 32, 32, 32),
}
DENSE_BF16_TFLOPS = {  # the first whose words are all in the name
    **{"H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{"A100": 312, "L40S": 362, "L4": 121, "A10": 125},
}


def model_with_lora(arguments: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    vocab, hidden, intermediate, layers, heads, groups = SHAPES[arguments.shape]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=arguments.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=arguments.shape == "1b",
        pad_token_id=PAD,
    )
    whole = arguments.shape != "tiny" and arguments.precision == "bf16"
    with torch.device(arguments.device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if whole else torch.float32)
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(base, lora)  # which keeps the adapter in fp32


def samples(count: int, length: int, vocab: int, spread: bool = True) -> list[Example]:
    """Lengths spread over the upper half of `length`; the last third of each sample is supervised, as in instruction data."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        size = int(torch.randint(length // 2, length + 1, (1,), generator=generator)) if spread else length
        ids = torch.randint(3, vocab, (size,), generator=generator).tolist()
        made.append(Example(ids, [IGNORED] * (2 * size // 3) + ids[2 * size // 3 :], str(index)))
    return made


def ours(arguments: argparse.Namespace, data: list[Example], model: torch.nn.Module, flops: list[int]) -> Callable[[], None]:
    config = Config(steps=arguments.steps, batch_size=arguments.batch_size, precision=arguments.precision)

    def run() -> None:
        done = fit(model, data, config, seed=0, pad_id=PAD)
        assert done.steps == arguments.steps
        flops.append(done.flops)

    return run


def theirs(arguments: argparse.Namespace, data: list[Example], model: torch.nn.Module) -> Callable[[], None]:
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


def interleaved(runs: Mapping[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[tuple[float, float, int]]]:
    """Seconds, processor seconds and peak bytes of every run, after one that warms up; who is first changes from turn to turn."""
    taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    on_gpu = device == "cuda"
    for turn in range(repeats + 1):
        for name in sorted(runs, reverse=bool(turn % 2)):
            gc.collect()  # a Trainer is a knot of references that holds its optimiser's state
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started, worked = time.perf_counter(), time.process_time()
            runs[name]()
            if on_gpu:
                torch.cuda.synchronize()
            spent = time.perf_counter() - started, time.process_time() - worked
            if turn:
                taken[name].append((*spent, torch.cuda.max_memory_allocated() if on_gpu else 0))
    return taken


def peak_flops(arguments: argparse.Namespace) -> float | None:
    """Operations a second that the device could do at most, where somebody says so."""
    if arguments.peak_tflops or arguments.device != "cuda" or arguments.precision != "bf16":
        return arguments.peak_tflops and arguments.peak_tflops * 1e12
    return promised(torch.cuda.get_device_name())


def promised(name: str) -> float | None:
    """What the data sheet of a GPU of this name says, of a whole one."""
    words = set(name.replace("-", " ").split())
    known = (tflops * 1e12 for part, tflops in DENSE_BF16_TFLOPS.items() if words.issuperset(part.split()))
    return None if "MIG" in words else next(known, None)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=tuple(SHAPES))
    for name, default in {"steps": 20, "repeats": 5, "batch_size": 8, "length": 128, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--peak_tflops", type=float, help="of the device, dense, in the precision")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return arguments


def main() -> None:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]  # of two GPUs a Trainer would take both
    arguments = options()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    data = samples(arguments.steps * arguments.batch_size, arguments.length, SHAPES[arguments.shape][0], arguments.shape == "tiny")
    tokens = sum(len(example.input_ids) for example in data)
    models = {name: model_with_lora(arguments) for name in ("fedmpi", "trainer")}
    flops: list[int] = []
    runs = {"fedmpi": ours(arguments, data, models["fedmpi"], flops), "trainer": theirs(arguments, data, models["trainer"])}
    taken = interleaved(runs, arguments.repeats, arguments.device)
    seconds = {name: statistics.median(run[0] for run in values) for name, values in taken.items()}
    worked = {name: statistics.median(run[1] for run in values) for name, values in taken.items()}
    other = sum(p.nbytes for p in models["trainer"].parameters())
    peaks = {name: max(run[2] for run in values) - other for name, values in taken.items()}
    most = peak_flops(arguments)
    figures = {
        "benchmark": "local_training",
        "shape": arguments.shape,
        "ratio": round(seconds["fedmpi"] / seconds["trainer"], 3),
        "cpu_ratio": round(worked["fedmpi"] / worked["trainer"], 3),
        **{f"{name}_tokens_per_s": round(tokens / value, 1) for name, value in seconds.items()},
        **{f"{name}_mfu": round(flops[-1] / value / most, 4) if most else None for name, value in seconds.items()},
        **{f"{name}_peak_gib": round(peak / 2**30, 3) if peak > 0 else None for name, peak in peaks.items()},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, {_device(arguments.device)}",
        "command": f"python {shlex.join(sys.argv)}",
    }
    print(json.dumps(figures))


def _device(name: str) -> str:
    return torch.cuda.get_device_name() if name == "cuda" else name


if __name__ == "__main__":
    main()
