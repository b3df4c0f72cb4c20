"""From a corpus to its clients: who trains on which rows, and is measured on which. It must never know ranks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from fedmpi.data import Config, corpora, prompts, splitters
from fedmpi.data.corpora import Corpus, Row
from fedmpi.errors import ConfigError, DataError
from fedmpi.seeding import seed_for

HELDOUT_SHARE = 0.1  # of each client's rows, where a corpus has no test split


@dataclass(frozen=True)
class ClientData:
    """The rows of one client. `heldout` is never trained on and may be empty where a test split has nothing for it."""

    id: int
    train: list[Row]
    heldout: list[Row]


@dataclass(frozen=True)
class Federated:
    """All clients' rows, what each client has of each category, and how they came about, for the run record."""

    clients: tuple[ClientData, ...]
    heldout: list[Row]
    client_categories: tuple[dict[str, int], ...]  # training rows by category
    record: dict[str, object]


def federate(config: Config, num_clients: int | None, seed: int) -> Federated:
    """Load the corpus and deal it. None clients: as many as the data set fixes."""
    corpus = _with_test(corpora.load(config, seed), config.heldout_per_category, seed)
    splitter = corpus.declared.splitter if config.splitter == "auto" else config.splitter
    clients = _num_clients(num_clients, corpus, splitter)
    dealt = _split(config, corpus, splitter, clients, seed)
    shares = tuple(_categories(rows) for rows in dealt)
    if corpus.test:
        parts = splitters.follow(shares, [row.category for row in corpus.test], seed)
        pairs = [(rows, [corpus.test[i] for i in part]) for rows, part in zip(dealt, parts, strict=True)]
    else:
        pairs = [_hold_out(rows, client, seed) for client, rows in enumerate(dealt)]
        shares = tuple(_categories(train) for train, _ in pairs)
    data = tuple(ClientData(client, train, heldout) for client, (train, heldout) in enumerate(pairs))
    heldout = corpus.test or [row for client in data for row in client.heldout]
    return Federated(data, heldout, shares, _record(config, corpus, splitter, data, shares))


def _with_test(corpus: Corpus, per_category: int, seed: int) -> Corpus:
    """Shepherd's way: so many rows of each category leave the training rows and become the test split."""
    if not per_category:
        return corpus
    if corpus.test:
        raise ConfigError(f"data.heldout_per_category is {per_category}, but {corpus.name} has a test split: leave it at 0")
    rng = numpy.random.default_rng(seed_for(seed, "heldout"))
    chosen: set[int] = set()
    for category in sorted({row.category for row in corpus.train}):
        rows = [i for i, row in enumerate(corpus.train) if row.category == category]
        if len(rows) <= per_category:
            raise DataError(f"category {category!r} has {len(rows)} rows: too few for data.heldout_per_category {per_category}")
        chosen.update(rng.choice(rows, per_category, replace=False).tolist())
    train = [row for i, row in enumerate(corpus.train) if i not in chosen]
    return replace(corpus, train=train, test=[corpus.train[i] for i in sorted(chosen)])


def _num_clients(num_clients: int | None, corpus: Corpus, splitter: str) -> int:
    if num_clients is not None and num_clients < 1:
        raise ConfigError(f"clients is {num_clients}: it must be at least 1")
    if num_clients is not None:
        return num_clients
    if splitter == "meta":
        return len({row.category for row in corpus.train})
    if corpus.declared.clients is None:
        raise ConfigError(f"{corpus.name} with splitter {splitter} fixes no number of clients: give --clients N")
    return corpus.declared.clients


def _split(config: Config, corpus: Corpus, splitter: str, clients: int, seed: int) -> list[list[Row]]:
    labels = [row.category for row in corpus.train]
    if splitter != "iid" and not any(labels):
        raise ConfigError(
            f"data.splitter {splitter} needs categories, {corpus.name} has none: use iid, or data.fields category=NAME"
        )
    least = max(config.min_rows, 1 if corpus.test else 2)  # one to train on and one to hold out
    options = {"alpha": config.alpha, "min_rows": least, "balance": config.balance, "shards": config.shards}
    dealt = splitters.split(labels, clients, splitter, seed, **options)  # type: ignore[arg-type]
    for client, rows in enumerate(dealt):
        if not rows:
            raise DataError(f"client {client} of {clients} gets no rows from splitter {splitter}: use fewer clients")
    return [[corpus.train[i] for i in rows] for rows in dealt]


def _hold_out(rows: list[Row], client: int, seed: int) -> tuple[list[Row], list[Row]]:
    num = max(1, int(len(rows) * HELDOUT_SHARE))
    if len(rows) <= num:
        raise DataError(f"client {client} has {len(rows)} row, which is held out, and none to train on: use fewer clients")
    chosen = set(numpy.random.default_rng(seed_for(seed, "heldout", client)).choice(len(rows), num, replace=False).tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _categories(rows: Sequence[Row]) -> dict[str, int]:
    return dict(sorted(Counter(row.category for row in rows).items()))


def _record(
    config: Config, corpus: Corpus, splitter: str, clients: Sequence[ClientData], shares: Sequence[dict[str, int]]
) -> dict[str, object]:
    published = corpus.declared.rows
    return {
        "name": corpus.name,
        "files": {part: dict(found) for part, found in corpus.files.items()},
        "published_rows": list(published) if published else None,
        "splitter": splitter,
        "template": config.template,
        "template_hash": prompts.template_hash(config.template),
        "heldout": "test split" if corpus.test else f"{HELDOUT_SHARE:.0%} of each client's rows",
        "train_rows": [len(client.train) for client in clients],
        "heldout_rows": [len(client.heldout) for client in clients],
        "client_categories": [dict(share) for share in shares],
    }
