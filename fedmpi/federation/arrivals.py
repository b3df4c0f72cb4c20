"""What the server receives in a round: updates and failures as they come; when every client has answered, the verdict.

It is read once, in one of two ways. Who iterates gets whole updates, each of which stays as it is until the next is asked for.
`pieces` gives elements as they arrive, those of several clients in turn, so that a server holds a few chunks beside its sums; what
comes before the first of the two is asked for comes as the round before had it.

Every update is checked on its way, whole or piece by piece; the first wrong piece makes it void, and its client a Failure. So does
a link that breaks inside an update, where the run goes on without that rank; else it raises out of both. An update counts when its
last piece was taken.

This module must never know what is done with updates.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from fedmpi.aggregation.check import Check, Look, whole
from fedmpi.aggregation.pieces import Piece, Void
from fedmpi.codecs import Chains
from fedmpi.errors import ProtocolError, TrainingError
from fedmpi.federation.coding import Decoding
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.known import Known
from fedmpi.federation.post import decoded
from fedmpi.federation.roll import Roll
from fedmpi.federation.updates import Failure, Outcome, Update
from fedmpi.ledger import Ledger
from fedmpi.manifest import unpack
from fedmpi.messages import Kind
from fedmpi.round import Round
from fedmpi.tensors import Tensors, room
from fedmpi.transports.inbox import Message

T = TypeVar("T")
MOST_WHOLE = 2  # updates that are put together at a time; the others wait on their links


@dataclass
class Tally:
    """The server's books of one round."""

    rnd: Round
    conductor: Conductor
    outcome: Outcome
    ledger: Ledger
    check: Check | None = None
    leaving: Callable[[], None] | None = None  # waits for the end of the broadcast
    began: float = field(default_factory=time.monotonic)

    def judged(self, outcomes: Iterable[Update | Failure]) -> Iterator[Update]:
        """Updates with their weights; failures go to the record; the end of the updates is the verdict."""
        for outcome in outcomes:
            if isinstance(outcome, Update):
                self.ledger.up[outcome.client] += outcome.num_bytes
            checked = self._passed(outcome) if isinstance(outcome, Update) else outcome
            if isinstance(checked, Failure):
                self.fail(checked)
                continue
            update = self.weighed(checked)
            self.outcome.note(update)
            yield update
        self.close()

    def _passed(self, update: Update) -> Update | Failure:
        """The update, or why it is none."""
        try:
            if self.check is not None:
                whole(self.check(update.client, update.tensors), update.tensors)
        except TrainingError as error:
            return failure(update.client, error)
        return update

    def fail(self, failure: Failure) -> None:
        """A client has no update."""
        self.outcome.failures[failure.client] = failure

    def weighed(self, update: Update) -> Update:
        """The update with its weight, which the server gives."""
        return replace(update, weight=self.conductor.weight(update.client, update.metrics.get("examples", 0.0)))

    def close(self) -> None:
        """Every client has answered: the verdict. What is summed over clients later must not depend on who came first."""
        outcome = self.outcome
        if self.leaving is not None:
            self.leaving()
        outcome.gather_s = time.monotonic() - self.began
        outcome.metrics = dict(sorted(outcome.metrics.items()))
        self.conductor.judge(self.rnd, outcome.counted, {c: str(f) for c, f in outcome.failures.items()})


def failure(client: int, error: TrainingError) -> Failure:
    """An update that was refused."""
    return Failure(client, type(error).__name__, str(error))


@dataclass
class Begun:
    """An update of which part has come."""

    update: Update  # without tensors
    look: Look | None = None
    refused: Failure | None = None
    decoding: Decoding | None = None  # of what is coded
    num_bytes: int = 0  # on the link so far


