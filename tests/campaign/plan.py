"""What the campaign will do: runs with several faults each, drawn from a seed so that every possible cell comes up."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.campaign.faults import CLIENT, PHASES, Fault

NUM_ROUNDS, NUM_RANKS = 8, 3
MOST_PER_RUN = 8
LOSSY = ("exception", "hang", "memory", "nan")  # a client's part of a round is lost


@dataclass(frozen=True)
class Planned:
    """One run: how it is started and what will go wrong in it."""

    number: int
    launcher: str
    faults: tuple[Fault, ...]


def plan(num_faults: int, seed: int, shares: Mapping[str, int], num_rounds: int = NUM_ROUNDS) -> list[Planned]:
    """Runs with `num_faults` faults in all, launchers by their shares. Each goes through all its cells, over and over."""
    rng = random.Random(seed)
    cells = {launcher: _cells(rng) for launcher in shares}
    planned: list[Planned] = []
    left = num_faults
    turns: Sequence[str] = [launcher for launcher, share in shares.items() for _ in range(share)]
    for number, launcher in zip(itertools.count(), itertools.cycle(turns), strict=False):
        if left <= 0:
            return planned
        drawn = [next(cells[launcher]) for _ in range(min(left, MOST_PER_RUN))]
        faults = tuple(dict.fromkeys(_place(kind, phase, rng, num_rounds) for kind, phase in drawn))
        planned.append(Planned(number, launcher, faults))
        left -= len(faults)
    raise AssertionError("the cycle has no end")


def _cells(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Cells in which nothing is lost come in blocks of their own: a run without a loss must end in the undisturbed bytes."""
    while True:
        halves = [[(kind, p) for kind, phases in PHASES.items() for p in phases if (kind in LOSSY) == lossy] for lossy in (0, 1)]
        for half in halves:
            rng.shuffle(half)
            yield from half


def _place(kind: str, phase: str, rng: random.Random, num_rounds: int) -> Fault:
    """In any round; a checkpoint can only be cut where another stands before it, and the last round has no next one."""
    first = 1 if kind == "truncate" else 0
    rank = rng.randint(1, NUM_RANKS - 1) if phase in CLIENT else 0
    return Fault(kind, phase, rng.randint(first, num_rounds - 2), rank)
