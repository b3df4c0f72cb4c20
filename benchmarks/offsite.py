"""FedBiOT's Tables 2 to 4 in miniature: who tunes how well without the model, and what each of FedBiOT's parts is worth.

    nice python benchmarks/offsite.py [--shared ../shared/data] [--work runs/offsite] [--only rosetta,gsm8k] [--table]

bitstories1M (8 layers) on GSM8K with 3 clients, Rosetta with 9 and Dolly with 8, alpaca as the public set; builtin:tiny (12 layers)
on the built-in tasks with 3 clients. Every method has the same search of the learning rate at drop rate 0.2 (seed 0, on
validation rows), then three seeds on test rows that the search did not see, at drop rates 0.2 and 0.5; ablations take the rate of
the method that they change. All take the same number of steps at each client; a step of the pooled data has the batches of all
clients in it. Cells stand in RESULTS as they finish: a killed run goes on there. With `--table` nothing is run: the README's
tables are made anew from RESULTS.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from cells import CORPORA, SEARCH_SEED, SEEDS, Book, Cell, Method, check, paired, publish, seeds_of, settled, shown

RESULTS = Path(__file__).parent / "results" / "offsite.json"
RATES = (0.003, 0.01)
WHOLE = {
    "local": Method("full", ("--scenario", "local")),
    "fedavg": Method("full"),
}
TUNED = {
    "offsite-tuning": Method("fedot", ("--scenario", "global")),
    "localot": Method("fedot", ("--scenario", "local")),
    "fedot": Method("fedot"),
    "fedbiot-2": Method("fedbiot"),
    "fedbiot-4": Method("fedbiot", ("--offsite.adapter_last", "4")),
}
HALVED = {f"{name} 0.5": Method(m.algorithm, ("--offsite.drop_rate", "0.5", *m.arguments)) for name, m in TUNED.items()}
ABLATED = {
    "epsilon-0": Method("fedbiot", ("--offsite.prox_weight", "0")),
    "lambda-0": Method("fedbiot", ("--offsite.kd_weight", "0")),
    "no-alignment": Method("fedbiot", ("--offsite.align_steps", "0")),
    "fedot-last-2": Method("fedot", ("--offsite.adapter_first", "0")),
}
LABELS = {
    "local": "every client alone, whole model",
    "fedavg": "FedAvg, whole model",
    "offsite-tuning": "Offsite-tuning",
    "localot": "LocalOT",
    "fedot": "FedOT",
    "fedbiot-2": "FedBiOT (Adapter 2)",
    "fedbiot-4": "FedBiOT (Adapter 4)",
    "epsilon-0": "FedBiOT (Adapter 2), epsilon 0",
    "lambda-0": "FedBiOT (Adapter 2), lambda 0",
    "no-alignment": "FedBiOT (Adapter 2), no alignment in the rounds",
    "fedot-last-2": "FedOT with FedBiOT's adapter (last 2)",
}
PAIRS = (
    ("fedot", "offsite-tuning"), ("fedot", "localot"), ("fedbiot-2", "fedot"), ("fedbiot-4", "fedot"),
    ("fedbiot-2 0.5", "fedot 0.5"), ("fedbiot-4 0.5", "fedot 0.5"), ("fedbiot-2", "fedot-last-2"),
    ("epsilon-0", "fedbiot-2"), ("lambda-0", "fedbiot-2"), ("no-alignment", "fedbiot-2"),
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the figures of the README."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shared", type=Path, default=Path("../shared/data"))
    made.add_argument("--work", type=Path, default=Path("runs/offsite"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--only", default=",".join(CORPORA), help="corpora, in this order")
    made.add_argument("--table", action="store_true", help="run nothing, write the README's tables from the results")
    return made


def cells(book: Book, corpora: Sequence[str]) -> Iterator[tuple[Cell, Method]]:
    """All of them, those first that matter most. Final cells look up the rate that the search, done by then, has found."""
    first = {**TUNED, **WHOLE}
    for corpus in corpora:
        for name, method in first.items():
            for rate in RATES:
                yield Cell(corpus, name, "search", rate, SEARCH_SEED), method
        yield from final(book, corpus, first, SEEDS[0])
    for seed, corpus in product(SEEDS[1:], corpora):
        yield from final(book, corpus, first, seed)
    for seed, corpus, methods in product(SEEDS, corpora, (HALVED, ABLATED)):
        yield from final(book, corpus, methods, seed)


def final(book: Book, corpus: str, methods: dict[str, Method], seed: int) -> Iterator[tuple[Cell, Method]]:
    """A cell for each method at its rate."""
    for name, method in methods.items():
        yield Cell(corpus, name, "final", book.best_rate(corpus, searched(name), RATES), seed), method


def searched(name: str) -> str:
    """The method whose search gave the rate; an ablation takes that of the method that it changes."""
    if name in ABLATED:
        return "fedot" if ABLATED[name].algorithm == "fedot" else "fedbiot-2"
    return name.removesuffix(" 0.5")


# ---- tables -------------------------------------------------------------------------------------------------------------------


def tables(book: Book) -> str:
    """What is in the book, as Markdown: losses, accuracies, and differences between runs of one seed."""
    there = [corpus for corpus in CORPORA if any(key.startswith(f"{corpus}/") and "/final/" in key for key in book.cells)]
    text = [told(book), "", "Held-out loss:", "", *table(book, there, "loss", 1, 3)]
    text += ["", "Held-out token accuracy, %:", "", *table(book, there, "accuracy", 100, 1)]
    if "toy" in there:
        text += ["", "Exact match of greedy answers, %:", "", *table(book, ["toy"], "exact", 100, 1)]
    text += ["", "Difference of AdapFu's held-out loss, by seed (below 0: the first is better):", "", *pairs(book, there)]
    return "\n".join(text)


def told(book: Book) -> str:
    """How much of the whole is there."""
    methods = [*TUNED, *WHOLE, *HALVED, *ABLATED]
    done = sum(len(runs(book, corpus, name, "loss")) for corpus in CORPORA for name in methods)
    total = len(CORPORA) * len(methods) * len(SEEDS)
    seconds = sum(cell["cpu_s"] for cell in book.cells.values())
    partial = "" if done == total else "; the tables are partial, and a number in brackets says how many seeds"
    return f"{done} of {total} final runs ({seconds / 60:.0f} minutes of processor time with their searches){partial}."


def runs(book: Book, corpus: str, name: str, figure: str) -> dict[int, float]:
    """A figure by seed."""
    return seeds_of(book, corpus, name, searched(name), RATES, figure)


def table(book: Book, corpora: Sequence[str], figure: str, scale: float, digits: int) -> list[str]:
    """A row for each method and drop rate, two columns for each corpus: AdapEmu and AdapFu."""
    heads = [f"{corpus}: {model}" for corpus in corpora for model in ("AdapEmu", "AdapFu")]
    lines = [f"| drop rate | method | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    rows = [("", f"base_{figure}", "fedbiot-2", "no tuning (emulator of FedBiOT, Adapter 2, at 0.2)"), *named("", WHOLE, figure)]
    rows += [*named("0.2", TUNED, figure), *named("0.5", HALVED, figure), *named("0.2", ABLATED, figure)]
    for drop, wanted, name, label in rows:
        found = [spread(book, corpus, name, f"{wanted}{ending}", scale, digits) for corpus in corpora for ending in ("_emu", "")]
        lines.append(f"| {drop} | {label} | {' | '.join(found)} |")
    return lines


def named(drop: str, methods: dict[str, Method], figure: str) -> list[tuple[str, str, str, str]]:
    """Rows: drop rate, figure, name, label."""
    return [(drop, figure, name, LABELS[name.removesuffix(" 0.5")]) for name in methods]


def spread(book: Book, corpus: str, name: str, figure: str, scale: float, digits: int) -> str:
    """Mean and spread over the seeds that are there."""
    return shown([scale * value for value in runs(book, corpus, name, figure).values()], digits)


def pairs(book: Book, corpora: Sequence[str]) -> list[str]:
    """A row for each pair of methods."""
    lines = [f"| pair | {' | '.join(corpora)} |", f"|---|{'---|' * len(corpora)}"]
    for one, other in PAIRS:
        gaps = [paired(runs(book, corpus, one, "loss"), runs(book, corpus, other, "loss")) for corpus in corpora]
        drop = "drop rate 0.5" if one.endswith(" 0.5") else "0.2"
        label = " minus ".join(LABELS[name.removesuffix(" 0.5")] for name in (one, other))
        lines.append(f"| {label}, {drop} | {' | '.join(gaps)} |")
    return lines


def main() -> None:
    """Every cell that is not there yet, then the tables."""
    asked = parser().parse_args()
    book = Book(asked.results)
    if not asked.table:
        check(asked.shared)
        settled(book, cells(book, asked.only.split(",")), asked.shared, asked.work)
    publish("offsite", tables(book))


if __name__ == "__main__":
    main()
