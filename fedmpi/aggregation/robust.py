"""Robust rules: an aggregate that a minority of hostile updates cannot take where it likes. Every update counts as one.

Most of these rules choose a combination of the updates by their distances alone, so they are functions of the updates' Gram
matrix, and the combination is taken block by block; median and trimmed mean look at each coordinate. Memory is one block of
every update. Conventions are those of ByzFL (arXiv 2505.24802), which a test compares with. They know moves, never clients.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch

from fedmpi.aggregation import Config
from fedmpi.aggregation.spool import Spool
from fedmpi.tensors import Tensors

BLOCK = 1 << 18
CENTRE = "centre/"
NU = 1e-6  # distances below it count as it, in the geometric median


def combine(spool: Spool, sent: Tensors, config: Config, memory: Tensors) -> tuple[Tensors, Tensors]:
    """The robust aggregate of the updates in the spool, and what centred clipping remembers: where the last one moved to."""
    names = sorted(spool.names(next(iter(spool.shares))))
    num = len(spool.shares)
    hostile = num_hostile(config.hostile, num)
    centred = config.robust == "centred_clipping"
    centre = {name: memory[CENTRE + name].double() for name in names if centred and CENTRE + name in memory}
    by_coordinate = COORDINATE.get(config.robust)
    mix = torch.eye(num, dtype=torch.float64)
    if config.mixing or by_coordinate is None:
        gram = sum((rows @ rows.T for _, _, rows in _blocks(spool, sent, names, centre)), torch.zeros_like(mix))
        mix = nearest(gram, hostile) if config.mixing else mix
    if by_coordinate is None:
        chosen = coefficients(mix @ gram @ mix.T, config, hostile) @ mix
        moves = _assemble(sent, centre, _blocks(spool, sent, names, centre), lambda rows: chosen @ rows)
    else:
        moves = _assemble(sent, centre, _blocks(spool, sent, names, centre), lambda rows: by_coordinate(mix @ rows, hostile))
    after = {name: (sent[name].double() + move).to(sent[name].dtype) for name, move in moves.items()}
    return after, memory | ({CENTRE + name: move.float() for name, move in moves.items()} if centred else {})


def num_hostile(share: float, num: int) -> int:
    """How many of `num` updates are taken for hostile: the share as typed, rounded up, and always a minority."""
    return min(math.ceil(Fraction(str(share)) * num), (num - 1) // 2)


def _blocks(spool: Spool, sent: Tensors, names: list[str], centre: Tensors) -> Iterator[tuple[str, slice, torch.Tensor]]:
    """Block by block, how far each update has moved from the centre, one row for each in the order of clients."""
    for name in names:
        origin = sent[name].reshape(-1).double()
        if name in centre:
            origin = origin + centre[name].reshape(-1)
        for start in range(0, origin.numel(), BLOCK):
            stop = min(start + BLOCK, origin.numel())
            rows = torch.stack([spool.slice(client, name, start, stop) for client in spool.shares])
            yield name, slice(start, stop), rows - origin[start:stop]


def _assemble(
    sent: Tensors,
    centre: Tensors,
    blocks: Iterator[tuple[str, slice, torch.Tensor]],
    rule: Callable[[torch.Tensor], torch.Tensor],
) -> Tensors:
    """The aggregate move in float64: what the rule makes of each block, from the centre on."""
    moves: Tensors = {}
    for name, where, rows in blocks:
        if name not in moves:
            moves[name] = torch.zeros(sent[name].shape, dtype=torch.float64)
        moves[name].view(-1)[where] = rule(rows)
    return {name: move + centre[name] if name in centre else move for name, move in moves.items()}


# ---- by coordinate --------------------------------------------------------------------------------------------------------------


def median(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """The middle value of each coordinate; of an even number, the mean of the two in the middle."""
    ordered, num = rows.sort(dim=0).values, len(rows)
    return (ordered[(num - 1) // 2] + ordered[num // 2]) / 2


def trimmed_mean(rows: torch.Tensor, hostile: int) -> torch.Tensor:
    """The mean of each coordinate without the lowest and the highest values."""
    return rows.sort(dim=0).values[hostile : len(rows) - hostile].mean(0)


COORDINATE: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"median": median, "trimmed_mean": trimmed_mean}


# ---- by distances ---------------------------------------------------------------------------------------------------------------


def coefficients(gram: torch.Tensor, config: Config, hostile: int) -> torch.Tensor:
    """How much of each update the aggregate takes."""
    if config.robust == "geometric_median":
        return geometric_median(gram, config.iterations)
    if config.robust == "clipping":
        return clipping(gram, config.radius)
    if config.robust == "centred_clipping":
        return centred_clipping(gram, config.radius, config.iterations)
    return krum(gram, hostile, 1 if config.robust == "krum" else len(gram) - hostile)


def squares(gram: torch.Tensor) -> torch.Tensor:
    """The squared distances between all rows."""
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp(min=0)


def nearest(gram: torch.Tensor, hostile: int) -> torch.Tensor:
    """Nearest-neighbour mixing: each row becomes the mean of the rows nearest to it, itself among them."""
    near = squares(gram).argsort(dim=1, stable=True)[:, : len(gram) - hostile]
    return torch.zeros_like(gram).scatter_(1, near, 1 / (len(gram) - hostile))


def krum(gram: torch.Tensor, hostile: int, kept: int) -> torch.Tensor:
    """The mean of the `kept` rows that have their neighbours nearest; of equals, the first."""
    score = squares(gram).sort(dim=1).values[:, 1 : len(gram) - hostile].sum(1)
    best = score.argsort(stable=True)[:kept]
    return torch.zeros(len(gram), dtype=gram.dtype).index_fill_(0, best, 1 / kept)


def geometric_median(gram: torch.Tensor, iterations: int, nu: float = NU) -> torch.Tensor:
    """The point with the least sum of distances to all rows (RFA), by Weiszfeld's steps from zero on."""
    chosen = torch.zeros(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        inverse = 1 / _distances(gram, chosen).clamp(min=nu)
        chosen = inverse / inverse.sum()
    return chosen


def clipping(gram: torch.Tensor, radius: float | None) -> torch.Tensor:
    """The mean of the rows, each shortened to the radius."""
    return _shortening(gram.diagonal().clamp(min=0).sqrt(), radius) / len(gram)


def centred_clipping(gram: torch.Tensor, radius: float | None, iterations: int) -> torch.Tensor:
    """Steps from zero on, each the mean of the ways to all rows, shortened to the radius."""
    chosen = torch.zeros(len(gram), dtype=gram.dtype)
    for _ in range(iterations):
        factors = _shortening(_distances(gram, chosen), radius) / len(gram)
        chosen = chosen + factors - factors.sum() * chosen
    return chosen


def _distances(gram: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """From each row to the combination of rows that `chosen` gives."""
    return (gram.diagonal() - 2 * gram @ chosen + chosen @ gram @ chosen).clamp(min=0).sqrt()


def _shortening(lengths: torch.Tensor, radius: float | None) -> torch.Tensor:
    """Factors that bring lengths down to the radius, or to their median."""
    bound = lengths.quantile(0.5) if radius is None else torch.tensor(radius, dtype=lengths.dtype)
    return torch.where(lengths > bound, bound / lengths, torch.ones_like(lengths))
