"""How far each aggregation rule is from the average of the products, and what it costs.

    python benchmarks/aggregation.py [--rules mean,ffa,...] [--rounds 6] [--steps 6] [--clients 4] [--ranks 8,2,4,8]

The packaged model on toy instructions dealt by category, so that clients drift apart; every rule on the same rows and seeds.
Prints a JSON line for each: the recorded error (of the worst round and the last), the held-out loss, bytes a round, milliseconds
of a round's aggregation; with --ranks the same for clients of unequal ranks.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RULES = "mean,ffa,rolora,fedex,flora,flexlora"
TASK = (
    "--data.splitter=meta",
    "--data.num_rows=600",
    "--data.max_length=64",
    "--eval.rows=64",
    "--eval.task=none",
    "--eval_every=0",
)
TRAINED = ("--train.lr=0.01", "--train.batch_size=4", "--scenario=fed")


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Note what each aggregation takes, folding into the base included; waiting for clients and the recorded error left out."""
    from fedmpi.hosting.host import Host

    aggregate = Host.aggregate

    def measured(host: Host, server: Any, updates: Any, rnd: Any) -> Any:
        arrived = list(updates)
        began = time.perf_counter()
        after = aggregate(host, server, arrived, rnd)
        seconds.append(time.perf_counter() - began)
        return after

    Host.aggregate = measured  # type: ignore[method-assign]
    try:
        yield
    finally:
        Host.aggregate = aggregate  # type: ignore[method-assign]


def measure(asked: argparse.Namespace, rule: str) -> dict[str, Any]:
    """One run."""
    from fedmpi import run

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), timed(seconds):
        size = [f"--clients={asked.clients}", f"--rounds={asked.rounds}", f"--train.steps={asked.steps}", f"--run_dir={folder}/run"]
        unequal = [f"--peft.client_ranks={asked.ranks}"] if asked.ranks else []
        if run.main([*TASK, *TRAINED, *size, *unequal, f"--aggregation.rule={rule}"]):
            raise SystemExit(f"the run with rule {rule} failed")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").open()]
        final = json.loads((Path(folder) / "run" / "summary.json").read_text())["final"]
    rounds = [line for line in lines if "event" not in line]
    errors = [line["aggregation_error"] for line in rounds]
    return {
        "rule": rule,
        "client_ranks": asked.ranks or "equal",
        "error_worst": float(f"{max(errors):.3g}"),
        "error_last": float(f"{errors[-1]:.3g}"),
        "eval_loss": round(final["eval_loss"], 4),
        "up_kib_per_round": round(statistics.mean(line["up_bytes"] for line in rounds) / 1024, 1),
        "down_kib_per_round": round(statistics.mean(line["down_bytes"] for line in rounds) / 1024, 1),
        "aggregate_ms": round(1e3 * statistics.median(seconds), 1),
    }


def main() -> None:
    """One line for each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=RULES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--ranks", default="")
    asked = parser.parse_args()
    for rule in asked.rules.split(","):
        print(json.dumps(measure(asked, rule)), flush=True)


if __name__ == "__main__":
    main()
