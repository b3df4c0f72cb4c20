"""What lossy messages cost in quality: one federated training under each codec chain, held-out loss beside that of raw, and bytes.

    nice python benchmarks/quality.py [--shared ../shared/data] [--work runs/quality] [--table]

GSM8K dealt to three clients, a small real model, LoRA on all linear modules. Under every chain the same seeds, rows, steps and
learning rate, so runs of one seed differ by the chain alone; the search says which of two rates is the better one for raw. Runs
three and nine times as long show what error feedback has made good by then. Bytes are those of the run's ledger per client and
direction, once the first broadcast is out, which goes as it is where a chain says delta; beside them the size of the same chain's
message for LLaMA-7B's LoRA, from its shape. Finished runs stand in RESULTS: a killed comparison goes on there. With `--table`
nothing is run: the README's table is made anew.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import SEARCH_SEED, SEEDS, Book, Cell, own_signals, publish, shown
from scenarios import prepare, score
from sizes import MESSAGES, mib

from fedmpi.codecs import Chain, parse

RESULTS = Path(__file__).parent / "results" / "quality.json"
CORPUS, CLIENTS, RATES = "gsm8k", 3, (0.003, 0.01)
ROUNDS = {CORPUS: 8, f"{CORPUS}-long": 24, f"{CORPUS}-longer": 72}
FLOOR = "raw"
SPARSE = "delta,topk:0.2,sign,ef"
CHAINS = (
    *(FLOOR, "int8", "delta,int4,ef,zstd", "delta,topk:0.1,int4,ef,zstd", "delta,topk:0.16,int2,ef,zstd"),
    *("delta,int4,zstd", "delta,topk:0.1,int4,zstd", "bf16", "fp16", "delta,int8,ef,zstd", "delta,topk:0.05,int8,ef,zstd"),
    SPARSE,
)
LONG_CHAINS = (FLOOR, "delta,topk:0.16,int2,ef,zstd", "delta,int4,ef,zstd", "delta,topk:0.1,int4,ef,zstd", "int8", SPARSE)
SETTINGS = (  # by which runs are called, the rate, and the chains
    (CORPUS, RATES[0], CHAINS),
    (f"{CORPUS}-long", RATES[0], LONG_CHAINS),
    (f"{CORPUS}-longer", RATES[0], (FLOOR, SPARSE)),
    (CORPUS, RATES[1], CHAINS[:-1]),
)


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the figures of the README."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shared", type=Path, default=Path("../shared/data"))
    made.add_argument("--work", type=Path, default=Path("runs/quality"))
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--model", default="stories260K")
    for name, default in {"rows": 600, "test": 64, "steps": 4, "batch": 2, "length": 128}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--table", action="store_true", help="run nothing, write the table")
    return made


def command(asked: argparse.Namespace, cell: Cell) -> list[str]:
    """The arguments of one run."""
    rounds = str(ROUNDS[cell.corpus])
    return [
        *("--model.path", str(asked.shared / "models" / asked.model), "--peft.target_modules", "all-linear"),
        *("--data.name", "json", "--data.path", str(asked.work / CORPUS / cell.part), "--data.splitter", "iid"),
        *("--data.max_length", str(asked.length), "--clients", str(CLIENTS), "--rounds", rounds),
        *("--eval_every", "0", "--checkpoint_every", rounds, "--train.steps", str(asked.steps)),
        *("--train.batch_size", str(asked.batch), "--train.lr", str(cell.rate), "--seed", str(cell.seed)),
        *("--codec", cell.method, "--run_dir", str(asked.work / "runs" / cell.key.replace("/", "-"))),
    ]


def measured(asked: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Held-out loss at the end of a run, and its bytes per client and round, the first broadcast apart."""
    given = command(asked, cell)
    folder = Path(given[-1])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with own_signals():
        found: dict[str, Any] = dict(score(given))
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    first, *later = (line for line in lines if "up_bytes" in line)
    found["first_down"] = first["down_bytes"] // CLIENTS
    found |= {way: statistics.mean(line[f"{way}_bytes"] for line in later) / CLIENTS for way in ("up", "down")}
    shutil.rmtree(folder)
    return found


