"""What comparisons of methods share: corpora in miniature, one cell (a run of the program with one method, rate and seed), and the
book of finished cells, from which a killed comparison goes on.

A cell is a run of `python -m fedmpi.run` in this process, made of a shipped recipe and overrides. It must never know what a method
is: methods are arguments. Rows of a corpus are drawn once: training rows, validation rows for the search of the learning rate, and
test rows, which no search sees.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import yaml

from fedmpi import config, data, run
from fedmpi.data import toy
from fedmpi.data.corpora import Row
from fedmpi.errors import ConfigError
from fedmpi.settings import recipe

README = Path(__file__).parent / "README.md"
RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
PUBLIC = "alpaca/alpaca_small.json.gz"
SEEDS = (1, 2, 3)
SEARCH_SEED = 0
ROWS, HELD_OUT = 600, 64
ROUNDS_ONLY = ("emulator", "align_steps", "align_optimizer_state", "prox_weight")  # an emulator is the same whatever these say


@dataclass(frozen=True)
class Corpus:
    """A corpus in miniature: where it lies, how it is dealt, and the ending of its recipes' names."""

    folder: str | None
    splitter: str
    clients: int
    recipes: str
    more: tuple[str, ...]  # what its runs are given besides


MINI = (
    *("--rounds", "5", "--train.steps", "4", "--train.batch_size", "2", "--eval.batch_size", "16", "--data.max_length", "96"),
    *("--offsite.prealign_steps", "80", "--offsite.align_steps", "5", "--offsite.align_batch_size", "4"),
)
TINY = (
    *("--rounds", "5", "--train.steps", "10", "--train.batch_size", "4", "--eval.task", "exact_match"),
    *("--offsite.prealign_steps", "80", "--offsite.align_steps", "5", "--offsite.align_batch_size", "4"),
)
CORPORA = {
    "gsm8k": Corpus("gsm8k", "iid", 3, "mini-gsm8k", MINI),
    "rosetta": Corpus("rosetta", "meta", 9, "mini-rosetta", MINI),
    "dolly": Corpus("dolly15k", "meta", 8, "mini-dolly", MINI),
    "toy": Corpus(None, "meta", 3, "tiny", TINY),
}


@dataclass(frozen=True)
class Cell:
    """One run: on `search` rows with the seed of the search, or on the `final` ones."""

    corpus: str
    method: str
    part: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """Its name in the book and on the disk."""
        return f"{self.corpus}/{self.method}/{self.part}/lr{self.rate}/seed{self.seed}"


@dataclass(frozen=True)
class Method:
    """How a cell is run: a recipe's algorithm (full: the same recipe on the whole model), and overrides."""

    algorithm: str
    arguments: tuple[str, ...] = ()

    @property
    def scenario(self) -> str:
        """fed, local or global."""
        return self.arguments[self.arguments.index("--scenario") + 1] if "--scenario" in self.arguments else "fed"


class Book:
    """The finished cells and their figures, in a file that is whole at any moment."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Any] = json.loads(path.read_text())["cells"] if path.exists() else {}

    def put(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Remember what a cell came to."""
        self.cells[cell.key] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps({"cells": dict(sorted(self.cells.items()))}, indent=0) + "\n")
        os.replace(beside, self.path)

    def best_rate(self, corpus: str, method: str, rates: Sequence[float]) -> float:
        """The rate with the least held-out loss of the search, by the model that the method is after."""
        found = {rate: self.cells[Cell(corpus, method, "search", rate, SEARCH_SEED).key]["loss"] for rate in rates}
        return min(found, key=lambda rate: found[rate])


def prepare(shared: Path, work: Path, name: str) -> None:
    """WORK/data/CORPUS/search and WORK/data/CORPUS/final: the same training rows beside the validation and beside the test rows."""
    corpus = CORPORA[name]
    if (work / "data" / name / "final" / "test.jsonl").exists():
        return
    if corpus.folder is None:
        train, validation, tests = toy_rows()
    else:
        found = data.load(data.Config(name=name, path=str(shared / corpus.folder)), 0)
        rng = numpy.random.default_rng(0)
        rows = [found.train[i] for i in rng.permutation(len(found.train))]
        train, validation = rows[:ROWS], rows[ROWS : ROWS + HELD_OUT]
        tests = [found.test[i] for i in rng.permutation(len(found.test))[:HELD_OUT]] or rows[-HELD_OUT:]
    for part, held in {"search": validation, "final": tests}.items():
        folder = work / "data" / name / part
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.jsonl", train)
        write(folder / "test.jsonl", held)


