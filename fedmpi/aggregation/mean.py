"""The exact weighted mean: the same bytes whatever the order, the grouping or the placement of the updates.

Each `weight * x` is rounded to the grid 2**-scale and added up in float64. As long as the sums stay below 2**53 grid steps,
float64 adds them without rounding, so addition is associative: partial sums on ranks give the bytes of the flat sum. The one
division comes last. With the scale that `grid_scale` chooses the grid is far finer than the float32 of the result.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors, same_names

_LIMIT = 2.0**53
_BLOCK = 1 << 16  # elements; a block in float64 stays in the second-level cache


class Weighted(Protocol):
    """What can be averaged."""

    @property
    def tensors(self) -> Tensors: ...

    @property
    def weight(self) -> int: ...


def grid_scale(total_weight: int, largest: float) -> int:
    """The finest grid on which weights that sum to `total_weight` cannot overflow while no |x| passes 64 times `largest`."""
    room = max(1.0, 64.0 * max(largest, 1.0)) * max(1, total_weight)
    return 52 - math.ceil(math.log2(room))


def exact_mean(updates: Iterable[Weighted], scale: int) -> Tensors:
    """Consume the updates as they come, holding one sum and never two of them; give sum(w * x) / sum(w) in their dtype."""
    sums: Tensors = {}
    dtypes: dict[str, torch.dtype] = {}
    bound, total = 0.0, 0
    for update in updates:
        if not sums:
            dtypes = {name: tensor.dtype for name, tensor in update.tensors.items()}
            sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in update.tensors.items()}
        same_names(sums, update.tensors)
        factor = math.ldexp(update.weight, scale)
        bound += largest(update.tensors) * factor + 1.0
        if bound >= _LIMIT:
            raise TrainingError(
                f"the exact mean would overflow its grid 2**-{scale}: the updates have grown more than 64-fold in one round; "
                "lower the learning rate or clip the updates"
            )
        for name, tensor in update.tensors.items():
            _add(sums[name], tensor, factor)
        total += update.weight
    if not total:
        raise TrainingError("the exact mean needs at least one update with a positive weight, found none")
    return {name: sums[name].div_(math.ldexp(total, scale)).to(dtypes[name]) for name in sums}


def largest(tensors: Mapping[str, torch.Tensor]) -> float:
    """The largest magnitude of all elements; NonFinite names the tensor that holds a NaN or an infinity."""
    most = 0.0
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        low, high = torch.aminmax(tensor)
        most_here = max(abs(float(low)), abs(float(high)))
        if not math.isfinite(most_here) or math.isnan(float(low) + float(high)):
            raise NonFinite(f"tensor {name} holds a value that is not finite")
        most = max(most, most_here)
    return most


def _add(into: torch.Tensor, tensor: torch.Tensor, factor: float) -> None:
    flat_sum, flat = into.view(-1), tensor.reshape(-1)
    block = torch.empty(min(_BLOCK, flat.numel()), dtype=torch.float64)
    for start in range(0, flat.numel(), _BLOCK):
        piece = flat[start : start + _BLOCK]
        part = block[: piece.numel()].copy_(piece)
        flat_sum[start : start + _BLOCK].add_(part.mul_(factor).round_())