def cells() -> Iterator[Cell]:
    """The search, then all seeds of a chain before the next."""
    for rate in RATES:
        yield Cell(CORPUS, FLOOR, "search", rate, SEARCH_SEED)
    for name, rate, chains in SETTINGS:
        for chain in chains:
            for seed in SEEDS:
                yield Cell(name, chain, "final", rate, seed)


def settle(asked: argparse.Namespace, book: Book) -> None:
    """Make the runs that are not in the book yet."""
    prepare(asked, CORPUS)
    for cell in cells():
        if cell.key not in book.cells:
            found = measured(asked, cell)
            book.put(cell, found)
            print(f"{time.strftime('%H:%M:%S')} {cell.key}: loss {found['loss']:.4f}", file=sys.stderr, flush=True)


# ---- the table ----------------------------------------------------------------------------------------------------------------


def runs(book: Book, name: str, rate: float, chain: str) -> dict[int, dict[str, Any]]:
    """The figures of a chain, by seed."""
    keys = {seed: Cell(name, chain, "final", rate, seed).key for seed in SEEDS}
    return {seed: book.cells[key] for seed, key in keys.items() if key in book.cells}


def target(chain: Chain) -> tuple[float, float] | None:
    """Most MiB of a message of LLaMA-7B's LoRA, and most percent above the loss of raw, that are asked of such a chain."""
    if chain.share is not None:
        return 0.5, 1.0
    if chain.number.name == "int4":
        return 1.6, 0.3
    return (4.1, 0.3) if chain.lossy else None  # lossless quality is asked for here: as near as of four bits


def verdict(chain: str, size: float, excess: Mapping[int, float]) -> str:
    """Whether a chain reaches what is asked of its kind, on the mean of the seeds."""
    asked = target(parse(chain))
    if asked is None or len(excess) < len(SEEDS):
        return ""
    told = [f"{asked[0]} MiB, {asked[1]} %"]
    told += ["size missed"] if size > asked[0] else []
    told += ["loss missed"] if statistics.mean(excess.values()) > asked[1] else []
    return ": ".join((told[0], " and ".join(told[1:]) or "met"))


def row(book: Book, name: str, rate: float, chain: str) -> str:
    """One chain's line."""
    found, floor = runs(book, name, rate, chain), runs(book, name, rate, FLOOR)
    excess = {s: 100 * (found[s]["loss"] / floor[s]["loss"] - 1) for s in SEEDS if s in found and s in floor}
    each = ", ".join(f"{value:+.2f}" for value in excess.values())
    size = mib(chain, MESSAGES["lora"])
    whole = statistics.mean(one["up"] for one in floor.values())
    sent = [statistics.mean(one[way] for one in found.values()) for way in ("up", "down")]
    bytes_each = ", ".join(f"{value:,.0f}" for value in sent)
    bits = ", ".join(f"{32 * value / whole:.2f}" for value in sent)
    losses = shown([one["loss"] for one in found.values()], 3)
    gap = "" if chain == FLOOR else f"{shown([*excess.values()], 2)} ({each})"
    return f"| `{chain}` | {losses} | {gap} | {bytes_each} | {bits} | {size:.2f} | {verdict(chain, size, excess)} |"


def table(book: Book, name: str, rate: float, chains: Sequence[str]) -> str:
    """The chains in one setting, as Markdown."""
    heads = ("chain", "held-out loss", "above raw, % (by seed)", "bytes up, down", "bits per value", "LLaMA-7B, MiB", "target")
    rows = [row(book, name, rate, chain) for chain in chains if runs(book, name, rate, chain)]
    return "\n".join(
        [f"{ROUNDS[name]} rounds, learning rate {rate}:", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]
    )


def tables(book: Book) -> str:
    """What the search said, and all settings that there are runs of."""
    found = {rate: book.cells.get(Cell(CORPUS, FLOOR, "search", rate, SEARCH_SEED).key) for rate in RATES}
    searched = ", ".join(f"{one['loss']:.3f} at {rate}" for rate, one in found.items() if one)
    there = [table(book, *setting) for setting in SETTINGS if runs(book, *setting[:2], FLOOR)]
    return "\n\n".join([f"The search, raw, validation rows: {searched}.", *there])


def main() -> None:
    """Every run that is not there yet, then the table."""
    asked = parser().parse_args()
    book = Book(asked.results)
    if not asked.table:
        settle(asked, book)
    publish("quality", tables(book))


if __name__ == "__main__":
    main()