@dataclass
class Arrivals:
    """The answers of a cohort over the links."""

    roll: Roll
    tally: Tally
    up: Chains = field(default_factory=Chains)
    sent: Tensors = field(default_factory=dict)  # the round's broadcast
    _missing: set[int] = field(default_factory=set)
    _begun: dict[int, Begun] = field(default_factory=dict)  # by client

    def __post_init__(self) -> None:
        self.post, self.placement = self.roll.post, self.roll.placement

    def __iter__(self) -> Iterator[Update]:
        self.post.transport.in_chunks = frozenset()
        return self.tally.judged(self._whole())

    def pieces(self) -> Iterator[Piece | Void]:
        """All pieces of all updates; at the end, the verdict."""
        self.post.transport.in_chunks = frozenset({Kind.UPDATE})
        for message in self._answers({}):
            if isinstance(message, Failure):
                if self._begun.pop(message.client, None) is not None:  # its rank was lost in the middle
                    yield Void(message.client)
                self.tally.fail(message)
                continue
            begun = self._part_of(message)
            if message.header.kind is not Kind.SEAL:
                yield from self._pieces(begun, message)
            ends = self._ends(message)
            message.release()  # the consumer has asked for the next one: it is done with this
            if ends:
                self._end(begun)
        self.tally.close()

    def _ends(self, message: Message) -> bool:
        """Whether an update is there with this: a coded one when it has been sealed."""
        return message.header.kind is Kind.SEAL or (message.header.kind is Kind.UPDATE and message.last)

    def _pieces(self, begun: Begun, message: Message) -> Iterator[Piece | Void]:
        """What of the message's elements is right. The first wrong one makes the update void; what follows is passed over."""
        update, check = begun.update, self.tally.check
        if begun.refused is not None:
            return
        like, found = self._elements(begun, message)
        try:
            if check is not None and begun.look is None:
                begun.look = check(update.client, like)
            for first, values in found:
                most = None if begun.look is None else begun.look(first, values)
                yield Piece(update.client, update.weight, like, first, values, most)
        except TrainingError as error:
            begun.refused = failure(update.client, error)
            yield Void(update.client)

    def _elements(self, begun: Begun, message: Message) -> tuple[Tensors, Iterator[tuple[int, torch.Tensor]]]:
        """The names, shapes and dtypes of the whole update; and what came of it, flat, with how many elements come before."""
        like = self.post.manifest(message).like
        if begun.decoding is not None:
            return like, iter([(message.first // 4, decoded(begun.decoding, message))])
        return like, self.post.pieces(message)

    def _end(self, begun: Begun) -> None:
        """An update has come to its end: it counts, unless it was refused. What came is in the ledger either way."""
        self._missing.discard(begun.update.client)
        self.tally.ledger.up[begun.update.client] += begun.num_bytes
        if begun.refused is None:
            self.tally.outcome.note(begun.update)
        else:
            self.tally.fail(begun.refused)

    def _part_of(self, message: Message) -> Begun:
        """What is known of the update that the message is a part of."""
        client, kind = message.header.client, message.header.kind
        if kind is Kind.SEAL:
            begun = self._begun[client]
            begun.update = replace(begun.update, owned_sha256=self._said(message, self.post.json(message), "owned", str))
            return begun
        if not message.first:
            note = self.post.note(message)
            metrics, coded = self._said(message, note, "metrics", dict), kind is Kind.CODED
            owned = "" if coded else self._said(message, note, "owned", str)
            self._begun[client] = Begun(self.tally.weighed(Update(client, {}, metrics, owned_sha256=owned)))
            self._begun[client].decoding = self.post.decoding(message, self.up, self._known) if coded else None
        self._begun[client].num_bytes += 0 if message.payload is None else message.payload.numel()
        return self._begun[client]

    def _said(self, message: Message, note: dict[str, Any], key: str, kind: type[T]) -> T:
        """One thing that a client says of its update."""
        if not isinstance(note.get(key), kind):
            sent = f"{message.header.kind.name} with a note of {sorted(note)}"
            raise ProtocolError(f"rank {message.peer} sent {sent}, expected {key} as a {kind.__name__}")
        return note[key]  # type: ignore[no-any-return]

    @cached_property
    def _known(self) -> Known:
        """What updates are differences from."""
        return Known(self.sent if self.up.delta else {})

    def _whole(self) -> Iterator[Update | Failure]:
        """Whole updates. Those whose first chunks came before it was known that they are wanted whole are put together here."""
        filling: dict[int, torch.Tensor] = {}  # by rank
        for message in self._answers(filling):
            if isinstance(message, Failure):
                if message.client in self._begun:
                    filling.pop(self.placement.leader_of[message.client], None)
                yield message
                continue
            begun, peer, ends = self._part_of(message), message.peer, self._ends(message)
            if message.payload is not None and not (ends and not message.first) and message.header.kind is not Kind.SEAL:
                if peer not in filling:
                    filling[peer] = room(message.header.length, torch.uint8)
                self._fill(filling[peer][message.first : message.stop], begun, message)
            if ends:
                self._missing.discard(begun.update.client)
                tensors = self._tensors(filling.pop(peer, None), begun, message)
                yield replace(begun.update, tensors=tensors, coded_bytes=begun.num_bytes if begun.decoding else None)
            message.release()

    def _tensors(self, body: torch.Tensor | None, begun: Begun, message: Message) -> Tensors:
        """The tensors of an update that is there, from what was put together of it, if it came in parts."""
        if begun.decoding is not None:
            return unpack(torch.empty(0, dtype=torch.uint8) if body is None else body, begun.decoding.manifest)
        return self.post.tensors(message) if body is None else unpack(body, self.post.manifest(message))

    def _fill(self, into: torch.Tensor, begun: Begun, message: Message) -> None:
        """Put a part of an update where it belongs."""
        if begun.decoding is not None:
            into.view(torch.float32).copy_(decoded(begun.decoding, message))
        elif message.payload is not None:
            into.copy_(message.payload)

    def _answers(self, filling: dict[int, Any]) -> Iterator[Message | Failure]:
        """Failures, and updates or parts of them, until no client is missing. When enough are being filled, only of these."""
        rnd = self.tally.rnd
        self._missing = set(rnd.cohort)
        while self._missing:
            if self.tally.conductor.enough(rnd, len(self.tally.outcome.counted)):
                self.roll.close_round(rnd, self._missing - self._begun.keys())
            for client in sorted(self._missing):
                if (failure := self.roll.why_not(client)) is not None:
                    self._missing.discard(client)
                    filling.pop(self.placement.leader_of[client], None)
                    yield failure
            message = self._next(rnd, filling) if self._missing else None
            if message is None:
                continue
            if message.header.kind is Kind.FAILURE:
                self._missing.discard(message.header.client)
                told = self.post.json(message)
                yield Failure(message.header.client, **{key: str(value) for key, value in told.items()})
            else:
                yield message

    def _next(self, rnd: Round, filling: Collection[int]) -> Message | None:
        """The next answer to this round; None where something else came that changes who is waited for."""
        leaders = {self.placement.leader_of[client] for client in self._missing}
        peers = set(filling) if len(filling) >= MOST_WHOLE else leaders | self.roll.behind
        under_way = [self.placement.leader_of[client] for client in self._begun if client in self._missing]
        # The sooner one ends, the less has to be kept until it does.
        peers = next(({peer} for peer in under_way if self.post.transport.holds({peer})), peers)
        began = time.monotonic()
        message = self.roll.receive(peers, f"waiting in round {rnd.index} for clients {sorted(self._missing)}")
        self.tally.outcome.wait_s += time.monotonic() - began
        if message is None:
            return None
        if self.roll.is_late(message):
            self.roll.drop(message)
            return None
        if message.header.kind is Kind.STUCK:
            self.roll.stuck(rnd, message, self._missing)
            return None
        self._belongs(message)
        return message

    def _belongs(self, message: Message) -> None:
        """Identity comes from the link: a rank speaks for the clients that were placed on it, in this round, once."""
        header, index, missing = message.header, self.tally.rnd.index, self._missing
        kinds = (Kind.FAILURE, Kind.UPDATE) if self.up.raw else (Kind.FAILURE, Kind.CODED, Kind.SEAL)
        begun = header.client in self._begun
        astray = not begun if header.kind is Kind.SEAL else begun and header.kind is Kind.CODED and not message.first
        if header.kind not in kinds or header.round != index or astray:
            raise ProtocolError(
                f"rank {message.peer} sent {header.kind.name} of round {header.round}, expected updates of round {index}"
            )
        if header.client not in missing or self.placement.leader_of[header.client] != message.peer:
            raise ProtocolError(
                f"rank {message.peer} speaks for client {header.client}; missing in round {index}: {sorted(missing)}"
            )