def toy_rows() -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows of builtin:toy; validation is another draw of the training side, without its rows."""

    def made(num: int, seed: int, split: str) -> list[Row]:
        return [Row(**values, id=str(number)) for number, values in enumerate(toy.rows(num, seed, split))]

    train = made(ROWS, 0, "train")
    known = {(row.instruction, row.input) for row in train}
    fresh = [row for row in made(2 * HELD_OUT, 2, "train") if (row.instruction, row.input) not in known]
    return train, fresh[:HELD_OUT], made(HELD_OUT, 0, "test")


def write(path: Path, rows: Sequence[Row]) -> None:
    """Rows under the names that the program knows."""
    records = [{"instruction": r.instruction, "input": r.input, "response": r.output, "category": r.category} for r in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def arguments(cell: Cell, method: Method, shared: Path, work: Path) -> list[str]:
    """The command line of a cell."""
    corpus = CORPORA[cell.corpus]
    path = RECIPES / f"{'fedot' if method.algorithm == 'full' else method.algorithm}-{corpus.recipes}.yaml"
    files = ("--offsite.public_path", str(shared / PUBLIC), "--model.path", mini_model(shared))
    more = [*corpus.more, *(files if corpus.folder else ())]
    if method.algorithm == "full":
        path, more = on_the_whole_model(path, work), _without_offsite(more)
    batch = int(more[more.index("--train.batch_size") + 1]) * (corpus.clients if method.scenario == "global" else 1)
    return [
        *("--config", str(path), *more, *method.arguments),
        *("--data.name", "json", "--data.path", str(work / "data" / cell.corpus / cell.part)),
        *("--data.splitter", corpus.splitter, "--clients", str(corpus.clients), "--train.batch_size", str(batch)),
        *("--train.lr", str(cell.rate), "--seed", str(cell.seed), "--eval_every", "0", "--checkpoint_every", "1000"),
        *("--run_dir", str(work / "runs" / cell.key.replace("/", "-"))),
    ]


def mini_model(shared: Path) -> str:
    """The model of eight layers."""
    return str(shared / "models" / "bitstories1M")


def _without_offsite(given: Sequence[str]) -> list[str]:
    pairs = zip(given[::2], given[1::2], strict=True)
    return [word for key, value in pairs if not key.startswith("--offsite.") for word in (key, value)]


def on_the_whole_model(path: Path, work: Path) -> Path:
    """The same recipe where every client has the model: no emulator, the adapter on all layers."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    del settings["offsite"]
    made = work / "recipes" / path.name.replace("fedot", "full")
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_text(yaml.safe_dump({**settings, "algorithm": "fedavg"}), encoding="utf-8")
    return made


