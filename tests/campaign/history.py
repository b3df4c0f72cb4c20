"""The checker: reads what every process of a run noted, and the run folder, and says what is wrong. It knows no launcher.

1. Rounds only grow, within a process and from one start of the job to the next, where the new one begins behind the last commit.
2. No update counts twice; each round stands once in metrics.jsonl; what counted was in the cohort and was added.
3. No acknowledged update is lost: what a header called durable is in the metrics, with the clients that it called counted.
4. Every rank holds the same adapter in each round.
5. What was committed is what the next round begins with; where no contribution was lost, the run ends in the undisturbed bytes.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

COUNTED = 1  # fedmpi.round.Verdict, as it stands in a header
Event = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """Everything that is known of one run."""

    processes: Sequence[Sequence[Event]]  # of each process, in its order
    metrics: Sequence[Event]
    final: str  # digest of the adapter's file

    @staticmethod
    def read(folder: Path, final: str) -> "History":
        """From the events' folder and the run folder; a last line cut short by a kill is left out."""
        files = sorted((folder / "events").glob("*.jsonl"))
        return History([list(_lines(file)) for file in files], list(_lines(folder / "run" / "metrics.jsonl")), final)


def _lines(file: Path) -> Iterator[Event]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def faults_of(history: History, undisturbed: str) -> list[str]:
    """Everything that is wrong, in words; nothing when all is well."""
    rounds = [line for line in history.metrics if "event" not in line]
    return [
        *_grow(history),
        *_count_once(history, rounds),
        *_acknowledged(history, rounds),
        *_agree(history),
        *_end(history, rounds, undisturbed),
    ]


def _by_rank(history: History) -> Iterator[list[Event]]:
    """The events of each rank in each process: ranks that are threads share one."""
    for process in history.processes:
        ranks = defaultdict(list)
        for event in process:
            ranks[event["rank"]].append(event)
        yield from ranks.values()


def _grow(history: History) -> Iterator[str]:
    for events in _by_rank(history):
        met = [(event["round"], event["attempt"]) for event in events if event["event"] == "round"]
        if any(after <= before for before, after in pairwise(met)):
            yield f"rank {events[0]['rank']} met rounds {met}: they must grow"
    committed = [event["round"] for process in history.processes for event in process if event["event"] == "committed"]
    if committed != sorted(committed):
        yield f"rounds were committed in the order {committed}"


def _count_once(history: History, rounds: Sequence[Event]) -> Iterator[str]:
    numbers = [line["round"] for line in rounds]
    if numbers != list(range(len(numbers))):
        yield f"metrics.jsonl tells of rounds {numbers}: each once, in order, none missing"
    added = defaultdict(set)
    for process in history.processes:
        for event in process:
            if event["event"] == "added":
                added[event["round"]].add(event["client"])
    for line in rounds:
        counted = line["counted"]
        if len(set(counted)) != len(counted) or not set(counted) <= set(line["cohort"]):
            yield f"round {line['round']}: {counted} counted of the cohort {line['cohort']}"
        if not set(counted) <= added[line["round"]]:
            yield f"round {line['round']}: {counted} counted, {sorted(added[line['round']])} were added"


def _acknowledged(history: History, rounds: Sequence[Event]) -> Iterator[str]:
    """A header that calls its predecessor counted and durable is a promise to the clients."""
    there = {line["round"]: sorted(line["counted"]) for line in rounds}
    for process in history.processes:
        for event in process:
            settled = event["round"] - 1
            if event["event"] != "round" or event["verdict"] != COUNTED or event["durable"] < settled:
                continue
            if there.get(settled) != sorted(event["counted"]):
                told, found = event["counted"], there.get(settled)
                yield f"rank {event['rank']} was told that {told} count in round {settled}, the metrics say {found}"


def _agree(history: History) -> Iterator[str]:
    """The broadcast of a round is the same everywhere, at every start of the job that comes to it with the same past."""
    held = defaultdict(set)
    attempt = 0
    for process in history.processes:
        for event in process:
            if event["event"] == "round":
                attempt = event["attempt"]
            if event["event"] == "holds":
                held[event["round"], attempt].add(event["sha"])
    for (round_index, attempt), shas in sorted(held.items()):
        if len(shas) > 1:
            yield f"round {round_index}, attempt {attempt}: {len(shas)} different adapters were held"


def _end(history: History, rounds: Sequence[Event], undisturbed: str) -> Iterator[str]:
    lost = [line["round"] for line in rounds if line["failures"] or line["attempt"]]
    if not lost and history.final != undisturbed:
        yield f"no contribution was lost, and yet the run ends in {history.final[:12]}, undisturbed in {undisturbed[:12]}"
    if any(line["train_loss"] != line["train_loss"] for line in rounds):
        yield "a round has a loss that is not a number"
