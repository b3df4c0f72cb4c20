"""The exact weighted mean: the same bytes whatever the order, the grouping or the placement of the updates.

Each `weight * x` is rounded to the grid 2**-scale and added up in float64. As long as the sums stay below 2**53 grid steps,
float64 adds them without rounding, so addition is associative: partial sums on ranks give the bytes of the flat sum. The one
division comes last.

The grid is absolute, since every rank must know it before any update is there. With n updates and L the largest magnitude that the
round began with, but at least 1, a mean on the grid that `grid_scale` chooses is off by at most n * 2**-46 * L, besides being
rounded to its dtype. For elements above n * 2**-22 * L that is less than the rounding to float32 costs; smaller ones keep fewer
digits, and one below 2**-46 * L may come out as 0.

Updates may come in pieces, those of several updates in turn, and each is added while it is still in the cache. An update of which
part was added and the rest cannot be is taken back: its pieces come once more and are subtracted, which is as exact as adding them
was, so that nothing of it is left.

The mean is made in the memory of its sums. An element of a mean takes no more bytes than its sum, so the last sums can lie in the
memory that is to be the mean's: from the end to the beginning, no quotient reaches a sum that has not been divided yet. What other
processes read is then as long as the mean, and a server holds its adapter and its sums, never a third thing.

This module must never know who sent what, or over what it came.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedmpi.aggregation.pieces import Piece, Streamed, Void, Weighted, cut, in_pieces, same_shapes
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors, num_bytes, room

_LIMIT = 2.0**53
_BLOCK = 1 << 16  # elements; a block, its sums and its source stay in the second-level cache together


def most_of(largest: float) -> float:
    """The largest magnitude that an update may have where the round began with `largest`."""
    return 64.0 * max(largest, 1.0)


def grid_scale(total_weight: int, largest: float) -> int:
    """The finest grid on which weights that sum to `total_weight` cannot overflow while no |x| passes `most_of(largest)`."""
    room = most_of(largest) * max(1, total_weight)
    return 52 - math.ceil(math.log2(room))


def exact_mean(updates: Iterable[Weighted] | Streamed, scale: int) -> Tensors:
    """Consume the updates as they come, holding one sum and never two of them; give sum(w * x) / sum(w) in their dtype."""
    return mean_of(updates.pieces() if isinstance(updates, Streamed) else in_pieces(updates), scale)


def mean_of(pieces: Iterable[Piece | Void], scale: int) -> Tensors:
    """The exact mean of updates in pieces. What is void must have been taken back by its pieces; else there is no mean."""
    sums: Sums | None = None
    for piece in pieces:
        if isinstance(piece, Void):
            if sums is not None and piece.update in sums.weights:
                raise TrainingError(f"update {piece.update} broke off, and what was added of it cannot be taken back")
            continue
        if sums is None:
            sums = Sums.of(piece.like, scale) if piece.within is None else Sums.together(piece.like, scale, piece.within)
        sums.add(piece)
    if sums is None or not sum(sums.weights.values()):
        raise TrainingError("the exact mean needs at least one update with a positive weight, found none")
    return sums.mean()


def largest(tensors: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude of all elements; NonFinite names the tensor that holds a NaN or an infinity."""
    most = 0.0
    for name, tensor in tensors.items():
        most_here = magnitude(tensor)
        if not math.isfinite(most_here):
            raise NonFinite(f"tensor {name} holds a value that is not finite")
        most = max(most, most_here)
    return most


def magnitude(tensor: torch.Tensor) -> float:
    """The largest magnitude; infinite where any element is a NaN."""
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(tensor))
    return math.inf if math.isnan(low + high) else max(abs(low), abs(high))


