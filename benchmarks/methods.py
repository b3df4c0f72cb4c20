"""Every PEFT method on the same federated task: loss, size of what is trained, bytes, memory and time.

    python benchmarks/methods.py [--shared ../shared/data] [--work runs/methods] [--rows 600] [--rounds 5] [--steps 4] [--turns 9]

Dolly by its eight categories with a small real model. Each method gets the same search of the learning rate (seed 0, on a
validation split that the last figures do not see), then three seeds on the test split; where the highest rate was best, higher
ones are tried. Each run is a folder of `python -m fedmpi.run` in WORK, made by a process of its own, so that its memory can be
told. What RESULTS has of the same settings is not made again. Milliseconds of a step are measured apart, at the end: the methods
take turns in one process. Writes RESULTS and prints a table.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scenarios import SEEDS, prepare, score, spread

from fedmpi import aggregation, data, evaluation, models, report, training
from fedmpi.data import Example
from fedmpi.sessions.session import Session
from fedmpi.settings import recipe

RESULTS = Path(__file__).parent / "results" / "methods.json"
RATES = (0.003, 0.01, 0.03, 0.1)
HIGHER = {"prefix, 20 tokens": (0.3, 1.0)}
TEXT = "Assume you can understand and answer questions."  # FS-LLM's for Dolly
METHODS: Mapping[str, Sequence[str]] = {
    "LoRA r 8, query and value": (),
    "LoRA r 8, all linear": ("--peft.target_modules", "all-linear"),
    "rsLoRA r 8, all linear": ("--peft.target_modules", "all-linear", "--peft.rslora", "true"),
    "DoRA r 8, query and value": ("--peft.dora", "true"),
    "prefix, 20 tokens": ("--peft.method", "prefix"),
    "P-tuning MLP, 20 tokens": ("--peft.method", "ptuning"),
    "P-tuning LSTM, 20 tokens": ("--peft.method", "ptuning", "--peft.encoder", "lstm"),
    "prompt, 20 tokens": ("--peft.method", "prompt"),
    "prompt from a text, 20 tokens": ("--peft.method", "prompt", "--peft.init_text", TEXT),
    "none: the whole model": ("--peft.method", "none"),
}
CLIENTS = 8


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the figures of the README."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shared", type=Path, default=Path("../shared/data"))
    made.add_argument("--work", type=Path, default=Path("runs/methods"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--model", default="stories260K")
    made.add_argument("--turns", type=int, default=9, help="of each method, for the time of a step")
    for name, default in {"rows": 600, "test": 100, "rounds": 5, "steps": 4, "batch": 2, "length": 128}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    return made


def command(asked: argparse.Namespace, name: str, rate: float, seed: int, part: str) -> list[str]:
    """The arguments of one run."""
    word = "".join(letter if letter.isalnum() else "-" for letter in name)
    return [
        *("--model.path", str(asked.shared / "models" / asked.model), "--seed", str(seed)),
        *("--data.name", "json", "--data.path", str(asked.work / "dolly" / part), "--data.splitter", "meta"),
        *("--data.max_length", str(asked.length), "--clients", str(CLIENTS), *METHODS[name]),
        *("--rounds", str(asked.rounds), "--eval_every", "0", "--checkpoint_every", str(asked.rounds)),
        *("--train.steps", str(asked.steps), "--train.batch_size", str(asked.batch), "--train.lr", str(rate)),
        *("--run_dir", str(asked.work / "dolly" / f"{part}-{word}-lr{rate}-seed{seed}")),
    ]


def measured(arguments: Sequence[str]) -> dict[str, float]:
    """The scores of a run, and the memory that it took beyond what was loaded before it."""
    told = Path(arguments[-1]) / "peak.json"
    if not told.exists():
        child = multiprocessing.get_context("fork").Process(target=alone, args=(arguments, told))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"{arguments[-1]} ended with exit code {child.exitcode}")
    return json.loads(told.read_text())  # type: ignore[no-any-return]


def alone(arguments: Sequence[str], told: Path) -> None:
    """In a child: run, and write down what it came to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = score(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    told.write_text(json.dumps({**scores, "peak_mb": peak * 1024 / 1e6}))


def load_everything() -> None:
    """What every run imports is there before the first child is measured."""
    assert Session
    model = models.add_adapter(models.load_model(models.Config()), models.PeftConfig(), 0)
    evaluation.heldout_loss(model, [Example([1, 2], [1, 2], "row")], 1, 0)
    assert training.fit and aggregation.exact_mean and report.write


def compare(asked: argparse.Namespace, name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Search and three seeds of one method, as far as they are not known."""
    searched = {float(rate): loss for rate, loss in known.get("searched", {}).items()}
    for rate in (*RATES, *HIGHER.get(name, ())):
        if rate not in searched:
            searched[rate] = measured(command(asked, name, rate, 0, "search"))["loss"]
    rate = min(searched, key=lambda one: searched[one])
    if rate == known.get("lr"):
        return {**known, "searched": searched}
    commands = [command(asked, name, rate, seed, "final") for seed in SEEDS]
    runs = [measured(arguments) for arguments in commands]
    folder = Path(commands[0][-1])
    summary = json.loads((folder / "summary.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "lr": rate,
        "searched": searched,
        "losses": [one["loss"] for one in runs],
        "base_loss": summary["base"]["eval_loss"],
        "up_bytes": last["up_bytes"] // CLIENTS,
        "down_bytes": last["down_bytes"] // CLIENTS,
        "trainable_share": summary["trainable_share"],
        "peak_mb": statistics.median(one["peak_mb"] for one in runs),
    }


def turn(asked: argparse.Namespace, name: str) -> Callable[[], object]:
    """One client's turn with a method, as often as it is called."""
    wanted, _ = recipe.read(command(asked, name, RATES[0], 0, "final"), "methods.py", "")
    tokenizer = models.load_tokenizer(wanted.model)
    model = models.add_adapter(models.load_model(wanted.model), wanted.peft, 0, tokenizer)
    rows = data.federate(wanted.data, wanted.clients, 0).clients[0].train
    examples, _ = data.tokenize(rows, tokenizer, wanted.data)
    return partial(training.fit, model, examples, wanted.train, seed=0, pad_id=0)


def step_times(asked: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each method, the median of its turns; the first of them warms up."""
    turns = {name: turn(asked, name) for name in METHODS}
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(asked.turns + 1):
        for name, take in turns.items():
            began = time.perf_counter()
            take()
            taken[name].append((time.perf_counter() - began) / asked.steps)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each method."""
    lines = ["| method | lr | held-out loss | trained | bytes up, down per client and round | peak, MB | ms per step |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, one in found.items():
        trained = f"{one['up_bytes'] // 4:,} ({one['trainable_share']:.1%})"
        sent = f"{one['up_bytes']:,}, {one['down_bytes']:,}"
        loss, times = spread(one["losses"]), f"{one['peak_mb']:.0f} | {1000 * one['step_s']:.1f}"
        lines.append(f"| {name} | {one['lr']} | {loss} | {trained} | {sent} | {times} |")
    return "\n".join(lines)


def main() -> None:
    """All methods, one after the other; the results file is written after each."""
    asked = parser().parse_args()
    prepare(asked, "dolly")
    load_everything()
    about = {key: value for key, value in vars(asked).items() if key not in ("shared", "work", "results", "turns")}
    results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    found = dict(results["methods"]) if results.get("settings") == about else {}
    for name in METHODS:
        found[name] = compare(asked, name, found.get(name, {}))
        print(f"{name}: {spread(found[name]['losses'])}", file=sys.stderr, flush=True)
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        results = {"settings": about, "rates": RATES, "seeds": SEEDS, "base_loss": found[name]["base_loss"], "methods": found}
        asked.results.write_text(json.dumps(results, indent=1) + "\n")
    for name, seconds in step_times(asked).items():
        found[name]["step_s"] = seconds
    asked.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"base model: {results['base_loss']:.3f}\n\n{table(found)}")


if __name__ == "__main__":
    main()
