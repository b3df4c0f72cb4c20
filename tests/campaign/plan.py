"""What the campaign will do: runs with a few faults each, drawn from a seed so that every possible cell comes up."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.campaign.faults import CLIENT, PHASES, Fault, possible

NUM_ROUNDS, NUM_RANKS = 4, 3
MOST_PER_RUN = 3


@dataclass(frozen=True)
class Planned:
    """One run: how it is started and what will go wrong in it."""

    number: int
    launcher: str
    faults: tuple[Fault, ...]


def plan(num_faults: int, seed: int, launchers: Sequence[str]) -> list[Planned]:
    """Runs with `num_faults` faults in all. Each launcher goes through all its cells, over and over."""
    rng = random.Random(seed)
    cells = {launcher: _cells(launcher, rng) for launcher in launchers}
    planned: list[Planned] = []
    left = num_faults
    for number, launcher in zip(itertools.count(), itertools.cycle(launchers), strict=False):
        if left <= 0:
            return planned
        drawn = [next(cells[launcher]) for _ in range(min(left, rng.randint(1, MOST_PER_RUN)))]
        faults = tuple(dict.fromkeys(_place(kind, phase, rng) for kind, phase in drawn))
        planned.append(Planned(number, launcher, faults))
        left -= len(faults)
    raise AssertionError("the cycle has no end")


def _cells(launcher: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    all_of_them = [(kind, phase) for kind, phases in PHASES.items() for phase in phases if possible(kind, launcher)]
    while True:
        rng.shuffle(all_of_them)
        yield from all_of_them


def _place(kind: str, phase: str, rng: random.Random) -> Fault:
    """In any round; a checkpoint can only be cut where another stands before it, and the last round has no next one."""
    first = 1 if kind == "truncate" else 0
    rank = rng.randint(1, NUM_RANKS - 1) if phase in CLIENT else 0
    return Fault(kind, phase, rng.randint(first, NUM_ROUNDS - 2), rank)