@dataclass
class Sums:
    """Whole numbers of grid steps, by element; and what bounds them. A rank may add up what is its own and pass that on."""

    like: Tensors
    scale: int
    values: torch.Tensor  # of the first elements, or of all
    quotient: torch.Tensor | None = None  # memory for the mean; until it is made, the sums of the last elements begin it
    weights: dict[int, int] = field(default_factory=dict)  # by update
    _num_begun: int = 0  # so many elements count: the others are cleared when they are first added to
    _there: dict[int, int] = field(default_factory=dict)  # by update, how many of its elements were added
    _most: dict[int, float] = field(default_factory=dict)  # by update, the largest magnitude so far, in grid steps
    _block: torch.Tensor = field(default_factory=lambda: torch.empty(_BLOCK, dtype=torch.float64))

    def __post_init__(self) -> None:
        self._num, self._cut = _num(self.like), len(self.values)
        last = self._num - self._cut
        self._last = torch.empty(0) if self.quotient is None else self.quotient[: 8 * last].view(torch.float64)

    @staticmethod
    def of(like: Tensors, scale: int) -> "Sums":
        """Of nothing yet, in memory of which a part will be the mean's."""
        num, num_last = _num(like), num_bytes(like) // 8
        quotient = room(_layout(like)[1], torch.uint8, to_lend=True)
        return Sums(like, scale, room(num - num_last, torch.float64), quotient)

    @staticmethod
    def together(like: Tensors, scale: int, values: torch.Tensor | None = None) -> "Sums":
        """Of nothing yet, side by side in memory of their own."""
        return Sums(like, scale, room(_num(like), torch.float64) if values is None else values)

    def take(self, update: Weighted, number: int, most: float) -> None:
        """Add a whole update, which is none of those before and whose largest magnitude is known."""
        for piece in cut(number, update, self.like):
            self.add(replace(piece, most=most))

    def add(self, piece: Piece) -> None:
        """Add a piece, or take it back, block by block: each is looked at, scaled, rounded and added while it is in the cache."""
        if piece.update not in self.weights:
            self._begin(piece)
        factor = 1.0 if piece.added else math.ldexp(piece.weight, self.scale)
        others = sum(most for update, most in self._most.items() if update != piece.update) + len(self._most)
        spans = self._spans(piece.first, piece.first + piece.values.numel())
        parts = torch.split_with_sizes(piece.values, [stop - start for start, stop in spans])
        for (start, stop), part in zip(spans, parts, strict=True):
            most = max(self._most[piece.update], (magnitude(part) if piece.most is None else piece.most) * factor)
            if not others + most < _LIMIT:
                self._refuse(piece)
            self._most[piece.update] = most
            self._put(start, stop, part, piece, factor)
        self._count(piece)

    def _put(self, start: int, stop: int, part: torch.Tensor, piece: Piece, factor: float) -> None:
        """Add one block. Where nothing was before, it is made in place, and a zero has no sign, as if it had been added to one."""
        there, first = self._at(start, stop), start == self._num_begun
        if stop > self._num_begun:
            for low, high in () if first else self._spans(self._num_begun, stop):
                self._at(low, high).zero_()
            self._num_begun = stop
        if first and piece.within is self.values:  # a sum of several ranks, one of which had zeros: there is no -0 in it
            return
        steps = there if first else self._block[: len(part)]
        if not piece.added:
            steps.copy_(part).mul_(-factor if piece.back else factor).round_()
        elif first:
            steps.copy_(part)
        else:
            steps = part
        there.add_(0.0 if first else steps)

    def _spans(self, start: int, stop: int) -> list[tuple[int, int]]:
        """These elements, cut into blocks that lie in one memory each."""
        ends = [*range(start, stop, _BLOCK), stop]
        if start < self._cut < stop:
            ends = [*range(start, self._cut, _BLOCK), *range(self._cut, stop, _BLOCK), stop]
        return list(itertools.pairwise(ends))

    def _at(self, start: int, stop: int) -> torch.Tensor:
        """The sums of such a block."""
        return self.values[start:stop] if stop <= self._cut else self._last[start - self._cut : stop - self._cut]

    def _begin(self, piece: Piece) -> None:
        if piece.like is not self.like:
            same_shapes(self.like, piece.like)
            if list(piece.like) != list(self.like):
                raise TrainingError("the elements of one update come in another order than those of another: settings differ")
        self.weights[piece.update], self._most[piece.update], self._there[piece.update] = piece.weight, 0.0, 0

    def _count(self, piece: Piece) -> None:
        """An update of which nothing is there any more has never been."""
        self._there[piece.update] += -piece.values.numel() if piece.back else piece.values.numel()
        if piece.back and not self._there[piece.update]:
            del self.weights[piece.update], self._most[piece.update], self._there[piece.update]

    def _refuse(self, piece: Piece) -> None:
        start = 0
        for name, tensor in self.like.items():  # names the tensor if it is not finite
            stop = start + tensor.numel()
            largest({name: piece.values[max(0, start - piece.first) : max(0, stop - piece.first)]})
            start = stop
        raise TrainingError(
            f"the exact mean would overflow its grid 2**-{self.scale}: the updates have grown more than 64-fold in one round; "
            "lower the learning rate or clip the updates"
        )

    def mean(self) -> Tensors:
        """The quotient, in the dtypes of the updates, all in one memory. Once: the sums may be gone with it."""
        if broken := [update for update, num in self._there.items() if num != self._num]:
            raise TrainingError(f"the exact mean lacks part of update {broken[0]}: it has {self._there[broken[0]]} of its elements")
        divisor = math.ldexp(sum(self.weights.values()), self.scale)
        places, size = _layout(self.like)
        memory = room(size, torch.uint8, to_lend=True) if self.quotient is None else self.quotient
        runs = [(first, memory[place : place + num * dtype.itemsize].view(dtype)) for dtype, first, num, place in places]
        for first, run in reversed(runs):
            for start, stop in reversed(self._spans(first, first + len(run))):
                torch.div(self._at(start, stop), divisor, out=self._block[: stop - start])
                run[start - first : stop - first].copy_(self._block[: stop - start])
        return _named(self.like, [run for _, run in runs])


def _num(like: Tensors) -> int:
    return sum(tensor.numel() for tensor in like.values())


def _layout(like: Tensors) -> tuple[list[tuple[torch.dtype, int, int, int]], int]:
    """Neighbours of one dtype in one memory: the dtype, how many elements come before, how many there are, and at which byte they
    begin; and the bytes of all."""
    places, first, end = [], 0, 0
    for dtype, same in itertools.groupby(like.values(), key=lambda tensor: tensor.dtype):
        num, start = sum(tensor.numel() for tensor in same), -(-end // dtype.itemsize) * dtype.itemsize
        places.append((dtype, first, num, start))
        first, end = first + num, start + num * dtype.itemsize
    return places, end


def _named(like: Tensors, runs: list[torch.Tensor]) -> Tensors:
    """Flat neighbours of one dtype, taken apart."""
    made: Tensors = {}
    for run, (_, same) in zip(runs, itertools.groupby(like.items(), key=lambda item: item[1].dtype), strict=True):
        tensors = dict(same)
        parts = torch.split_with_sizes(run, [tensor.numel() for tensor in tensors.values()])
        made.update({name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)})
    return made
