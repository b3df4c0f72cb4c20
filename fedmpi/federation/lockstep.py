"""Rounds, broadcast, gather: every rank makes the same calls in the same order.

Who leads is decided once, at construction: the rank that holds a Conductor is the server, and a process without links is server and
clients at once. This module must never know what is trained, or how.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedmpi.aggregation import Check
from fedmpi.codecs import Chains
from fedmpi.errors import ProtocolError
from fedmpi.federation import scores
from fedmpi.federation.arrivals import Arrivals, Tally
from fedmpi.federation.coding import Downlink
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.ground import Ground, Levelling
from fedmpi.federation.joint import Added, Joint
from fedmpi.federation.known import Known
from fedmpi.federation.meeting import About, Meeting
from fedmpi.federation.moved import Moved
from fedmpi.federation.outbox import Outbox
from fedmpi.federation.owned import Owned
from fedmpi.federation.post import Post, content
from fedmpi.federation.roll import Roll
from fedmpi.federation.spread import Spread
from fedmpi.federation.sums import Answers, Own, Terms, send
from fedmpi.federation.turns import C, Turns, hand_in, overtaken
from fedmpi.federation.updates import Failure, Outcome, Update, Vault
from fedmpi.ledger import Ledger
from fedmpi.messages import Kind
from fedmpi.round import SERVER, End, Placement, Round, Verdict
from fedmpi.tensors import Tensors, num_bytes
from fedmpi.transports.inbox import Message


@dataclass
class Federation:
    """One run's view of the world from one rank."""

    placement: Placement
    rank: int = SERVER
    post: Post | None = None  # None: this process is the whole world
    conductor: Conductor | None = None  # held by the server alone
    vault: Vault | None = None
    scratch: Path | None = None  # of the server; None is the system's
    device: str = "cpu"  # where clients that live here compute
    near: str | None = None  # host:port of something that every rank can reach, where there is one
    ground: Ground | None = None  # what each process holds once and the server may change
    up: Chains = field(default_factory=Chains)  # what updates are coded by
    down: Chains = field(default_factory=Chains)  # and broadcasts
    halves: bool = False  # rounds move a part of what is broadcast, and who had the broadcast before is sent that part alone
    terms: Terms | None = None  # where ranks add up what their own clients made
    collective: bool = False  # and the sums of all ranks, like broadcasts, go by collectives
    supplied: Callable[[int, Mapping[str, Any]], int] | None = None  # gives a rank what it cannot read for itself; the bytes of it
    answer: scores.Answer | None = None  # how clients that live here score what the server asks about, on rows of their own
    goes_on: bool = False  # without ranks that are gone
    patience_s: float | None = None  # a turn without a step for so long is stuck
    meanwhile: Callable[[], None] | None = None  # on the server: to be done once, while the clients of the next round train
    outcome: Outcome = field(default_factory=Outcome)
    ledger: Ledger = field(default_factory=Ledger)
    _now: Round | None = None

    def __post_init__(self) -> None:
        self._meeting = Meeting(self.placement, self.rank, self.post, self.near, self.device)
        self._owned = Owned(self.vault, self._meeting.leads)
        self._turns = Turns(self._meeting, self._owned, self.up, self.device, self.patience_s)
        self._joint = Joint(self.post, self.placement, self.ledger) if self.collective and self.post is not None else None
        self.downlink = Downlink(self.down, scratch=self.scratch)
        self._sent: Tensors = {}  # the round's broadcast, where updates are compared with it
        self._standing: dict[int, str] = {}  # on the server: which state of each client counts, by digest
        self._held: Tensors = {}  # the last broadcast that came here, where the next one may stand on it
        self.roll = Roll(self.placement, self.post, self.ledger, self.goes_on) if self.post and self.rank == SERVER else None
        moved = Moved() if self.halves and self.down.raw and self._joint is None else None
        levelling = Levelling(self.ground, self.placement) if self.ground is not None else None
        self._spread = Spread(self.placement, self.ledger, self.downlink, self.post, self.roll, levelling, moved)

    # ---- what an algorithm calls ----------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[Round]:
        """The rounds that the server announces. Reading a header settles the round before; the last header ends the loop."""
        while True:
            rnd, failures = self._announce(self.conductor) if self.conductor is not None else (self._follow(), {})
            self._owned.settle(rnd)
            self.downlink.settle(rnd)
            self._standing |= self.outcome.owned if rnd.verdict is Verdict.COUNTED else {}
            self._now, self.outcome = rnd, Outcome(failures=failures)
            if rnd.end:
                return
            yield rnd

    def broadcast(self, tensors: Tensors | None) -> Tensors:
        """The server's tensors, as every receiver decodes them. A rank without a client in the cohort gets nothing."""
        rnd = self._now
        if rnd is None:
            raise RuntimeError("no round has begun: call this inside `for rnd in fed.rounds()`")
        began, self._sent = time.monotonic(), {}
        if self._joint is not None:
            sent = self._joint.receive(rnd) if tensors is None else self._joint.spread(rnd, tensors)
        elif tensors is not None:
            sent = self._spread.send(rnd, tensors)
        elif self.post is None or not self._hosted_in(rnd):
            return {}
        else:
            sent = self._received(rnd, self.post)
        self._sent = sent if self.up.delta or self.terms is not None else {}
        self.outcome.broadcast_s += time.monotonic() - began
        return sent

    def _received(self, rnd: Round, post: Post) -> Tensors:
        """The round's broadcast on a client's rank; a leader passes it on to its members."""
        message = self._next(post, f"waiting for the broadcast of round {rnd.index}")
        received = None
        if message.header.kind is Kind.CODED:
            post.expected(message, Kind.CODED, rnd.index)
            received = post.decode(message, self.down, Known(self._held), f"receiving the broadcast of round {rnd.index}")
        else:
            post.expected(message, Kind.BROADCAST, rnd.index)
            received = post.keep(message) if self._meeting.leads else None
        message.release()
        if received is not None and self._spread.moved is not None:
            received = {**self._held, **received}
        self._held = received if received is not None and (self.down.delta or self._spread.moved is not None) else {}
        if self._meeting.inner is not None:
            return self._meeting.inner.share(received)
        assert received is not None
        return received

    def gather(
        self,
        rnd: Round,
        clients: Mapping[int, C],
        work: Callable[[C], Update],
        check: Check | None = None,
    ) -> Iterable[Update]:
        """Run `work` for each client of the cohort that lives here; on the server, give the updates of all in arrival order, once.

        The server's `check` sees each update, or each piece of it, before anybody else does: one at which it raises a TrainingError
        is a Failure. The exact mean takes the updates from the links in pieces; who iterates gets them whole.
        """
        outcomes = (self._turn(rnd, clients[client], work) for client in self._hosted_in(rnd))
        if self.conductor is not None:
            self._do_meanwhile()
        if self.terms is not None and self.post is not None:
            return self._reduced(rnd, outcomes, self.terms, self.post)
        if self.conductor is not None:
            tally = Tally(rnd, self.conductor, self.outcome, self.ledger, check, self._spread.leaving)
            if self.post is None:
                return tally.judged(map(self._turns.settled, outcomes))
            assert self.roll is not None
            return Arrivals(self.roll, tally, self.up, self._sent)
        assert self.post is not None
        self._hand_in(rnd, outcomes, self.post)  # now, not lazily: a client rank never reads what it gathered
        return ()

    def _hand_in(self, rnd: Round, outcomes: Iterable[Update | Failure], post: Post) -> None:
        """Each update leaves while the next client trains; the last one has nothing to hide behind."""
        left, outbox = len(self._hosted_in(rnd)), Outbox(post)
        for outcome in outcomes:
            left, hidden_s = left - 1, outbox.wait()
            if not self._meeting.leads:
                self._turns.settled(outcome)
                continue
            if isinstance(outcome, Update) and hidden_s:
                outcome = replace(outcome, metrics={**outcome.metrics, "hidden_s": hidden_s})
            if left:
                outbox.put(partial(hand_in, post, rnd, outcome, self._turns.sealed))
            else:
                hand_in(post, rnd, outcome, self._turns.sealed)

    def _reduced(self, rnd: Round, outcomes: Iterable[Update | Failure], terms: Terms, post: Post) -> Iterable[Update]:
        """Each rank adds up what its own clients made, and looks at it before; the server gets the sums, for an exact mean."""
        if self.conductor is not None:
            tally = Tally(rnd, self.conductor, self.outcome, self.ledger, leaving=self._spread.leaving)
            return Added(Answers(post, self.placement, tally, self._sent), self._joint)
        own = Own(terms, rnd, terms.check(self._sent, rnd))
        own.hand_in(post, map(self._turns.settled, outcomes))
        if self._joint is not None:
            self._joint.hand_in(rnd, own)
        else:
            send(post, rnd, own)
        return ()

    def _do_meanwhile(self) -> None:
        """Clients train now: time for what the server has put off."""
        began, todo = time.monotonic(), self.meanwhile
        self.meanwhile = None
        if todo is not None:
            todo()
        self.outcome.meanwhile_s = time.monotonic() - began

    def _turn(self, rnd: Round, client: C, work: Callable[[C], Update]) -> Update | Failure:
        if self.post is not None and self._meeting.inner is None and overtaken(self.post):
            return Failure(client.id, "Late", f"round {rnd.index} went on without rank {self.rank}")
        return self._turns.take(rnd, client, work, self._sent)

    @property
    def end(self) -> End:
        """Why no round follows; NO while one does."""
        return self._now.end if self._now is not None else End.NO

    def measure(self, tensors: Tensors) -> scores.Figures:
        """The server asks between rounds: each client's figures of these tensors, on rows that do not leave their ranks."""
        assert self.answer is not None
        if self.post is None:
            return self.answer(tensors)
        assert self.roll is not None
        asked = self.roll.leaders
        self._spread.level({leader: self.placement.hosted_by(leader)[0] for leader in asked}, -1)
        self.ledger.asked_bytes += num_bytes(tensors) * len(asked)
        return scores.ask(self.roll, asked, tensors)

    # ---- before the first round and after the last ----------------------------------------------------------------------------

    def greet(self, experiment: str, num_examples: Mapping[int, int], about: About | None = None) -> dict[int, int]:
        """The clients' sizes, on the server, from leaders that are here for the same experiment."""
        return self._meeting.greet(experiment, num_examples, about or {})

    @property
    def about(self) -> About:
        """On the server, once it has greeted: what leaders told of their clients besides."""
        return self._meeting.about

    def welcome(self, owned: Mapping[int, str], limit_bytes: int) -> None:
        """The server says where the run stands; each rank takes up the client-owned state that the last durable round names."""
        named = self._meeting.welcome(owned, limit_bytes)
        if self.roll is not None:
            self._standing = dict(owned)
            self.roll.begin(self._readmit)
        self._owned.resume(named, self.placement.hosted_by(self.rank))
        if self._joint is not None:
            self._joint.meet()

    def _readmit(self, peer: int, greeting: Message) -> bool:
        """A rank that joins anew: it has the state that counts now from its files, and from the server whatever else it misses.

        One that asks for a model first is given it, and greets again when it has all.
        """
        assert self.post is not None and self.roll is not None
        said = self.post.json(self.post.expected(greeting, Kind.HELLO, -1))
        if "examples" not in said and self.supplied is not None:
            given = self.supplied(peer, said)
            self.ledger.supplied(given)
            self.roll.note(event="supply", rank=peer, supply_bytes=given)
            return False
        self._meeting.readmit(peer, said, self._standing, self.post)
        self._spread.forget(peer)
        return True

    def farewell(self) -> None:
        """Nobody leaves before what was sent and what was received are found equal."""
        self._meeting.farewell(self.roll)
        if self._joint is not None:
            self._joint.leave()

    def close_books(self) -> dict[str, int]:
        """The bytes of the round: what carried tensors, and everything else as control bytes."""
        return self.ledger.close_round(self.post.num_bytes() if self.post is not None else 0)

    # ---- rounds ---------------------------------------------------------------------------------------------------------------

    def _announce(self, conductor: Conductor) -> tuple[Round, dict[int, Failure]]:
        """The next round, and who of those that were drawn for it cannot be asked."""
        if self.roll is None:
            return conductor.next_round(), {}
        absent = self.roll.assemble(conductor.min_clients)
        rnd = conductor.next_round(absent)
        self.roll.post.send_bytes(self.roll.here, Kind.ROUND, rnd.pack(), rnd.index)
        return rnd, {client: absent[client] for client in conductor.drawn if client in absent}

    def _follow(self) -> Round:
        assert self.post is not None
        message = self._next(self.post, "waiting for the next round")
        while message.header.kind is Kind.QUESTION and self.answer is not None:
            scores.reply(self.post, message, self.answer)
            message = self._next(self.post, "waiting for the next round")
        if message.header.kind is not Kind.ROUND:
            raise ProtocolError(f"rank {SERVER} sent {message.header.kind.name}, expected a round header")
        return Round.unpack(content(message), len(self.placement.leader_of))

    def _next(self, post: Post, phase: str) -> Message:
        """The server's next message. What it has changed in the base since this rank last took part comes before it."""
        message = post.receive({SERVER}, phase)
        while message.header.kind is Kind.FOLD and self.ground is not None:
            missed = post.keep(message) if self._meeting.leads else None
            message.release()
            inner = self._meeting.inner
            self.ground.catch_up(inner.share(missed) if inner is not None else missed or {})
            message = post.receive({SERVER}, phase)
        return message

    def _hosted_in(self, rnd: Round) -> list[int]:
        hosted = set(self.placement.hosted_by(self.rank))
        return [client for client in rnd.cohort if client in hosted]
