"""What an update must be before it counts, looked at piece by piece: nobody needs to hold one whole to refuse it.

Names, shapes and dtypes are known before the first element comes. Values are looked at as they come, each once, and what is found
of their size is handed on to who adds them up. An update is refused at its first wrong piece; to take back what came before that is
the business of who added it. This module must never know who sent what, or over what it came.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fedmpi.aggregation import Config
from fedmpi.aggregation.mean import magnitude
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors

MEDIAN = "median_move"  # of the updates that counted last
FAR = 4.0  # times that, and an update is refused where the bound is adaptive

Look = Callable[[int, torch.Tensor], float]  # at flat elements that so many others come before; gives the largest magnitude
Check = Callable[[int, Tensors], Look]  # of an update of this client: its names, shapes and dtypes, in the order of its elements


@dataclass(frozen=True)
class Wanted:
    """What an update is held to."""

    like: Tensors  # its tensors
    most: float = math.inf  # the largest magnitude
    most_move: float = math.inf  # how far it may be from `origin`, where that is bounded
    origin: Tensors = field(default_factory=dict)


def begin(wanted: Wanted, like: Tensors) -> Look:
    """Refuse an update for names, shapes or dtypes; give what looks at its pieces, in their order."""
    _same_layout(wanted.like, like)
    square = 0.0

    def look(first: int, values: torch.Tensor) -> float:
        nonlocal square
        found = magnitude(values)
        if not math.isfinite(found):
            bad = next(name for name, part, _ in parts(like, first, values) if not part.isfinite().all())
            raise NonFinite(f"the update's {bad} holds a value that is not finite")
        if wanted.most_move < math.inf:
            square += _square(wanted.origin, parts(like, first, values))
            if (move := math.sqrt(square)) > wanted.most_move:
                raise TrainingError(f"the update moved by {move:.4g}, aggregation.most_norm allows {wanted.most_move:.4g}")
        if found > wanted.most:
            raise TrainingError(f"the update has grown to {found:.4g}, more than {wanted.most:.4g}: lower the learning rate")
        return found

    return look


def whole(look: Look, tensors: Tensors) -> float:
    """Look at an update that is there already; gives its largest magnitude."""
    first, most = 0, 0.0
    for tensor in tensors.values():
        most = max(most, look(first, tensor.reshape(-1)))
        first += tensor.numel()
    return most


def parts(like: Tensors, first: int, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, int]]:
    """What the flat elements are of each tensor: its name, these elements, and how many of its own come before them."""
    start, stop = 0, first + values.numel()
    for name, tensor in like.items():
        low, high = max(start, first), min(start + tensor.numel(), stop)
        if low < high:
            yield name, values[low - first : high - first], low - start
        start += tensor.numel()


def most_move(config: Config, memory: Mapping[str, torch.Tensor]) -> float:
    """How far an update may move; in the first round an adaptive bound is not known yet."""
    if config.most_norm == "adaptive":
        return FAR * float(memory[MEDIAN]) if MEDIAN in memory else math.inf
    return config.most_norm or math.inf


def move(tensors: Tensors, origin: Tensors) -> float:
    """The norm of the difference."""
    return math.sqrt(sum(_square(origin, [(name, tensor.reshape(-1), 0)]) for name, tensor in tensors.items()))


def _square(origin: Tensors, pieces: "Iterator[tuple[str, torch.Tensor, int]] | list[tuple[str, torch.Tensor, int]]") -> float:
    """The squared distance of these elements from the origin; of tensors that have none, nothing."""
    total = 0.0
    for name, values, before in pieces:
        if name in origin:
            moved = values - origin[name].reshape(-1)[before : before + values.numel()]
            total += float(torch.linalg.vector_norm(moved, dtype=torch.float64)) ** 2
    return total


def _same_layout(wanted: Tensors, found: Tensors) -> None:
    if wanted.keys() != found.keys():
        missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        raise TrainingError(f"the update lacks {missing[:3]} and brings {surplus[:3]}: settings differ")
    for name, tensor in found.items():
        like = wanted[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            there, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like))
            raise TrainingError(f"the update's {name} is {there}, expected {expected}")
