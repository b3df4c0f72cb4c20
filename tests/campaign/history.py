"""The checker: reads what every process of a run noted, and the run folder, and says what is wrong. It knows no launcher.

1. Rounds only grow, within a process and from one start of the job to the next, where the new one begins behind the last commit.
2. No update counts twice; each round stands once in metrics.jsonl; what counted was in the cohort and was added.
3. No acknowledged update is lost: what a header called durable is in the metrics, with the clients that it called counted.
4. Every rank holds the same adapter in each round, whatever start of the job it belongs to.
5. The run ends in the bytes of one that was left alone; where contributions were lost, of one that lost the same and nothing else.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

DEATHS = ("kill", "truncate", "reset")
COUNTED = 1  # fedmpi.round.Verdict, as it stands in a header
Event = Mapping[str, Any]
Lost = Mapping[str, Mapping[str, str]]  # by round and client, what kind of failure took its update: the bench tells them apart


@dataclass(frozen=True)
class History:
    """Everything that is known of one run."""

    processes: Sequence[Sequence[Event]]  # of each process, in its order
    metrics: Sequence[Event]

    @staticmethod
    def read(folder: Path) -> "History":
        """From the events' folder and the run folder; a last line cut short by a kill is left out."""
        told = (list(_lines(file)) for file in (folder / "events").glob("*.jsonl"))
        processes = sorted((events for events in told if events), key=lambda events: float(events[0]["t"]))
        return History(processes, list(_lines(folder / "run" / "metrics.jsonl")))

    @property
    def rounds(self) -> list[Event]:
        """The lines of committed rounds."""
        return [line for line in self.metrics if "event" not in line]

    def of(self, *kinds: str) -> list[Event]:
        """The events of these kinds, in the order of their time."""
        found = (event for process in self.processes for event in process if event["event"] in kinds)
        return sorted(found, key=lambda event: float(event["t"]))


def _lines(file: Path) -> Iterator[Event]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def faults_of(history: History, final: str, expected: str | None) -> list[str]:
    """Everything that is wrong, in words; nothing when all is well. The run should end in `expected`, where that is known."""
    rounds = history.rounds
    return [
        *_grow(history),
        *_kept(history),
        *_count_once(history, rounds),
        *_acknowledged(history, rounds),
        *_agree(history, rounds),
        *_end(rounds, final, expected),
    ]


def lost(history: History) -> tuple[Lost, bool]:
    """What did not arrive; and whether a round was repeated with another cohort."""
    kinds = {line["round"]: {client: why.partition(":")[0] for client, why in line["failures"].items()} for line in history.rounds}
    failed = {str(index): of_round for index, of_round in kinds.items() if of_round}
    return failed, any(line["attempt"] for line in history.rounds)


def costs(history: History) -> dict[str, Any]:
    """Seconds until others noticed a peer that is gone, or silent; until rounds went on after a death; and rounds done again."""
    gone, silent, again_s, redone = [], [], [], 0
    told = [e for e in history.of("fault", "lost", "begin", "round") if e["event"] in ("fault", "lost") or e["rank"] == 0]
    for number, fault in enumerate(told):
        if fault["event"] != "fault" or fault["kind"] not in (*DEATHS, "freeze"):
            continue
        later = list(takewhile(lambda e: e["event"] not in ("begin", "fault"), told[number + 1 :]))
        noticed = [e["t"] - fault["t"] for e in later if e["event"] == "lost" and e["rank"] != fault["rank"]]
        (silent if fault["kind"] == "freeze" else gone).extend(round(s, 3) for s in noticed[:1])
    for number, begin in enumerate(told):
        before = next((e for e in reversed(told[:number]) if e["event"] == "fault"), None)
        done = next((e["round"] for e in reversed(told[:number]) if e["event"] == "round"), -1)
        after = next((e for e in told[number:] if e["event"] in ("round", "fault")), None)
        if begin["event"] != "begin" or before is None or after is None or after["event"] == "fault":
            continue
        redone += max(0, done - after["round"] + 1)
        if before["kind"] in DEATHS:
            again_s.append(round(after["t"] - before["t"], 3))
    return {"gone_s": gone, "silent_s": silent, "resume_s": again_s, "redone": redone}


def _kept(history: History) -> Iterator[str]:
    """What was committed is not done again, unless its checkpoint was destroyed on disk."""
    safe, destroyed = -1, False
    for event in history.of("committed", "fault", "begin", "round"):
        if event["event"] == "committed":
            safe, destroyed = max(safe, event["round"]), False
        elif event["event"] == "fault":
            destroyed |= event["kind"] == "truncate"
        elif event["event"] == "round" and event["rank"] == 0 and event["round"] <= safe and not destroyed:
            yield f"round {event['round']} was begun again, though round {safe} had been committed"
        elif event["event"] == "round" and event["rank"] == 0 and destroyed:
            safe, destroyed = event["round"] - 1, False


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
    for process in history.processes:
        committed = [event["round"] for event in process if event["event"] == "committed"]
        if committed != sorted(set(committed)):
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


def _agree(history: History, rounds: Sequence[Event]) -> Iterator[str]:
    """The broadcast of a round is the same everywhere, at every start of the job that comes to it with the same past."""
    held = defaultdict(set)
    for events in _by_rank(history):
        past: tuple[tuple[int, ...], ...] | None = None  # who counted in each round before
        attempt = 0
        for event in events:
            if event["event"] == "round":
                attempt = event["attempt"]
                if past is None:
                    past = tuple(tuple(sorted(line["counted"])) for line in rounds if line["round"] < event["round"])
                elif event["verdict"] == COUNTED:
                    past = (*past, tuple(sorted(event["counted"])))
            if event["event"] == "holds":
                held[event["round"], attempt, past].add(event["sha"])
    for (round_index, attempt, _), shas in sorted(held.items()):
        if len(shas) > 1:
            yield f"round {round_index}, attempt {attempt}: {len(shas)} different adapters were held"


def _end(rounds: Sequence[Event], final: str, expected: str | None) -> Iterator[str]:
    if expected not in (None, final):
        yield f"the run ends in {final[:12]}, the same without faults (but for what it lost) in {str(expected)[:12]}"
    if any(line["train_loss"] != line["train_loss"] for line in rounds):
        yield "a round has a loss that is not a number"
