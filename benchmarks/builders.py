"""Emulator builders of equal bytes beside one another after federated tuning: what the adapter is worth in the full model (AdapFu).

    nice python benchmarks/builders.py [--shared ../shared/data] [--work runs/builders] [--only gsm8k,dolly] [--table]

FedOT and FedBiOT on the corpora of offsite.py. Uniform dropping keeps half of the layers between the adapters; the others get a
drop rate at which the emulator that clients receive, with the pre-alignment folded in, is no larger. Every builder has the same
search of the learning rate, then three seeds; a pair of runs with one seed shares everything but the emulator. Cells stand in
RESULTS as they finish: a killed run goes on there. With `--table` nothing is run: the README's table is made anew from RESULTS.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from cells import CORPORA, SEARCH_SEED, SEEDS, Book, Cell, Method, check, mini_model, paired, publish, seeds_of, settled, shown

from fedmpi import models, offsite

RESULTS = Path(__file__).parent / "results" / "builders.json"
RATES = (0.003, 0.01)
HALF = 0.5
BUILDERS = ("uniform", "influence", "shared", "thin", "quantized", "distilled")
PLACES = {"fedot": (2, 2), "fedbiot": (0, 2)}  # layers of the adapter at either end
ALGORITHMS = {"fedot": "FedOT", "fedbiot": "FedBiOT (Adapter 2)"}
PEFT = models.PeftConfig(rank=8, target_modules=("all-linear",))


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the figures of the README."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shared", type=Path, default=Path("../shared/data"))
    made.add_argument("--work", type=Path, default=Path("runs/builders"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--only", default=",".join(CORPORA), help="corpora, in this order")
    made.add_argument("--table", action="store_true", help="run nothing, write the table")
    return made


@cache
def drop_rate(model: str, algorithm: str, builder: str) -> float:
    """The least drop rate at which an emulator takes no more bytes than the uniform one, in hundredths."""
    most = held_bytes(model, algorithm, "uniform", HALF)
    if held_bytes(model, algorithm, builder, HALF) == most:
        return HALF
    return next(rate / 100 for rate in range(100) if held_bytes(model, algorithm, builder, rate / 100) <= most)


@cache
def held_bytes(model: str, algorithm: str, builder: str, rate: float) -> int:
    """Of an emulator's layers as clients get them: pre-alignment is folded in, where it may make factors grow."""
    import torch

    from fedmpi.models.backbone import decoder_layers
    from fedmpi.offsite.preparation import fold, with_lora

    first, last = PLACES[algorithm]
    config = offsite.Config(builder=builder, drop_rate=rate, adapter_first=first, adapter_last=last)  # type: ignore[arg-type]
    emulator = offsite.build(models.load_shapes(models.Config(model), "cpu"), config)
    if builder != "distilled":
        with torch.device("meta"):
            emulator = replace(emulator, model=fold(with_lora(emulator, PEFT, 0)))
    layout = emulator.layout
    pairs = zip(layout.order, decoder_layers(emulator.model), strict=True)
    tensors = [t for number, layer in pairs if number in layout.inner for t in (*layer.parameters(), *layer.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def methods(algorithm: str, model: str) -> dict[str, Method]:
    """A method for each builder that the algorithm can have."""
    return {
        f"{algorithm} {builder}": Method(
            algorithm, ("--offsite.builder", builder, "--offsite.drop_rate", str(drop_rate(model, algorithm, builder)))
        )
        for builder in BUILDERS
        if tunable(algorithm, builder)
    }


def tunable(algorithm: str, builder: str) -> bool:
    """Layers that stand in several places cannot be tuned in the rounds."""
    return builder != "shared" or algorithm == "fedot"


def cells(book: Book, shared: Path, corpora: Sequence[str]) -> Iterator[tuple[Cell, Method]]:
    """All of them; final cells look up the rate that the search, done by then, has found."""
    for corpus in corpora:
        for algorithm in PLACES:
            found = methods(algorithm, mini_model(shared) if CORPORA[corpus].folder else "builtin:tiny")
            for name, method in found.items():
                for rate in RATES:
                    yield Cell(corpus, name, "search", rate, SEARCH_SEED), method
            for seed in SEEDS:
                for name, method in found.items():
                    yield Cell(corpus, name, "final", book.best_rate(corpus, name, RATES), seed), method


# ---- the table ----------------------------------------------------------------------------------------------------------------


def tables(book: Book) -> str:
    """What is in the book, as Markdown: a row for each builder and corpus."""
    heads = ("corpus", "algorithm", "builder", "supply", "AdapEmu", "AdapFu", "AdapFu minus uniform's, by seed")
    lines = [told(book), "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for corpus in CORPORA:
        for algorithm in PLACES:
            for builder in BUILDERS:
                name = f"{algorithm} {builder}"
                if found := runs(book, corpus, name, "loss"):
                    emu, supply = (runs(book, corpus, name, figure).values() for figure in ("loss_emu", "supply_bytes"))
                    gap = "" if builder == "uniform" else paired(found, runs(book, corpus, f"{algorithm} uniform", "loss"))
                    mb = f"{next(iter(supply)) / CORPORA[corpus].clients / 1e6:.2f} MB"
                    told_so = (corpus, ALGORITHMS[algorithm], builder, mb, shown([*emu], 3), shown([*found.values()], 3), gap)
                    lines.append(f"| {' | '.join(told_so)} |")
    return "\n".join(lines)


def told(book: Book) -> str:
    """How much of the whole is there."""
    names = [f"{algorithm} {builder}" for algorithm in PLACES for builder in BUILDERS if tunable(algorithm, builder)]
    done = sum(len(runs(book, corpus, name, "loss")) for corpus in CORPORA for name in names)
    total = len(CORPORA) * len(names) * len(SEEDS)
    partial = "" if done == total else "; the table is partial, and a number in brackets says how many seeds"
    supply = "Supply is what a client gets once, embeddings, head, adapter and tokenizer included."
    return f"{done} of {total} final runs{partial}. {supply}"


def runs(book: Book, corpus: str, name: str, figure: str) -> dict[int, float]:
    """A figure by seed."""
    return seeds_of(book, corpus, name, name, RATES, figure)


def main() -> None:
    """Every cell that is not there yet, then the table."""
    asked = parser().parse_args()
    book = Book(asked.results)
    if not asked.table:
        check(asked.shared)
        settled(book, cells(book, asked.shared, asked.only.split(",")), asked.shared, asked.work)
    publish("builders", tables(book))


if __name__ == "__main__":
    main()
