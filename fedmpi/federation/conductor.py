"""The server's decisions: who takes part, whether a round counted, when to stop. Pure state; it never sends, trains or stores."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fedmpi.aggregation import grid_scale
from fedmpi.errors import QuorumLost
from fedmpi.federation.bench import Bench
from fedmpi.round import End, Round, Verdict, sample
from fedmpi.seeding import seed_for

MOST_ATTEMPTS = 4


@dataclass
class Conductor:
    """Holds what the next round header needs to know."""

    num_examples: Sequence[int]  # by client, as declared at the start
    rounds: int
    seed: int
    cohort_size: int
    sampling: str = "uniform"
    weights: str = "examples"
    min_clients: int = 1
    on_quorum_lost: str = "repeat"
    close_share: float | None = None  # of a cohort's updates; with them a round is closed
    first_round: int = 0
    largest: float = 1.0  # largest magnitude in the adapter that the next round starts from
    durable: int = -1
    end: End = End.NO  # set to end the run before its last round
    bench: Bench = field(default_factory=Bench)
    benched: tuple[int, ...] = ()  # who sits out the round
    drawn: tuple[int, ...] = ()  # who would be asked in the round if everybody could be
    _last: Round | None = None
    _verdict: Verdict = Verdict.NONE
    _counted: tuple[int, ...] = field(default=())

    def next_round(self, absent: Collection[int] = ()) -> Round:
        """The header of the next round, or the last header of the run. Who is absent is not asked."""
        index, attempt = self.first_round, 0
        if self._last is not None and self._verdict is Verdict.REPEAT:
            index, attempt = self._last.index, self._last.attempt + 1
        elif self._last is not None:
            index = self._last.index + 1
        end = self.end if self.end or index < self.rounds else End.FINISHED
        self.drawn = () if end else self._draw(index, attempt)
        cohort = tuple(client for client in self.drawn if client not in absent)
        self._last = Round(
            index=index,
            attempt=attempt,
            cohort=cohort,
            seed=seed_for(self.seed, "round", index, attempt),
            scale=grid_scale(sum(self.most(client) for client in cohort), self.largest),
            num_clients=len(self.num_examples),
            verdict=self._verdict,
            counted=self._counted,
            durable=self.durable,
            end=end,
        )
        self._verdict, self._counted = Verdict.NONE, ()
        return self._last

    def _draw(self, index: int, attempt: int) -> tuple[int, ...]:
        """The bench counts for as long as enough are left to count a round."""
        draw = partial(sample, self.sampling, self.cohort_size, self.num_examples, self.seed, index, attempt)
        self.benched = self.bench.sitting(index)
        drawn = draw(self.benched)
        if len(drawn) < self.min_clients:
            self.benched, drawn = (), draw()
        return drawn

    def enough(self, rnd: Round, num_counted: int) -> bool:
        """Whether a round is closed with so many updates."""
        return self.close_share is not None and num_counted >= max(self.min_clients, math.ceil(self.close_share * len(rnd.cohort)))

    def most(self, client: int) -> int:
        """The most that an update of this client may weigh."""
        return 1 if self.weights == "equal" else self.num_examples[client]

    def weight(self, client: int, processed: float) -> int:
        """What an update weighs. Identity and size come from the start of the run, never from the update."""
        return weight_of(self.weights, self.num_examples[client], processed)

    def judge(self, rnd: Round, counted: Sequence[int], failures: Mapping[int, str]) -> None:
        """The verdict on a round whose updates are all in; too few of them are a QuorumLost."""
        if len(counted) >= self.min_clients:
            self.bench.note(rnd.index, counted, failures)
            self._verdict, self._counted = Verdict.COUNTED, tuple(sorted(counted))
            return
        self._verdict, self._counted = Verdict.REPEAT, ()
        alike: dict[str, list[int]] = {}
        for client, why in sorted(failures.items()):
            alike.setdefault(why, []).append(client)
        reasons = "; ".join(f"client {', '.join(map(str, clients))}: {why}" for why, clients in alike.items())
        problem = f"round {rnd.index}: {len(counted)} updates of {len(self.drawn)}, --min_clients is {self.min_clients} ({reasons})"
        if self.on_quorum_lost == "stop" or rnd.attempt + 1 >= MOST_ATTEMPTS:
            self.end = End.GIVEN_UP
            raise QuorumLost(f"{problem}; the run stops after attempt {rnd.attempt + 1}")
        raise QuorumLost(f"{problem}; the round is repeated")


def weight_of(weights: str, num_examples: int, processed: float) -> int:
    """What the update of a client of this size weighs."""
    if weights == "processed":
        return max(1, min(int(processed), num_examples))
    return 1 if weights == "equal" else num_examples
