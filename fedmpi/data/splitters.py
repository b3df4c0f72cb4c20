"""Splitters: which rows go to which client: pure functions of labels, clients and a seed. They must never see a row."""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from fedmpi.errors import DataError
from fedmpi.seeding import seed_for

Split = list[list[int]]
DRAWS = 1000  # dirichlet: how often a split with too small a client is drawn anew


def split(
    labels: Sequence[str],
    clients: int,
    splitter: str,
    seed: int,
    *,
    alpha: float = 0.5,
    min_rows: int = 1,
    balance: bool = False,
    shards: int = 2,
) -> Split:
    """Deal rows to clients: for each client its rows' indices, ascending. Every row goes to exactly one client."""
    if len(labels) < clients:
        raise DataError(f"there are {len(labels)} rows for {clients} clients: use fewer clients or more rows")
    rng = numpy.random.default_rng(seed_for(seed, "split", splitter))
    if splitter == "iid":
        return _sorted(numpy.array_split(rng.permutation(len(labels)), clients))
    if splitter == "meta":
        return _meta(labels, clients, rng)
    if splitter in ("shards", "unequal_shards"):
        volumes = None if splitter == "shards" else _volumes(len(labels), clients, alpha, max(min_rows, shards), rng)
        return _shards(labels, clients, shards, volumes, rng)
    if splitter == "quantity":
        ends = numpy.cumsum(_volumes(len(labels), clients, alpha, min_rows, rng))
        return _sorted(numpy.split(rng.permutation(len(labels)), ends[:-1]))
    if splitter == "root_verb":
        return _whole(labels, clients, rng)
    assert splitter == "dirichlet", splitter
    return _dirichlet(labels, clients, alpha, min_rows, balance, rng)


def follow(shares: Sequence[dict[str, int]], labels: Sequence[str], seed: int, strangers: bool = False) -> Split:
    """Deal other rows by a split that stands: of each category a client gets the share it has of the training rows.

    A category that no client has is refused, or with `strangers` dealt by the volume of the clients.
    """
    rng = numpy.random.default_rng(seed_for(seed, "follow"))
    dealt: Split = [[] for _ in shares]
    for category, rows in _by_category(labels, rng):
        weights = numpy.array([share.get(category, 0) for share in shares], dtype=float)
        if strangers and not weights.any():
            weights = numpy.array([sum(share.values()) for share in shares], dtype=float)
        if not weights.any():
            raise DataError(f"the test rows have category {category!r}, which no client has among its training rows")
        _deal(rows, weights / weights.sum(), dealt)
    return _sorted(dealt)


def _meta(labels: Sequence[str], clients: int, rng: numpy.random.Generator) -> Split:
    """A client is a category: category i goes to client i modulo clients.

    With more clients than categories it is shared evenly by the clients that are i modulo categories.
    """
    dealt: Split = [[] for _ in range(clients)]
    groups = _by_category(labels, rng)
    for i, (_, rows) in enumerate(groups):
        owners = range(i, clients, len(groups)) if i < clients else [i % clients]
        for owner, part in zip(owners, numpy.array_split(rows, len(owners)), strict=True):
            dealt[owner].extend(part.tolist())
    return _sorted(dealt)


