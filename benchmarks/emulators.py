"""Emulators of equal size beside one another: what each holds, computes and gives away, and how far it is from the original layers.

    python benchmarks/emulators.py [--model builtin:tiny] [--public builtin:toy] [--kept 0.5] [--steps 0] [--rows 640]

`--kept` is the share of the layers between the adapters that uniform dropping keeps; every builder gets the same share of their
weights, but quantized, which keeps all layers in 8 bits. Distances are measured on public rows that neither builders nor alignment
saw: of hidden states where the emulator ends, relative to their norm, and the divergence of outputs (Eq. 3 and 4 of FedBiOT),
before and after `--steps` of pre-alignment. Prints a line per builder, and all of it as one JSON line at the end.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from fedmpi import data, models, offsite, training
from fedmpi.data import toy
from fedmpi.offsite.account import account
from fedmpi.offsite.alignment import distance

BUILDERS = ("uniform", "influence", "shared", "thin", "quantized", "distilled")
BATCH, CALIBRATION, HELDOUT = 10, 16, 160


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="builtin:tiny")
    made.add_argument("--public", default="builtin:toy", help="builtin:toy, or a file of rows with instruction, input and output")
    made.add_argument("--kept", default="0.5", help="shares, joined by commas")
    made.add_argument("--builders", default=",".join(BUILDERS))
    made.add_argument("--adapter_first", type=int, default=0)
    made.add_argument("--adapter_last", type=int, default=2)
    made.add_argument("--steps", type=int, default=0)
    made.add_argument("--lr", type=float, default=1e-3)
    made.add_argument("--rows", type=int, default=640)
    made.add_argument("--max_length", type=int, default=256)
    made.add_argument("--seed", type=int, default=0)
    return made


def public(asked: argparse.Namespace, tokenizer: Any) -> list[data.Example]:
    """Public rows, tokenised; the last ones are held out."""
    settings = data.Config(name="json", max_length=asked.max_length)
    if asked.public == "builtin:toy":
        rows = [data.Row(**values, id=f"public:{number}") for number, values in enumerate(toy.rows(asked.rows, 1, "train"))]
    else:
        rows = list(data.load(replace(settings, path=asked.public, num_rows=asked.rows), asked.seed).train)
    return data.tokenize(rows, tokenizer, settings)[0]


def settings(asked: argparse.Namespace, builder: str, kept: str) -> offsite.Config:
    """Equal sizes: of layers, or of the weights in all of them."""
    drop_rate = 0.0 if builder == "quantized" else float(1 - Fraction(kept))
    return offsite.Config(
        builder=builder,  # type: ignore[arg-type]
        drop_rate=drop_rate,
        adapter_first=asked.adapter_first,
        adapter_last=asked.adapter_last,
        prealign_steps=asked.steps or (1 if builder == "distilled" else 0),
        align_lr=asked.lr,
        align_batch_size=BATCH,
    )


def measure(asked: argparse.Namespace, builder: str, kept: str, pad_id: int, examples: list[data.Example]) -> dict[str, Any]:
    """One builder at one size."""
    config, model = settings(asked, builder, kept), models.load_model(models.Config(asked.model))
    seen, heldout = examples[:-HELDOUT], examples[-HELDOUT:]
    batches = [data.collate(seen[start : start + BATCH], pad_id) for start in range(0, BATCH * CALIBRATION, BATCH)]
    started = time.perf_counter()
    emulator = offsite.build(model, config, batches)
    built = time.perf_counter() - started
    judge = offsite.goal(model, emulator.layout, heldout, config, seed=asked.seed, pad_id=pad_id)
    found = {"builder": builder, "kept": kept, "layers": emulator.layout.emulator, "build_s": round(built, 2)}
    found |= account(model, emulator).shares() | {"before": distance(judge, emulator.model, emulator.layout, BATCH)}
    if asked.steps:
        target = replace(judge, examples=seen)
        emulator, done = offsite.prealign(
            emulator, target, config, training.Config(betas=(0.9, 0.95)), models.PeftConfig(), seed=asked.seed
        )
        found |= {"after": distance(judge, emulator.model, emulator.layout, BATCH), "align_s": done.figures["align_seconds"]}
        found["disclosed_after"] = account(model, emulator).disclosed
    return found


def main() -> None:
    """Every builder at every size."""
    asked = parser().parse_args()
    torch.set_num_threads(1)
    tokenizer = models.load_tokenizer(models.Config(asked.model))
    examples = public(asked, tokenizer)
    figures = []
    for kept in asked.kept.split(","):
        for builder in asked.builders.split(","):
            if builder == "distilled" and not asked.steps:
                continue  # it is uniform until it is aligned
            figures.append(measure(asked, builder, kept, int(tokenizer.pad_token_id), examples))
            print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"model": asked.model, "public": asked.public, "steps": asked.steps, "emulators": figures}))


if __name__ == "__main__":
    main()
