"""The exact weighted mean: the same bytes whatever the order, the grouping or the placement of the updates.

Each `weight * x` is rounded to the grid 2**-scale and added up in float64. As long as the sums stay below 2**53 grid steps,
float64 adds them without rounding, so addition is associative: partial sums on ranks give the bytes of the flat sum. The one
division comes last. With the scale that `grid_scale` chooses the grid is far finer than the float32 of the result.
"""

import itertools
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors, same_names

_LIMIT = 2.0**53
_BLOCK = 1 << 16  # elements; a block, its sums and its source stay in the second-level cache together
_HUGE_BYTES = 4 << 20  # from here on the sums lie in huge pages, where the system has them


class Weighted(Protocol):
    """What can be averaged."""

    @property
    def tensors(self) -> Tensors: ...

    @property
    def weight(self) -> int: ...


@dataclass(frozen=True)
class _Run:
    """Tensors of one dtype that are added in one go, since a call of torch costs more than adding one: small, or side by side."""

    like: Tensors
    sums: torch.Tensor

    def of(self, tensors: Tensors) -> torch.Tensor:
        """These tensors' elements, flat; without a copy where they lie side by side, as those of a message do."""
        parts = [tensors[name] for name in self.like]
        if len(parts) == 1:
            return parts[0].reshape(-1)
        if all(_adjacent(left, right) for left, right in itertools.pairwise(parts)):
            return parts[0].as_strided(self.sums.shape, (1,))
        return torch.cat([part.reshape(-1) for part in parts])


def grid_scale(total_weight: int, largest: float) -> int:
    """The finest grid on which weights that sum to `total_weight` cannot overflow while no |x| passes 64 times `largest`."""
    room = max(1.0, 64.0 * max(largest, 1.0)) * max(1, total_weight)
    return 52 - math.ceil(math.log2(room))


def exact_mean(updates: Iterable[Weighted], scale: int) -> Tensors:
    """Consume the updates as they come, holding one sum and never two of them; give sum(w * x) / sum(w) in their dtype."""
    runs: list[_Run] = []
    like: Tensors = {}
    bound, total = 0.0, 0
    for update in updates:
        if not runs:
            like = {name: torch.empty_like(tensor, device="meta") for name, tensor in update.tensors.items()}
            runs = list(_runs(update.tensors, like))
        _same_shapes(like, update.tensors)
        bound += _add(runs, update, scale, bound)
        total += update.weight
    if not total:
        raise TrainingError("the exact mean needs at least one update with a positive weight, found none")
    return {name: tensor for run in runs for name, tensor in _quotient(run, math.ldexp(total, scale))}


def largest(tensors: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude of all elements; NonFinite names the tensor that holds a NaN or an infinity."""
    most = 0.0
    for name, tensor in tensors.items():
        most_here = _magnitude(tensor)
        if not math.isfinite(most_here):
            raise NonFinite(f"tensor {name} holds a value that is not finite")
        most = max(most, most_here)
    return most


def _magnitude(tensor: torch.Tensor) -> float:
    """The largest magnitude; infinite where any element is a NaN."""
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(tensor))
    return math.inf if math.isnan(low + high) else max(abs(low), abs(high))


def _runs(first: Tensors, like: Tensors) -> Iterator[_Run]:
    """The tensors in their order, cut into runs, each with its place in one zeroed sum."""
    groups: list[Tensors] = []
    room, last = 0, torch.empty(0, dtype=torch.bool)
    for name, tensor in first.items():
        if tensor.dtype != last.dtype or (tensor.numel() > room and not _adjacent(last, tensor)):
            groups.append({})
            room = _BLOCK
        groups[-1][name], last = like[name], tensor
        room -= tensor.numel()
    sizes = [sum(tensor.numel() for tensor in group.values()) for group in groups]
    yield from (_Run(group, sums) for group, sums in zip(groups, torch.split(_zeros(sum(sizes)), sizes), strict=True))


def _adjacent(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the elements of one tensor follow upon those of the other in the same storage."""
    return (
        left.data_ptr() + left.numel() * left.element_size() == right.data_ptr()
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
        and left.is_contiguous()
        and right.is_contiguous()
    )


def _zeros(num: int) -> torch.Tensor:
    """So many float64 zeros. With pages of the usual size, touching them first would cost as much as adding two updates."""
    if 8 * num < _HUGE_BYTES:
        return torch.zeros(num, dtype=torch.float64)
    memory = mmap.mmap(-1, 8 * num, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float64)


def _same_shapes(like: Tensors, tensors: Tensors) -> None:
    same_names(like, tensors)
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (like[name].shape, like[name].dtype):
            expected, found = (f"{tuple(t.shape)} {t.dtype}" for t in (like[name], tensor))
            raise TrainingError(f"tensor {name} is {found} in one update and {expected} in another: settings differ")


def _add(runs: list[_Run], update: Weighted, scale: int, bound: float) -> float:
    """Add an update to the sums, which `bound` grid steps bound so far; gives what to add to that bound."""
    factor, most = math.ldexp(update.weight, scale), 0.0
    block = torch.empty(_BLOCK, dtype=torch.float64)
    for run in runs:
        for piece, sums in zip(torch.split(run.of(update.tensors), _BLOCK), torch.split(run.sums, _BLOCK), strict=True):
            most = max(most, _magnitude(piece))
            if not bound + most * factor + 1.0 < _LIMIT:
                largest({name: update.tensors[name] for name in run.like})  # names the tensor if it is not finite
                raise TrainingError(
                    f"the exact mean would overflow its grid 2**-{scale}: the updates have grown more than 64-fold in one round; "
                    "lower the learning rate or clip the updates"
                )
            sums.add_(block[: piece.numel()].copy_(piece).mul_(factor).round_())
    return most * factor + 1.0


def _quotient(run: _Run, divisor: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a run, divided: neighbours in one buffer."""
    block = torch.empty(_BLOCK, dtype=torch.float64)
    quotient = torch.empty(run.sums.shape, dtype=next(iter(run.like.values())).dtype)
    for piece, sums in zip(torch.split(quotient, _BLOCK), torch.split(run.sums, _BLOCK), strict=True):
        piece.copy_(torch.div(sums, divisor, out=block[: sums.numel()]))
    sizes = [tensor.numel() for tensor in run.like.values()]
    for (name, like), part in zip(run.like.items(), torch.split(quotient, sizes), strict=True):
        yield name, part.view(like.shape)
