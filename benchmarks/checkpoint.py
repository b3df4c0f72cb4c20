"""For how long a checkpoint keeps training waiting: a 16 MiB adapter, a checkpoint in every round, beside rounds without one.

    python benchmarks/checkpoint.py [--bytes 16777216] [--rounds 40] [--round_s 0.5] [--folder DIR]

The rounds are the program's and its commits go where a run's go; a client's turn is a sleep of `--round_s`. Every second round is
committed, so that rounds beside a write and rounds without one take turns. Prints one JSON line: milliseconds for which training
stood still for a commit (`blocked_s` of metrics.jsonl), how long the slowest write took behind it, and both kinds of rounds.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import ranks

from fedmpi import aggregation
from fedmpi.federation.updates import Update
from fedmpi.record.commits import Commits
from fedmpi.record.folder import RunFolder, read_metrics

WARM_UP = 2


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """All of it in one process: links have nothing to do with it."""
    fed = ranks.federation(None, 1, WARM_UP + asked.rounds)
    client = ranks.Client(0, ranks.adapter(asked.bytes, seed=1))
    held, rounds, run = ranks.adapter(asked.bytes, seed=0), fed.rounds(), RunFolder(folder, "benchmark", keep=2)
    seconds: dict[bool, list[float]] = {True: [], False: []}

    def turn(one: ranks.Client) -> Update:
        time.sleep(asked.round_s)
        return ranks.update(replace(one, tensors={name: tensor.clone() for name, tensor in one.tensors.items()}))

    with Commits(run, lambda _: None) as commits:
        for index in range(WARM_UP + asked.rounds):
            began, rnd = time.perf_counter(), next(rounds)
            fed.broadcast(held)
            held = aggregation.exact_mean(fed.gather(rnd, {0: client}, turn), rnd.scale)
            if index % 2:
                run.pending.append({"round": index})
                commits.begin(index, held, {}, {})
            if index >= WARM_UP:
                seconds[bool((index - 1) % 2)].append(time.perf_counter() - began)  # what is written behind a round slows the next
    blocked = sorted(1e3 * line["blocked_s"] for line in read_metrics(folder) if line["round"] >= WARM_UP)
    ranks.show(
        {
            "bytes": asked.bytes,
            "commits": len(blocked),
            "blocked_ms": {"median": statistics.median(blocked), "p95": blocked[int(0.95 * len(blocked))], "most": blocked[-1]},
            "slowest_write_ms": 1e3 * commits.slowest_s,
            "round_ms_while_writing": 1e3 * statistics.median(seconds[True]),
            "round_ms": 1e3 * statistics.median(seconds[False]),
            "load": Path("/proc/loadavg").read_text().split()[0],
        }
    )


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--round_s", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, help="on the disk in question; default a temporary folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        measure(asked, Path(folder))


if __name__ == "__main__":
    main()
