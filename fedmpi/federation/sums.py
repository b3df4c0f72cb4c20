"""Sums: a rank adds up, on the exact grid, what its own clients made, and one sum travels in the place of their updates.

It takes 8 bytes a parameter, however many clients are in it; the figures of each client travel as ever. Since nobody sees a single
update afterwards, a client's own rank checks it before it is added: what is hostile in an update is kept out, but not a rank that
is hostile itself. The server gives the weights, and refuses a sum that was made under others.

This module must never know what updates are made of, or what is done with their mean.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedmpi.aggregation.check import Check, whole
from fedmpi.aggregation.mean import Sums
from fedmpi.aggregation.pieces import Piece
from fedmpi.errors import PeerSilent, ProtocolError, TrainingError
from fedmpi.federation.arrivals import Tally, failure
from fedmpi.federation.conductor import weight_of
from fedmpi.federation.post import Post, content
from fedmpi.federation.turns import tell
from fedmpi.federation.updates import Failure, Update
from fedmpi.manifest import Manifest
from fedmpi.messages import Kind
from fedmpi.round import SERVER, Placement, Round
from fedmpi.tensors import Tensors
from fedmpi.transports.inbox import Message


@dataclass(frozen=True)
class Terms:
    """What a rank needs to add up as the server would."""

    weights: str
    num_examples: Mapping[int, int]  # of the clients that live here
    check: Callable[[Tensors, Round], Check]  # from what was broadcast: what an update must pass before it is added


@dataclass
class Own:
    """A client rank's sum of one round."""

    terms: Terms
    rnd: Round
    check: Check
    manifest: Manifest | None = None
    sums: Sums | None = None

    def hand_in(self, post: Post, outcomes: Iterable[Update | Failure]) -> None:
        """Add the updates as their turns end, and tell the server of each at once."""
        for outcome in outcomes:
            added = outcome if isinstance(outcome, Failure) else self._added(outcome, post)
            if isinstance(added, Failure):
                tell(post, self.rnd, added)
                continue
            note = {"metrics": added.metrics, "owned": added.owned_sha256, "weight": added.weight}
            assert self.manifest is not None
            post.send_note((SERVER,), Kind.ADDED, self.manifest, self.rnd.index, added.client, note)

    def _added(self, update: Update, post: Post) -> Update | Failure:
        """The update with its weight, now that it is in the sum; or why it is not."""
        try:
            most = whole(self.check(update.client, update.tensors), update.tensors)
        except TrainingError as error:
            return failure(update.client, error)
        examples = self.terms.num_examples[update.client]
        weighed = replace(update, weight=weight_of(self.terms.weights, examples, update.metrics.get("examples", 0.0)))
        if self.sums is None:
            self.manifest = post.manifest_of(update.tensors)
            self.sums = Sums.together(self.manifest.like, self.rnd.scale)
        self.sums.take(weighed, update.client, most)
        return weighed


def send(post: Post, rnd: Round, own: Own) -> None:
    """A rank's sum on its way, if there is one."""
    if own.sums is not None:
        clients = sorted(own.sums.weights)
        post.send_tensors((SERVER,), Kind.SUM, {"sum": own.sums.values}, rnd.index, clients[0], {"clients": clients})


