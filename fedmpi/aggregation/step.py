"""One round's aggregation: from the updates and what was sent to the next adapter. It knows no links, models or ranks."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedmpi.aggregation import Config, ServerConfig, factors, optimisers, robust
from fedmpi.aggregation.mean import exact_mean
from fedmpi.aggregation.spool import Sent, Spool
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors

MEDIAN = "median_move"  # of the updates that counted last
FAR = 4.0  # times that, and an update is refused where the bound is adaptive


@dataclass(frozen=True)
class Start:
    """What a round's aggregation starts from. `fresh` gives the adapter that clients begin anew with, in rules that fold all."""

    adapter: Tensors  # as it was sent
    memory: Tensors
    scale: int
    config: Config
    optimizer: str = "none"
    server: ServerConfig = field(default_factory=ServerConfig)
    fresh: Callable[[], Tensors] = dict
    scratch: Path | None = None


@dataclass(frozen=True)
class Made:
    """What it comes to. `fold` holds factors, by module, of what goes into the base; `figures` go into the round's line."""

    adapter: Tensors
    memory: Tensors
    fold: Tensors
    figures: Mapping[str, float]


def aggregate(updates: Iterable[Sent], start: Start) -> Made:
    """Consume the updates as they come; a rule that needs all of them keeps them in scratch space."""
    config, sent = start.config, start.adapter
    moves: list[float] = []
    if config.most_norm == "adaptive":
        updates = _measured(updates, sent, moves)
    measured = config.record_error and bool(factors.modules(sent))
    with Spool(start.scratch) as spool:
        target, fold, memory = _ruled(updates, spool, start, measured)
        adapter, memory = optimisers.step(start.optimizer, start.server, sent, {**sent, **target}, memory)
        error = {"aggregation_error": factors.relative_error(spool, sent, adapter, fold)} if measured else {}
    memory |= {MEDIAN: torch.tensor(statistics.median(moves))} if moves else {}
    return Made(adapter, memory, fold, error)


def _ruled(updates: Iterable[Sent], spool: Spool, start: Start, measured: bool) -> tuple[Tensors, Tensors, Tensors]:
    """The next adapter as the rule has it, what goes into the base, and what the rule remembers."""
    config, sent, memory = start.config, start.adapter, start.memory
    if config.robust != "none":
        spool.fill(_padded(updates, sent))
        target, memory = robust.combine(spool, sent, config, memory)
        return target, {}, memory
    if config.rule in ("flora", "flexlora"):
        spool.fill(updates)
        if config.rule == "flora":
            return start.fresh(), factors.stacked(spool, sent), memory
        return factors.redistributed(spool, sent), {}, memory
    kept = spool.passing(updates) if measured or config.rule == "fedex" else updates
    target = exact_mean(_padded(kept, sent), start.scale)
    return target, factors.missed(spool, sent, target) if config.rule == "fedex" else {}, memory


def _padded(updates: Iterable[Any], like: Tensors) -> Iterator[Any]:
    for update in updates:
        yield replace(update, tensors=factors.padded(update.tensors, like))


def _measured(updates: Iterable[Sent], sent: Tensors, moves: list[float]) -> Iterator[Sent]:
    for update in updates:
        moves.append(_move(update.tensors, sent))
        yield update


def inspect(tensors: Tensors, expected: Tensors, config: Config, memory: Tensors) -> None:
    """Refuse an update before it touches the aggregate: for names, shapes, dtypes, values, or how far it moved from `expected`."""
    if expected.keys() != tensors.keys():
        missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise TrainingError(f"the update lacks {missing[:3]} and brings {surplus[:3]}: settings differ")
    for name, tensor in tensors.items():
        like = expected[name]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            found, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, like))
            raise TrainingError(f"the update's {name} is {found}, expected {wanted}")
    bound = most_move(config, memory)
    if not math.isfinite(move := _move(tensors, expected if bound < math.inf else {})):
        bad = next(name for name, tensor in tensors.items() if not tensor.isfinite().all())
        raise NonFinite(f"the update's {bad} holds a value that is not finite")
    if move > bound:
        raise TrainingError(f"the update moved by {move:.4g}, aggregation.most_norm allows {bound:.4g}")


def most_move(config: Config, memory: Tensors) -> float:
    """How far an update may move; in the first round an adaptive bound is not known yet."""
    if config.most_norm == "adaptive":
        return FAR * float(memory[MEDIAN]) if MEDIAN in memory else math.inf
    return config.most_norm or math.inf


def _move(tensors: Tensors, origin: Tensors) -> float:
    """The norm of the difference, or where there is no origin, of the tensors; not finite where any element is not."""
    parts = []
    for name, tensor in tensors.items():
        moved = tensor - origin[name] if name in origin else tensor
        parts.append(float(torch.linalg.vector_norm(moved, dtype=torch.float64)))
    return math.hypot(*parts)
