"""What of a broadcast has moved since the one before: who had that one is not sent the rest again. It must never know why."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from fedmpi.tensors import Tensors


@dataclass
class Moved:
    """The server's side: the last broadcast, and who had it."""

    before: Tensors = field(default_factory=dict)
    had_it: set[int] = field(default_factory=set)

    def parts(self, tensors: Tensors, holders: Collection[int]) -> list[tuple[Tensors, set[int]]]:
        """What is sent, and to which of the holders; from now on they are those who had the last broadcast."""
        new = {name: t for name, t in tensors.items() if name not in self.before or not torch.equal(t, self.before[name])}
        those = set(holders) & self.had_it if new else set()  # in a round that is repeated nothing is new: it is sent whole
        self.before, self.had_it = tensors, set(holders)
        return [(new, those), (tensors, set(holders) - those)]

    def forget(self, holder: int) -> None:
        """A rank has joined anew: it holds nothing."""
        self.had_it.discard(holder)
