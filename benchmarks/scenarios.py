"""FS-LLM's Table 2 in miniature: federated, local and global training on real corpora with a small real model.

    python benchmarks/scenarios.py [--shared ../shared/data] [--work runs/scenarios] [--rows 600] [--rounds 5] [--steps 4]

Clients are FS-LLM's: gsm8k dealt evenly to three, dolly by its eight categories, rosetta by its nine languages. Each scenario gets
the same search of the learning rate (seed 0, on a validation split that the last figures do not see), then three seeds on the test
split, which is common to all: a client alone is measured on everybody's rows. All take the same number of steps; a step of the
pooled data has the batches of all clients in it, so that it sees as many rows as the federation. Runs that are there already are
not made again. Writes RESULTS and prints a table; every single run is a folder of `python -m fedmpi.run` in WORK.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from fedmpi import data, run
from fedmpi.data.corpora import Row

RESULTS = Path(__file__).parent / "results" / "scenarios.json"
CORPORA = {"gsm8k": ("gsm8k", "iid", 3), "dolly": ("dolly15k", "meta", 8), "rosetta": ("rosetta", "meta", 9)}
SCENARIOS = ("local", "fed", "global")
RATES = (0.001, 0.003, 0.01, 0.03)
SEEDS = (1, 2, 3)


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the figures of the README."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shared", type=Path, default=Path("../shared/data"))
    made.add_argument("--work", type=Path, default=Path("runs/scenarios"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--model", default="stories260K")
    made.add_argument("--corpora", default=",".join(CORPORA))
    for name, default in {"rows": 600, "test": 100, "rounds": 5, "steps": 4, "batch": 2, "length": 160}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    return made


def prepare(asked: argparse.Namespace, corpus: str) -> None:
    """WORK/CORPUS/search and WORK/CORPUS/final: the same training rows beside the validation and beside the test rows."""
    found = data.load(data.Config(name=corpus, path=str(asked.shared / CORPORA[corpus][0])), 0)
    rng = numpy.random.default_rng(0)
    rows = [found.train[i] for i in rng.permutation(len(found.train))]
    tests = [found.test[i] for i in rng.permutation(len(found.test))[: asked.test]] or rows[-asked.test :]
    train, validation = rows[: asked.rows], rows[asked.rows : asked.rows + asked.test]
    for name, held in {"search": validation, "final": tests}.items():
        folder = asked.work / corpus / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.jsonl", train)
        write(folder / "test.jsonl", held)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows under the names that the program knows."""
    records = [{"instruction": r.instruction, "input": r.input, "response": r.output, "category": r.category} for r in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def command(asked: argparse.Namespace, corpus: str, scenario: str, rate: float, seed: int, part: str) -> list[str]:
    """The arguments of one run."""
    _, splitter, clients = CORPORA[corpus]
    batch = asked.batch * (clients if scenario == "global" else 1)
    return [
        *("--model.path", str(asked.shared / "models" / asked.model), "--scenario", scenario, "--seed", str(seed)),
        *("--data.name", "json", "--data.path", str(asked.work / corpus / part), "--data.splitter", splitter),
        *("--data.max_length", str(asked.length), "--clients", str(clients)),
        *("--rounds", str(asked.rounds), "--eval_every", "0", "--checkpoint_every", str(asked.rounds)),
        *("--train.steps", str(asked.steps), "--train.batch_size", str(batch), "--train.lr", str(rate)),
        *("--run_dir", str(asked.work / corpus / f"{part}-{scenario}-lr{rate}-seed{seed}")),
    ]


def score(arguments: Sequence[str]) -> dict[str, float]:
    """Held-out loss and token accuracy at the end of a run, the mean of the clients where each is alone; made if need be."""
    folder = Path(arguments[-1])
    state = folder / "state.json"
    if not state.exists() or json.loads(state.read_text())["state"] != "finished":
        with (folder.parent / f"{folder.name}.log").open("a") as log, contextlib.redirect_stdout(log):
            if code := run.main(arguments):
                sys.exit(f"{folder} ended with exit code {code}")
    return dict(zip(("loss", "accuracy"), map(statistics.mean, zip(*figures(folder), strict=True)), strict=True))


def figures(folder: Path) -> Iterator[tuple[float, float]]:
    """Of each party that trained: one, or every client alone."""
    for path in sorted(folder.glob("clients/*/summary.json")) or [folder / "summary.json"]:
        final = json.loads(path.read_text())["final"]
        yield final["eval_loss"], final["eval_token_accuracy"]


def base(folder: Path) -> dict[str, float]:
    """What the model can do before any training."""
    first = json.loads((folder / "summary.json").read_text())["base"]
    return {"loss": first["eval_loss"], "accuracy": first["eval_token_accuracy"]}


def compare(asked: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """Search and three seeds for each scenario of one corpus."""
    prepare(asked, corpus)
    found: dict[str, Any] = {}
    for scenario in SCENARIOS:
        searched = {rate: score(command(asked, corpus, scenario, rate, 0, "search"))["loss"] for rate in RATES}
        rate = min(searched, key=lambda one: searched[one])
        runs = [score(command(asked, corpus, scenario, rate, seed, "final")) for seed in SEEDS]
        found[scenario] = {"lr": rate, "searched": searched, "runs": runs}
        print(f"{corpus} {scenario}: lr {rate}, {shown(found[scenario])}", file=sys.stderr, flush=True)
    found["base"] = base(Path(command(asked, corpus, "fed", found["fed"]["lr"], SEEDS[0], "final")[-1]))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def shown(scenario: dict[str, Any]) -> str:
    """Loss and token accuracy of a scenario."""
    return f"{spread([r['loss'] for r in scenario['runs']])}, {spread([100 * r['accuracy'] for r in scenario['runs']])} %"


def table(results: dict[str, Any]) -> str:
    """A row for each corpus."""
    lines = ["| corpus | base model | " + " | ".join(SCENARIOS) + " |", "|---|---|---|---|---|"]
    for corpus, found in results["corpora"].items():
        first = f"{found['base']['loss']:.3f}, {100 * found['base']['accuracy']:.1f} %"
        lines.append(f"| {corpus} | {first} | " + " | ".join(shown(found[scenario]) for scenario in SCENARIOS) + " |")
    return "\n".join(lines)


def main() -> None:
    """All corpora, one after the other; the results file is written after each."""
    asked = parser().parse_args()
    about = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    results: dict[str, Any] = {"settings": about, "rates": RATES, "seeds": SEEDS, "corpora": {}}
    for corpus in asked.corpora.split(","):
        results["corpora"][corpus] = compare(asked, corpus)
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in about.items() if key not in ("shared", "work", "results")}
        asked.results.write_text(json.dumps({**results, "settings": kept}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