def perform(given: Sequence[str], work: Path) -> dict[str, Any]:
    """Run, or go on with, the run of a cell; its figures. An emulator that another cell has made is taken from there."""
    folder = Path(given[-1])
    kept = emulator_folder(given, work)
    if kept is not None and kept.exists():
        given = [*given[:-2], "--offsite.emulator", str(kept), *given[-2:]]
    started, cpu = time.perf_counter(), time.process_time()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log, own_signals(), contextlib.ExitStack() as streams:
        streams.enter_context(contextlib.redirect_stdout(log))
        streams.enter_context(contextlib.redirect_stderr(log))
        code = run.main(given)
    if code:
        sys.exit(f"{folder} ended with exit code {code}, see {folder}.log: start the same command again to go on")
    found = figures(folder) | {"seconds": round(time.perf_counter() - started, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    if kept is not None and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        (folder / "emulator").rename(kept)
    shutil.rmtree(folder)
    return found


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """A run that has ended hears no signals any more: between two cells they are this program's again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def emulator_folder(given: Sequence[str], work: Path) -> Path | None:
    """Where the emulator of these settings is kept; it depends neither on the clients' rows nor on what rounds do."""
    wanted, _ = recipe.read(given, "benchmarks", "")
    scheme = getattr(recipe.algorithm(wanted.algorithm), "SCHEME", None)
    if scheme is None:
        return None
    made = {key: value for key, value in asdict(scheme.resolve(wanted.offsite)).items() if key not in ROUNDS_ONLY}
    training = {key: value for key, value in asdict(wanted.train).items() if key not in ("lr", "steps", "batch_size")}
    text = (wanted.data.max_length, wanted.data.template)
    return work / "emulators" / config.digest([made, training, text, asdict(wanted.model), asdict(wanted.peft), wanted.seed])


def figures(folder: Path) -> dict[str, Any]:
    """Of the party that trained, or the mean of clients that trained alone; of the models before any training; what it cost."""
    parties = [json.loads(path.read_text()) for path in sorted(folder.glob("clients/*/summary.json")) or [folder / "summary.json"]]
    names = {"eval_loss": "loss", "eval_token_accuracy": "accuracy", "exact_match": "exact"}
    found: dict[str, Any] = {}
    for key, name in names.items():
        for ending in ("", "_emu"):
            if all(f"{key}{ending}" in party["final"] for party in parties):
                found[f"{name}{ending}"] = statistics.mean(party["final"][f"{key}{ending}"] for party in parties)
            if f"{key}{ending}" in parties[0]["base"]:
                found[f"base_{name}{ending}"] = parties[0]["base"][f"{key}{ending}"]
    sent = parties[0]["totals"] if parties[0]["scenario"] == "fed" else {}  # nobody sends anything alone
    return found | {key: sent[key] for key in ("up_bytes", "down_bytes", "supply_bytes") if key in sent}


def settled(book: Book, cells: Iterator[tuple[Cell, Method]], shared: Path, work: Path) -> None:
    """Perform what is not in the book yet, in this order, and say so."""
    for cell, method in cells:
        if cell.key in book.cells:
            continue
        prepare(shared, work, cell.corpus)
        found = perform(arguments(cell, method, shared, work), work)
        book.put(cell, found)
        print(f"{time.strftime('%H:%M:%S')} {cell.key}: loss {found['loss']:.3f}, {found['cpu_s']} s", file=sys.stderr, flush=True)


def check(shared: Path) -> None:
    """Say what is missing before hours are spent."""
    wanted = [shared / corpus.folder for corpus in CORPORA.values() if corpus.folder] + [shared / PUBLIC, Path(mini_model(shared))]
    if missing := [str(path) for path in wanted if not path.exists()]:
        raise ConfigError(f"--shared {shared} lacks {', '.join(missing)}")


# ---- tables -------------------------------------------------------------------------------------------------------------------


def seeds_of(book: Book, corpus: str, name: str, searched: str, rates: Sequence[float], figure: str) -> dict[int, float]:
    """A figure of the final runs that are there, by seed."""
    if any(Cell(corpus, searched, "search", rate, SEARCH_SEED).key not in book.cells for rate in rates):
        return {}
    rate = book.best_rate(corpus, searched, rates)
    found = {seed: book.cells.get(Cell(corpus, name, "final", rate, seed).key, {}) for seed in SEEDS}
    return {seed: cell[figure] for seed, cell in found.items() if figure in cell}


def shown(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation of the seeds; how many there are, where some are missing."""
    if not values:
        return ""
    told = f"{statistics.mean(values):.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
    return told if len(values) == len(SEEDS) else f"{told} ({len(values)})"


def paired(ones: Mapping[int, float], others: Mapping[int, float]) -> str:
    """Differences between runs of one seed."""
    return shown([ones[seed] - others[seed] for seed in SEEDS if seed in ones and seed in others], 3)


def publish(name: str, text: str, readme: Path = README) -> None:
    """Put tables between their marks in the README, and on the terminal."""
    before, opened, rest = readme.read_text(encoding="utf-8").partition(f"<!-- {name}: made by the program -->\n")
    _, closed, after = rest.partition(f"<!-- end of {name} -->\n")
    if not (opened and closed):
        raise ConfigError(f"{readme} has no lines <!-- {name}: made by the program --> and <!-- end of {name} -->: add them")
    readme.write_text(f"{before}{opened}\n{text}\n\n{closed}{after}", encoding="utf-8")
    print(text)
