"""One round's aggregation: from the updates and what was sent to the next adapter. It knows no links, models or ranks."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedmpi.aggregation import Config, ServerConfig, factors, optimisers, robust
from fedmpi.aggregation.check import MEDIAN, move
from fedmpi.aggregation.mean import exact_mean, mean_of
from fedmpi.aggregation.pieces import Streamed
from fedmpi.aggregation.spool import Sent, Spool
from fedmpi.tensors import Tensors


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
    alike: bool = True  # whether all updates have the same shapes


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
    with ExitStack() as open_:
        spool = open_.enter_context(Spool(start.scratch))
        target, fold, memory = _ruled(updates, spool, start, measured)
        adapter, memory = optimisers.step(start.optimizer, start.server, sent, {**sent, **target}, memory)
        memory |= {MEDIAN: torch.tensor(statistics.median(moves))} if moves else {}
        if not measured:
            return Made(adapter, memory, fold, {})
        in_use = open_.pop_all()  # by the figure, which nothing but the record waits for

    def error() -> float:
        with in_use:
            return factors.relative_error(spool, sent, adapter, fold)

    return Made(adapter, memory, fold, Later({"aggregation_error": error}))


class Later(Mapping[str, float]):
    """Figures that are computed beside the program, one after the other. Who reads one waits until it is there."""

    def __init__(self, work: Mapping[str, Callable[[], float]]) -> None:
        pool = ThreadPoolExecutor(1, "figures")
        self._found: dict[str, Future[float]] = {name: pool.submit(figure) for name, figure in work.items()}
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> float:
        return self._found[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


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
    keep = measured or config.rule == "fedex"
    if isinstance(updates, Streamed) and start.alike:
        target = mean_of(spool.taping(updates.pieces(), keep), start.scale)
    else:
        target = exact_mean(_padded(spool.passing(updates) if keep else updates, sent), start.scale)
    return target, factors.missed(spool, sent, target) if config.rule == "fedex" else {}, memory


def _padded(updates: Iterable[Any], like: Tensors) -> Iterator[Any]:
    for update in updates:
        yield replace(update, tensors=factors.padded(update.tensors, like))


def _measured(updates: Iterable[Sent], sent: Tensors, moves: list[float]) -> Iterator[Sent]:
    for update in updates:
        moves.append(move(update.tensors, sent))
        yield update