def _shards(
    labels: Sequence[str], clients: int, shards: int, volumes: NDArray[numpy.int64] | None, rng: numpy.random.Generator
) -> Split:
    """Rows in the order of their categories, cut into shards, so many for a client (Shepherd's two allocations).

    A client's shards are equal; without volumes so are all. Shards lie in a random order, so which categories a client
    gets is drawn, and it gets few of them.
    """
    if len(labels) < clients * shards:
        raise DataError(
            f"{len(labels)} rows are too few for {clients} clients of {shards} shards: use fewer clients or data.shards"
        )
    ordered = numpy.concatenate([rows for _, rows in _by_category(labels, rng)])
    turns = rng.permutation(clients * shards)  # the shard that lies at each place belongs to client turn // shards
    even = numpy.full(clients * shards, 1 / (clients * shards))
    if volumes is None:
        sizes = _apportion(len(labels), even)
    else:
        of_client = [_apportion(int(volume), numpy.full(shards, 1 / shards)) for volume in volumes]
        sizes = numpy.concatenate(of_client)[turns]
    parts = numpy.split(ordered, numpy.cumsum(sizes)[:-1])
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for turn, part in zip(turns.tolist(), parts, strict=True):
        dealt[turn // shards].extend(part.tolist())
    return _sorted(dealt)


def _volumes(rows: int, clients: int, alpha: float, min_rows: int, rng: numpy.random.Generator) -> NDArray[numpy.int64]:
    """How many rows each client gets: at least `min_rows`, the rest by Dirichlet(alpha)."""
    left = rows - clients * min_rows
    if left < 0:
        raise DataError(f"{rows} rows are too few for {clients} clients of {min_rows} each: use fewer clients or data.min_rows")
    shares = rng.dirichlet(numpy.full(clients, alpha))
    if not shares.sum() > 0:  # underflow at a tiny alpha: all of the rest to one client
        shares = numpy.eye(clients)[rng.integers(clients)]
    return min_rows + _apportion(left, shares / shares.sum())


def _whole(labels: Sequence[str], clients: int, rng: numpy.random.Generator) -> Split:
    """Categories stay whole: the largest first, each to the client that has the fewest rows so far."""
    groups = sorted(_by_category(labels, rng), key=lambda group: (-len(group[1]), group[0]))
    if len(groups) < clients:
        raise DataError(f"{len(groups)} root verbs cannot be dealt whole to {clients} clients: use fewer clients")
    dealt: Split = [[] for _ in range(clients)]
    for _, rows in groups:
        min(dealt, key=len).extend(rows.tolist())
    return _sorted(dealt)


def _dirichlet(
    labels: Sequence[str], clients: int, alpha: float, min_rows: int, balance: bool, rng: numpy.random.Generator
) -> Split:
    """Each category is shared by Dirichlet(alpha), drawn anew while a client stays under `min_rows`."""
    groups = _by_category(labels, rng)
    best = 0
    for _ in range(DRAWS):
        counts = _draw_counts([len(rows) for _, rows in groups], clients, alpha, balance, rng)
        smallest = int(counts.sum(axis=0).min())
        if smallest >= min_rows:
            parts = [numpy.split(rows, numpy.cumsum(row)[:-1]) for (_, rows), row in zip(groups, counts, strict=True)]
            return _sorted([numpy.concatenate([part[client] for part in parts]) for client in range(clients)])
        best = max(best, smallest)
    raise DataError(
        f"dirichlet: no draw of {DRAWS} gave each of {clients} clients {min_rows} of {len(labels)} rows (best {best}): "
        "raise data.alpha, set data.balance, lower data.min_rows, or use fewer clients"
    )


def _draw_counts(sizes: list[int], clients: int, alpha: float, balance: bool, rng: numpy.random.Generator) -> NDArray[numpy.int64]:
    """Rows of each category (first axis) for each client (second axis)."""
    counts = numpy.zeros((len(sizes), clients), dtype=numpy.int64)
    even_share = sum(sizes) / clients
    for category, size in enumerate(sizes):
        shares = rng.dirichlet(numpy.full(clients, alpha))
        if balance:
            shares = shares * (counts.sum(axis=0) < even_share)
        if not shares.sum() > 0:  # underflow at a tiny alpha: all of it to one client that may have more
            shares = numpy.eye(clients)[rng.choice(numpy.flatnonzero(counts.sum(axis=0) <= even_share if balance else shares >= 0))]
        counts[category] = _apportion(size, shares / shares.sum())
    return counts


def _apportion(size: int, shares: NDArray[numpy.float64]) -> NDArray[numpy.int64]:
    """Whole numbers nearest to the shares that sum to `size`; what rounding leaves goes to the largest remainders."""
    exact = shares * size
    counts = numpy.floor(exact).astype(numpy.int64)
    left = size - int(counts.sum())
    counts[numpy.argsort(-(exact - counts), kind="stable")[:left]] += 1
    return counts


def _deal(rows: NDArray[numpy.int64], shares: NDArray[numpy.float64], dealt: Split) -> None:
    for client, part in enumerate(numpy.split(rows, numpy.cumsum(_apportion(len(rows), shares))[:-1])):
        dealt[client].extend(part.tolist())


def _by_category(labels: Sequence[str], rng: numpy.random.Generator) -> list[tuple[str, NDArray[numpy.int64]]]:
    """Categories in alphabetical order, each with its rows in a random order."""
    rows: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        rows.setdefault(label, []).append(index)
    return [(label, rng.permutation(numpy.array(rows[label], dtype=numpy.int64))) for label in sorted(rows)]


def _sorted(parts: Sequence[Sequence[int] | NDArray[numpy.int64]]) -> Split:
    return [sorted(int(i) for i in part) for part in parts]