@dataclass
class Answers:
    """What the server hears of a cohort whose ranks add up: each client's figures, or why it has none."""

    post: Post
    placement: Placement
    tally: Tally
    sent: Tensors  # the round's broadcast
    missing: set[int] = field(default_factory=set)
    added: dict[int, dict[int, int]] = field(default_factory=dict)  # by rank: the weights of the clients in its sum
    manifest: Manifest | None = None  # of an update

    def __post_init__(self) -> None:
        self.missing = set(self.tally.rnd.cohort)

    def next(self, more: Iterable[int] = ()) -> Message:
        """The next message of a rank that a client is missing from, or of one of these."""
        rnd, began = self.tally.rnd, time.monotonic()
        peers = {self.placement.leader_of[client] for client in self.missing} | set(more)
        message = self.post.receive(peers, f"waiting in round {rnd.index} for clients {sorted(self.missing)}")
        self.tally.outcome.wait_s += time.monotonic() - began
        header = message.header
        if header.kind is Kind.STUCK:  # what it has added of others is lost with it
            why = content(message).decode(errors="replace")
            raise PeerSilent(f"rank {message.peer} is stuck in round {rnd.index} in the turn of client {header.client}: {why}")
        if header.kind not in (Kind.ADDED, Kind.SUM, Kind.FAILURE) or header.round != rnd.index:
            raise ProtocolError(
                f"rank {message.peer} sent {header.kind.name} of round {header.round}, expected sums of round {rnd.index}"
            )
        return message

    def hear(self, message: Message) -> None:
        """A client's figures, or its failure. Identity comes from the link."""
        client, peer = message.header.client, message.peer
        if client not in self.missing or self.placement.leader_of[client] != peer:
            raise ProtocolError(f"rank {peer} speaks for client {client}; missing: {sorted(self.missing)}")
        self.missing.discard(client)
        if message.header.kind is Kind.FAILURE:
            self.tally.fail(Failure(client, **{key: str(value) for key, value in self.post.json(message).items()}))
            return
        self._same(message)
        note = self.post.note(message)
        if not isinstance(note.get("metrics"), dict) or not isinstance(note.get("owned"), str):
            raise ProtocolError(f"rank {peer} sent ADDED with a note of {sorted(note)}, expected metrics, owned and weight")
        update = self.tally.weighed(Update(client, {}, note["metrics"], owned_sha256=note["owned"]))
        if note.get("weight") != update.weight:
            raise ProtocolError(f"rank {peer} added client {client} with weight {note.get('weight')}, expected {update.weight}")
        self.tally.outcome.note(update)
        self.added.setdefault(peer, {})[client] = update.weight
        message.release()

    def _same(self, message: Message) -> None:
        """All updates are of one make, and of what was broadcast."""
        found = self.post.promised(message)
        for name, like in found.like.items() if self.manifest is None else ():
            known = self.sent.get(name)
            if known is None or (known.shape, known.dtype) != (like.shape, like.dtype):
                raise ProtocolError(
                    f"rank {message.peer} added a {name} of {tuple(like.shape)} {like.dtype}, which was not broadcast so"
                )
        self.manifest = self.manifest or found
        if found.hash != self.manifest.hash:
            raise ProtocolError(
                f"rank {message.peer} added tensors of manifest {found.hash:x}, expected {self.manifest.hash:x}: settings differ"
            )

    @property
    def num(self) -> int:
        """Elements of an update."""
        return 0 if self.manifest is None else sum(tensor.numel() for tensor in self.manifest.like.values())

    def piece(self, peer: int, weight: int, first: int, values: torch.Tensor, within: torch.Tensor | None = None) -> Piece:
        """Elements of a rank's sum, for the exact mean."""
        assert self.manifest is not None
        return Piece(peer, weight, self.manifest.like, first, values, added=True, within=within)

    def arriving(self) -> Iterator[Piece]:
        """The sums as they come over the links, those of several ranks in turn, while others still compute; then the verdict."""
        due: set[int] = set()
        self.post.transport.in_chunks = frozenset({Kind.SUM})
        while self.missing or due:
            message = self.next(due)
            if message.header.kind is not Kind.SUM:
                self.hear(message)
                due |= self.added.keys() & {message.peer}
                continue
            weight, ends = self._weight(message, due), message.last
            for first, values in self.post.pieces(message):
                yield self.piece(message.peer, weight, first, values)
            message.release()  # the consumer has asked for the next piece: it is done with this one
            if ends:
                due.discard(message.peer)
                self.tally.ledger.up[message.header.client] += message.header.length
        self.tally.close()

    def _weight(self, message: Message, due: Collection[int]) -> int:
        """What a sum weighs, which is what the server knows of its clients."""
        peer, known = message.peer, sorted(self.added.get(message.peer, {}))
        waited = sorted(client for client in self.missing if self.placement.leader_of[client] == peer)
        if peer not in due or waited:
            raise ProtocolError(
                f"rank {peer} sent a sum when it had none to send: clients {waited} are missing, {known} were in it"
            )
        clients = known if message.first else self.post.note(message).get("clients")
        if clients != known or message.header.length != 8 * self.num:
            raise ProtocolError(
                f"rank {peer} sent a sum of {message.header.length} bytes of clients {clients}, expected {8 * self.num} of {known}"
            )
        return sum(self.added[peer].values())
