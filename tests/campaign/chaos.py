"""The chaos run: every half minute one of eight clients' ranks is killed, for half an hour, beside the same run left alone.

    python -m tests.campaign.chaos --minutes 30 --faults 62 --seed 1 --out chaos

A step is a sleep and little else, so that two cores are not the limit; both runs go at the same time, so that what else the machine
does is done to both. A rank that was killed is started again at once, as a launcher would, from a process that has imported what
it needs. What is compared is how many updates counted. The record is OUT/chaos.json.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmpi.training import Hook
from tests.campaign import jobs

NUM_CLIENTS, NEVER = 8, 1_000_000
STEP_S, DEADLINE_S, GRACE_S = 2.0, 10.0, 60.0


class Pace(Hook):
    """Gives steps their duration."""

    def before_step(self, step: Any) -> None:
        time.sleep(STEP_S)


@dataclass
class Run:
    """One federation of nine processes."""

    folder: Path
    arguments: list[str]
    port: int
    ranks: dict[int, int] = field(default_factory=dict)  # process by rank

    def start(self, rank: int) -> None:
        """Start a rank, or start it again."""
        self.ranks[rank] = jobs.forked(lambda: self._be(rank), self.folder, f"rank-{rank}.txt")

    def _be(self, rank: int) -> int:
        from fedmpi.run import main as program

        place = {"RANK": rank, "WORLD_SIZE": NUM_CLIENTS + 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
        os.environ.update({name: str(value) for name, value in place.items()})
        return program(self.arguments)

    def lines(self) -> list[dict[str, Any]]:
        """Its record so far."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    def told(self) -> dict[str, int]:
        """What it came to."""
        lines = self.lines()
        rounds = [line for line in lines if "counted" in line]
        lost, back = (sum(line.get("event") == event for line in lines) for event in ("rank_lost", "rank_back"))
        return {"rounds": len(rounds), "updates": sum(len(line["counted"]) for line in rounds), "lost": lost, "back": back}


def begun(name: str, out: Path, arguments: list[str]) -> Run:
    """A run in a folder of its own."""
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = Run(out / name, arguments, port)
    for rank in range(NUM_CLIENTS + 1):
        run.start(rank)
    return run


def chaos(runs: dict[str, Run], due: list[float], rng: random.Random) -> int:
    """Kill until nobody is left to be killed at the given times; start again who was killed; until both servers have ended."""
    disturbed, killed = runs["chaos"], 0
    servers = {run.ranks[0] for run in runs.values()}
    while servers:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            servers.discard(ended[0])
            rank = next((rank for rank, process in disturbed.ranks.items() if process == ended[0]), 0)
            if rank and disturbed.ranks[0] in servers:
                disturbed.start(rank)
        if due and time.monotonic() > due[0]:
            due.pop(0)
            killed += 1
            os.kill(disturbed.ranks[rng.randint(1, NUM_CLIENTS)], signal.SIGKILL)
        time.sleep(0.02)
    return killed


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.chaos")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--faults", type=int, default=62)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("chaos"))
    asked = parser.parse_args()
    out, span_s = asked.out.resolve(), 60 * asked.minutes
    options = {
        "train.steps": 1,
        "eval_every": 0,
        "on_rank_lost": "continue",
        "time_left_s": span_s,
        "train.hooks": "[tests.campaign.chaos.Pace]",
    }
    arguments = [
        *jobs.Jobs(0, 0, NEVER, NUM_CLIENTS, DEADLINE_S).arguments,
        *(f"--{key}={value}" for key, value in options.items()),
    ]
    if not (out / "model").exists():
        jobs.in_a_fork(lambda: jobs.write_inputs(out))
    jobs.warm_up(out, arguments)
    rng = random.Random(asked.seed)
    runs = {name: begun(name, out, arguments) for name in ("calm", "chaos")}
    while not all(run.lines() for run in runs.values()):
        time.sleep(0.1)
    now, every_s = time.monotonic(), (span_s - GRACE_S) / asked.faults
    killed = chaos(runs, [now + every_s * (number + rng.random()) for number in range(asked.faults)], rng)
    told = {name: run.told() for name, run in runs.items()}
    share = told["chaos"]["updates"] / told["calm"]["updates"]
    record = {
        "minutes": asked.minutes,
        "clients": NUM_CLIENTS,
        "step_s": STEP_S,
        "killed": killed,
        **told,
        "share": round(share, 4),
    }
    (out / "chaos.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
