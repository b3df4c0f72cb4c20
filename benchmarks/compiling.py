"""Whether train.compile pays: fit() with compiled layers beside fit() with the layers as written, on the same samples.

    python benchmarks/compiling.py [--shape tiny|1b|7b] [--steps 20] [--repeats 5] [--batch_size 8] [--precision fp32]
    python benchmarks/compiling.py --shape 7b --batch_size 8 --length 512 --precision bf16 --device cuda

The model, the samples and the options are those of local_training.py. Both take turns in this process. Prints one JSON line:
`ratio` is the median time of a compiled turn over that of a plain one, once the code is there; `first_turn_s` is the turn that
makes it, with nothing made before; `pays_after_steps` is how many steps win that back, null where none do. `loss_differs` and
`weights_differ` say how far mean loss and any weight of the adapter are from the plain ones after the first turn of each.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import local_training
import torch

from fedmpi.data.prompts import Example
from fedmpi.training import Config, check, fit


def turn(config: Config, data: list[Example], model: torch.nn.Module, losses: list[float]) -> Callable[[], None]:
    """One client's turn, as often as it is called."""

    def run() -> None:
        losses.append(fit(model, data, config, seed=0, pad_id=local_training.PAD).loss)

    return run


def furthest(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of any trained weight."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).abs().max()) for p, q in pairs if p.requires_grad)


def main() -> None:
    """Make the code in a first turn, then take turns."""
    asked = local_training.options()
    torch.set_num_threads(asked.threads)
    data = local_training.samples(
        asked.steps * asked.batch_size, asked.length, local_training.SHAPES[asked.shape][0], asked.shape == "tiny"
    )
    losses: dict[str, list[float]] = {"plain": [], "compiled": []}
    runs, models = {}, {name: local_training.model_with_lora(asked) for name in losses}
    for name, model in models.items():
        config = Config(steps=asked.steps, batch_size=asked.batch_size, precision=asked.precision, compile=name == "compiled")
        check(config)
        runs[name] = turn(config, data, model, losses[name])
    began = time.perf_counter()
    runs["compiled"]()
    first_turn_s = time.perf_counter() - began
    runs["plain"]()
    loss_differs = abs(losses["compiled"][0] - losses["plain"][0])
    weights_differ = furthest(models["compiled"], models["plain"])
    taken = local_training.interleaved(runs, asked.repeats, asked.device)
    seconds = {name: statistics.median(run[0] for run in values) for name, values in taken.items()}
    worked = {name: statistics.median(run[1] for run in values) for name, values in taken.items()}
    won = (seconds["plain"] - seconds["compiled"]) / asked.steps
    figures = {
        "benchmark": "compiling",
        "shape": asked.shape,
        "ratio": round(seconds["compiled"] / seconds["plain"], 3),
        "cpu_ratio": round(worked["compiled"] / worked["plain"], 3),
        "plain_ms_per_step": round(1e3 * seconds["plain"] / asked.steps, 2),
        "first_turn_s": round(first_turn_s, 1),
        "pays_after_steps": round((first_turn_s - seconds["compiled"]) / won) if won > 0 else None,
        "loss_differs": float(f"{loss_differs:.2g}"),
        "weights_differ": float(f"{weights_differ:.2g}"),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as nothing:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing
        main()
