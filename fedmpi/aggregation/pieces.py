"""Updates in pieces: flat neighbours of one dtype, as they come over a link or as whole updates are cut.

This module must never know what is done with a piece, or over what it came.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from fedmpi.errors import TrainingError
from fedmpi.tensors import Tensors, same_names

TOGETHER = 1 << 16  # elements of neighbouring tensors that make one piece


class Weighted(Protocol):
    """What can be averaged."""

    @property
    def tensors(self) -> Tensors: ...

    @property
    def weight(self) -> int: ...


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of one update, flat and of one dtype."""

    update: int  # which one; no two have the same number
    weight: int
    like: Tensors  # the whole update's names, shapes and dtypes, on the meta device; of all updates in the same order
    first: int  # how many elements of the update come before these, in the order of `like`
    values: torch.Tensor
    most: float | None = None  # their largest magnitude, where somebody has looked already
    added: bool = False  # these are sums already: whole numbers of grid steps, in float64, of updates that weigh so much together
    within: torch.Tensor | None = None  # memory of a whole sum, in which these lie in their place; it is the taker's from now on
    back: bool = False  # these came before and were added, and are to be taken back


@dataclass(frozen=True)
class Void:
    """The pieces of an update that have come so far are not to count, and no others will come."""

    update: int


@runtime_checkable
class Streamed(Protocol):
    """Updates that come in pieces: all the pieces of each of them, or that it is void."""

    def pieces(self) -> Iterator[Piece | Void]: ...


def in_pieces(updates: Iterable[Weighted]) -> Iterator[Piece]:
    """Whole updates, cut at tensors: those in one piece are small, or side by side in memory."""
    like: Tensors = {}
    for number, update in enumerate(updates):
        like = like or {name: torch.empty_like(tensor, device="meta") for name, tensor in update.tensors.items()}
        yield from cut(number, update, like)


def cut(number: int, update: Weighted, like: Tensors) -> Iterator[Piece]:
    """One whole update, whose shapes and dtypes are those of `like`."""
    same_shapes(like, update.tensors)
    first = 0
    for names in _runs(like):
        values = _flat([update.tensors[name] for name in names])
        yield Piece(number, update.weight, like, first, values)
        first += values.numel()


def _runs(like: Tensors) -> Iterator[list[str]]:
    """Names in their order: neighbours of one dtype go together up to a block, since a call of torch costs more than adding one."""
    for _, same in itertools.groupby(like, key=lambda name: like[name].dtype):
        run: list[str] = []
        room = TOGETHER
        for name in same:
            if run and like[name].numel() > room:
                yield run
                run, room = [], TOGETHER
            run.append(name)
            room -= like[name].numel()
        yield run


def _flat(parts: list[torch.Tensor]) -> torch.Tensor:
    """The elements of all parts; without a copy where they lie side by side, as those of a message do."""
    if len(parts) == 1:
        return parts[0].reshape(-1)
    if all(_adjacent(left, right) for left, right in itertools.pairwise(parts)):
        return parts[0].as_strided((sum(part.numel() for part in parts),), (1,))
    return torch.cat([part.reshape(-1) for part in parts])


def _adjacent(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the elements of one tensor follow upon those of the other in the same storage."""
    return (
        left.data_ptr() + left.numel() * left.element_size() == right.data_ptr()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.is_contiguous()
        and right.is_contiguous()
    )


def same_shapes(like: Tensors, tensors: Tensors) -> None:
    """Refuse an update that is not made like the others."""
    same_names(like, tensors)
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
            expected, found = (f"{tuple(t.shape)} {t.dtype}" for t in (like[name], tensor))
            raise TrainingError(f"tensor {name} is {found} in one update and {expected} in another: settings differ")
