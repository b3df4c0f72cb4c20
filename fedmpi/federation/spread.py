"""The server's side of a broadcast: who gets what of it, coded or raw, and how many bytes that was.

A raw one leaves while the first updates come in, so a slow link holds up nobody but its own rank; it must not change until all of
them are in. A coded one is short, and has left before. This module must never know what is sent, or what becomes of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fedmpi.federation.coding import Downlink
from fedmpi.federation.ground import Levelling
from fedmpi.federation.moved import Moved
from fedmpi.federation.post import Post
from fedmpi.federation.roll import Roll
from fedmpi.ledger import Ledger
from fedmpi.messages import Kind
from fedmpi.round import Placement, Round
from fedmpi.tensors import Tensors, num_bytes


@dataclass
class Spread:
    """What the server knows of who holds what."""

    placement: Placement
    ledger: Ledger
    downlink: Downlink
    post: Post | None = None  # None: this process is the whole world
    roll: Roll | None = None
    levelling: Levelling | None = None  # of the base that each process holds, where it may change
    moved: Moved | None = None  # where who had the broadcast before is sent a part of it
    leaving: Callable[[], None] | None = field(default=None, init=False)  # waits for the end of the round's broadcast

    def send(self, rnd: Round, tensors: Tensors) -> Tensors:
        """One copy to each rank that hosts a client of the cohort; alone, one for each client. Gives what it is decoded to."""
        alone = self.post is None
        first = {client if alone else self.placement.leader_of[client]: client for client in reversed(rnd.cohort)}
        self.level(first, rnd.index)
        coded = None if self.downlink.chains.raw else self.downlink.encode(tensors, rnd)
        able = set() if coded is None else self.downlink.readers(first)
        if coded is not None and self.post is not None:
            self.post.send_coded(sorted(able), coded, rnd.index)
            for leader in able:
                self.post.send_bytes(self._members(leader), Kind.BROADCAST, b"", rnd.index)
        decoded = tensors if coded is None else coded.finished().tensors
        self.downlink.told(first)
        gone = self.roll.gone if self.roll is not None else ()
        self.ledger.down.update({first[holder]: coded.num_bytes for holder in able - set(gone)} if coded is not None else {})
        whole = first.keys() - able
        parts = [(decoded, whole)] if self.moved is None else self.moved.parts(decoded, whole)
        sizes = {holder: num_bytes(part) for part, holders in parts for holder in holders}
        if self.post is None:
            self.ledger.down.update({first[holder]: size for holder, size in sizes.items()})
            return decoded
        for part, holders in parts:
            if holders:
                told = {leader: self._members(leader) for leader in holders}
                self.post.send_tensors(sorted(holders), Kind.BROADCAST, part, rnd.index, behind=True, told=told)
        self.leaving = partial(self._all_left, self.post, first, sizes)
        return decoded

    def level(self, holders: Mapping[int, int], round_index: int) -> None:
        """Bring these ranks' base up to date before they get anything that stands on it."""
        if self.levelling is not None:
            self.levelling.bring_up(self.post, self.ledger, holders, round_index)

    def forget(self, peer: int) -> None:
        """A rank has joined anew: it holds nothing."""
        for side in (self.downlink, self.moved, self.levelling):
            if side is not None:
                side.forget(peer)

    def _members(self, leader: int) -> Sequence[int]:
        """They wait on their own link until it is time to turn to their leader."""
        return self.placement.seat_of(leader)[1:]

    def _all_left(self, post: Post, first: Mapping[int, int], sizes: Mapping[int, int]) -> None:
        """The broadcast has come to its end; whoever did not get it is not in the books."""
        lost, self.leaving = post.all_left(), None
        self.ledger.down.update({first[holder]: size for holder, size in sizes.items() if holder not in lost})
