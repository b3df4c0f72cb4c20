"""The ground: the base that each process holds once. The server may change it, and ranks that missed a change get it.

It knows versions and who holds which; never what changed, or why.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fedmpi.federation.post import Post
from fedmpi.ledger import Ledger
from fedmpi.messages import Kind
from fedmpi.round import Placement
from fedmpi.tensors import Tensors, num_bytes


class Ground(Protocol):
    """What each process holds once. Every change makes a new version."""

    @property
    def version(self) -> int: ...

    def since(self, version: int) -> Tensors: ...

    def catch_up(self, missed: Tensors) -> None: ...


@dataclass
class Levelling:
    """The server's side: which version each rank holds. A rank that has just joined holds version 0."""

    ground: Ground
    placement: Placement
    _held: dict[int, int] = field(default_factory=dict)

    def forget(self, holder: int) -> None:
        """A rank has joined anew."""
        self._held.pop(holder, None)

    def bring_up(self, post: Post | None, ledger: Ledger, holders: Mapping[int, int], round_index: int) -> None:
        """Send each of these (a leader, and a client that the copy is for) what it misses; its members are called too."""
        now = self.ground.version
        for version in sorted({self._held.get(holder, 0) for holder in holders} - {now}):
            behind = [holder for holder in holders if self._held.get(holder, 0) == version]
            missed = self.ground.since(version)
            if post is not None:
                post.send_tensors(behind, Kind.FOLD, missed, round_index)
                for leader in behind:
                    post.send_bytes(self.placement.seat_of(leader)[1:], Kind.FOLD, b"", round_index)
            ledger.down.update({holders[holder]: num_bytes(missed) for holder in behind})
            self._held.update(dict.fromkeys(behind, now))
