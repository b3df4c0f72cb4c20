"""Exchange by collectives: a broadcast to all ranks, and a sum over all ranks of what each of them has added up for itself.

All ranks of the world take part in every one, surplus ones too, which add nothing. A rank enters when the server has announced
a collective over the links, and the server announces a sum when every client has answered: nobody waits inside for one who still
trains, so the deadline of a collective is that of the links. A rank that is lost ends the job, as everywhere.

This module must never know what is added, or how a collective is made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedmpi.aggregation.pieces import Piece
from fedmpi.errors import ProtocolError, QuorumLost, TrainingError
from fedmpi.federation.post import Post
from fedmpi.federation.sums import Answers, Own
from fedmpi.federation.updates import Update
from fedmpi.ledger import Ledger
from fedmpi.manifest import Packed, manifest_of, unpack
from fedmpi.messages import Kind
from fedmpi.round import SERVER, Placement, Round
from fedmpi.tensors import Tensors, room
from fedmpi.transports.together import SUM_BYTES, Together

NOBODY = -1  # in the ledger: a copy that was for no client


@dataclass
class Joint:
    """One rank's part in the collectives of a training."""

    post: Post
    placement: Placement
    ledger: Ledger
    together: Together | None = None

    def meet(self) -> None:
        """All ranks of the world, once they have greeted."""
        with self.post.apart():
            self.together = self.post.transport.together()

    def leave(self) -> None:
        """The training is over."""
        if self.together is not None:
            self.together.close()

    def spread(self, rnd: Round, tensors: Tensors) -> Tensors:
        """The server's side of a broadcast."""
        manifest, peers = self.post.manifest_of(tensors), self.post.transport.peers
        self.post.send_note(peers, Kind.TOGETHER, manifest, rnd.index, -1, {})
        self._broadcast(rnd, Packed(tensors, manifest).buffer(0, manifest.num_bytes))
        for peer in peers:
            self.ledger.down[self._whose(peer, rnd.cohort)] += manifest.num_bytes
        return tensors

    def receive(self, rnd: Round) -> Tensors:
        """Everybody else's."""
        message = self.post.expect(SERVER, Kind.TOGETHER, rnd.index, f"waiting for the broadcast of round {rnd.index}")
        manifest = self.post.promised(message)
        if manifest.num_bytes > self.post.transport.limit_bytes:
            raise ProtocolError(
                f"a broadcast claims {manifest.num_bytes} bytes, at most {self.post.transport.limit_bytes} are accepted"
            )
        body = room(manifest.num_bytes, torch.uint8)
        self._broadcast(rnd, body)
        return unpack(body, manifest)

    def hand_in(self, rnd: Round, own: Own) -> None:
        """A rank's part of the sum, when every other rank has its own too."""
        phase = f"waiting for the sum of round {rnd.index}"
        num = self.post.note(self.post.expect(SERVER, Kind.TOGETHER, rnd.index, phase)).get("values")
        held = None if own.sums is None else own.sums.values
        if not isinstance(num, int) or num not in (0, num if held is None else len(held)):
            raise ProtocolError(f"rank {SERVER} asks for a sum of {num} values, rank {self.post.transport.rank} has {held}")
        values = torch.zeros(num, dtype=torch.float64) if held is None else held[:num]
        begun = [self._all.add(part) for part in torch.split(values, SUM_BYTES // 8) if len(part)]
        with self.post.apart():
            for one in begun:
                self._all.wait(one, f"adding up round {rnd.index}")

    def sums(self, answers: Answers) -> Iterator[Piece]:
        """The server's side: the sum of all ranks, in memory for the mean; a part is looked at while the next is under way."""
        rnd, post, values = answers.tally.rnd, self.post, torch.empty(0, dtype=torch.float64)
        while answers.missing:
            answers.hear(answers.next())
            if len(values) != answers.num:  # what the server itself has to add; now, while others still compute
                values = room(answers.num, torch.float64).zero_()
        try:
            answers.tally.close()
        except QuorumLost:
            self._call(rnd, answers, 0)
            raise
        self._call(rnd, answers, answers.num)
        for peer in post.transport.peers:
            answers.tally.ledger.up[self._whose(peer, sorted(answers.added.get(peer, ())))] += 8 * answers.num
        weight = sum(weight for rank in answers.added.values() for weight in rank.values())
        parts = torch.split(values, SUM_BYTES // 8)
        begun, first = [self._all.add(part) for part in parts], 0
        for one, part in zip(begun, parts, strict=True):
            with post.apart():
                self._all.wait(one, f"adding up round {rnd.index}")
            yield answers.piece(SERVER, weight, first, part, values)
            first += len(part)

    def _call(self, rnd: Round, answers: Answers, num: int) -> None:
        """Everybody to the sum; of nothing where too few have an update."""
        manifest = answers.manifest or manifest_of({})
        self.post.send_note(self.post.transport.peers, Kind.TOGETHER, manifest, rnd.index, -1, {"values": num})

    def _broadcast(self, rnd: Round, data: torch.Tensor) -> None:
        with self.post.apart():
            self._all.broadcast(data, f"the broadcast of round {rnd.index}")

    @property
    def _all(self) -> Together:
        if self.together is None:
            raise RuntimeError("the ranks have not met")
        return self.together

    def _whose(self, peer: int, clients: tuple[int, ...] | list[int]) -> int:
        """Which client a rank's copy is counted for: as with single messages, its first one that took part."""
        return next((client for client in clients if self.placement.leader_of[client] == peer), NOBODY)


@dataclass(frozen=True)
class Added:
    """What the server gets of a round whose ranks add up: to be taken in pieces, since there are no updates."""

    answers: Answers
    joint: Joint | None

    def pieces(self) -> Iterator[Piece]:
        """All sums; at the end, the verdict."""
        if self.joint is None:
            yield from self.answers.arriving()
            return
        yield from self.joint.sums(self.answers)

    def __iter__(self) -> Iterator[Update]:
        raise TrainingError("this algorithm or rule looks at single updates, and the ranks send sums of them: give exchange star")
