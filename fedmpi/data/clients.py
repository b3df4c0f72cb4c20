"""From a corpus to its clients: who trains on which rows, and is measured on which. It must never know ranks."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy

from fedmpi.data import Config, corpora, prompts, splitters, verbs
from fedmpi.data.corpora import Corpus, Row
from fedmpi.data.declared import FEDERATED
from fedmpi.errors import ConfigError, DataError
from fedmpi.seeding import seed_for

COMMON = "heldout"  # with splitter given: site/heldout.jsonl beside the clients' files
HELDOUT_SHARE = 0.1  # of each client's rows, where a corpus has no test split
SAMPLES = ("rows", "tokens", "cut", "cut_responses", "dropped")


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
    client_categories: tuple[dict[str, int], ...]  # training rows by category, or by root verb where that is the splitter
    record: dict[str, object]  # equal on every rank
    heldout_from: str
    sites: Mapping[int, Mapping[str, object]] = field(default_factory=dict)  # splitter given: of each client opened here

    def known(self, told: Mapping[int, Mapping[str, Any]]) -> dict[str, object]:
        """The record with what the clients' ranks tell of their rows; with splitter given nobody else knows it."""
        by_client = [told[client] for client in sorted(told)]
        found: dict[str, object] = {"samples": {key: [int(one["samples"][key]) for one in by_client] for key in SAMPLES}}
        if self.record["splitter"] == "given":
            found |= {key: [int(one[key]) for one in by_client] for key in ("train_rows", "heldout_rows")}
            found["sha256"] = [str(one["sha256"]) for one in by_client]
        return {**self.record, "heldout": self.heldout_from, **found}


def federate(
    config: Config, num_clients: int | None, seed: int, only: Collection[int] | None = None, measures: bool = True
) -> Federated:
    """Load the corpus and deal it. None clients: as many as the data set fixes.

    With splitter given, `only` says which clients' files are opened; the others stand in the result with no rows. Then
    `heldout` holds the rows of site/heldout.jsonl for who measures, none where there is no such file: what clients hold out
    stays with them.
    """
    if config.splitter == "given":
        return _given(config, num_clients, seed, only, measures)
    corpus = _with_test(corpora.load(config, seed), config.heldout_per_category, seed)
    splitter = _splitter(config, corpus)
    clients = _num_clients(num_clients, corpus, splitter)
    dealt, labels = _split(config, corpus, splitter, clients, seed)
    shares = tuple(_counts(part) for part in labels)
    if corpus.test:
        parts = splitters.follow(shares, _labels(corpus.test, splitter), seed, strangers=splitter == "root_verb")
        pairs = [(rows, [corpus.test[i] for i in part]) for rows, part in zip(dealt, parts, strict=True)]
    else:
        pairs = [_hold_out(rows, client, seed) for client, rows in enumerate(dealt)]
    data = tuple(ClientData(client, train, heldout) for client, (train, heldout) in enumerate(pairs))
    heldout = corpus.test or [row for client in data for row in client.heldout]
    shares = tuple(_counts(_labels(client.train, splitter)) for client in data)
    return Federated(data, heldout, shares, _record(config, corpus, splitter, data, shares), _heldout(config, corpus, data))


def _given(config: Config, num_clients: int | None, seed: int, only: Collection[int] | None, measures: bool) -> Federated:
    """Every client has a file of its own; only the wanted ones are opened, and nobody holds rows of another.

    A file that stands at `heldout` in the place of a client is nobody's and is what the server may measure with.
    """
    if num_clients is None or num_clients < 1:
        raise ConfigError(f"clients is {num_clients}: data.splitter given needs --clients N, as no rank sees all files")
    if config.name in FEDERATED or config.heldout_per_category or config.num_rows:
        raise ConfigError(
            "data.splitter given takes each client's file as it is: leave out fed-..., data.heldout_per_category and data.num_rows"
        )
    if "{client}" not in (config.path or ""):
        raise ConfigError(
            f"data.path is {config.path}: data.splitter given needs a place for the client, as in site/{{client}}.jsonl"
        )
    wanted = range(num_clients) if only is None else sorted(only)
    opened = {client: _site(config, str(client), seed) for client in wanted}
    pairs = {client: (c.train, c.test) if c.test else _hold_out(c.train, client, seed) for client, c in opened.items()}
    data = tuple(ClientData(client, *pairs.get(client, ([], []))) for client in range(num_clients))
    shares = tuple(_counts([row.category for row in client.train]) for client in data)
    common = _site(config, COMMON, seed).train if measures and has_common(config) else []
    record: dict[str, object] = {
        **{"name": config.name, "corpus": config.name, "licence": corpora.declaration(config.name).licence},
        **{"splitter": "given", "template": config.template, "template_hash": prompts.template_hash(config.template)},
    }
    told = {client: {"train_rows": len(train), "heldout_rows": len(held)} for client, (train, held) in pairs.items()}
    sites = {client: {**told[client], **c.files["train"]} for client, c in opened.items()}
    whence = f"{len(common)} rows in a file of their own" if common else "a test file, or 10% of the rows, of each client"
    return Federated(data, common, shares, record, whence, sites)


def has_common(config: Config) -> bool:
    """Whether there are rows to measure with that are nobody's, beside files that clients bring."""
    return config.splitter == "given" and Path(_path(config, COMMON)).expanduser().exists()


def _path(config: Config, client: str) -> str:
    return (config.path or "").replace("{client}", client)


def _site(config: Config, client: str, seed: int) -> Corpus:
    """One client's corpus; its rows are named after the client, as every file counts from 0."""
    found = corpora.load(replace(config, path=_path(config, client)), seed)
    train, test = ([replace(row, id=f"{client}:{row.id}") for row in rows] for rows in (found.train, found.test))
    return replace(found, train=train, test=test)


def _splitter(config: Config, corpus: Corpus) -> str:
    fixed = corpus.federated
    if fixed and config.splitter not in ("auto", fixed.splitter):
        raise ConfigError(
            f"data.splitter is {config.splitter}, but {corpus.name} fixes {fixed.splitter}: give data.name {fixed.corpus}"
        )
    if fixed:
        return fixed.splitter
    return corpus.declared.splitter if config.splitter == "auto" else config.splitter


def _labels(rows: Sequence[Row], splitter: str) -> list[str]:
    """What a splitter deals by: the category, or the verb that an instruction begins with."""
    return [verbs.root_verb(row.instruction) for row in rows] if splitter == "root_verb" else [row.category for row in rows]


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
    fixed = corpus.federated
    if num_clients is not None and num_clients < 1:
        raise ConfigError(f"clients is {num_clients}: it must be at least 1")
    if fixed:
        if num_clients not in (None, fixed.clients):
            raise ConfigError(f"clients is {num_clients}, but {corpus.name} fixes {fixed.clients}: give data.name {fixed.corpus}")
        return fixed.clients
    if num_clients is not None:
        return num_clients
    if splitter == "meta":
        return len({row.category for row in corpus.train})
    if corpus.declared.clients is None:
        raise ConfigError(f"{corpus.name} with splitter {splitter} fixes no number of clients: give --clients N")
    return corpus.declared.clients


def _split(config: Config, corpus: Corpus, splitter: str, clients: int, seed: int) -> tuple[list[list[Row]], list[list[str]]]:
    """Each client's rows and their labels."""
    labels = _labels(corpus.train, splitter)
    if splitter not in ("iid", "quantity") and not any(labels):
        raise ConfigError(
            f"data.splitter {splitter} needs categories, {corpus.name} has none: use iid, or data.fields category=NAME"
        )
    if corpus.federated and splitter == "meta" and (found := len(set(labels))) != clients:
        raise DataError(f"{corpus.name} is {clients} categories, a client each, but the file has {found}: give the whole file")
    least = max(config.min_rows, 1 if corpus.test else 2)  # one to train on and one to hold out
    options = {"alpha": config.alpha, "min_rows": least, "balance": config.balance, "shards": config.shards}
    dealt = splitters.split(labels, clients, splitter, seed, **options)  # type: ignore[arg-type]
    for client, rows in enumerate(dealt):
        if not rows:
            raise DataError(f"client {client} of {clients} gets no rows from splitter {splitter}: use fewer clients")
    return [[corpus.train[i] for i in rows] for rows in dealt], [[labels[i] for i in rows] for rows in dealt]


def _hold_out(rows: list[Row], client: int, seed: int) -> tuple[list[Row], list[Row]]:
    num = max(1, int(len(rows) * HELDOUT_SHARE))
    if len(rows) <= num:
        raise DataError(f"client {client} has {len(rows)} row, which is held out, and none to train on: use fewer clients")
    chosen = set(numpy.random.default_rng(seed_for(seed, "heldout", client)).choice(len(rows), num, replace=False).tolist())
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _counts(labels: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(labels).items()))


def _record(
    config: Config, corpus: Corpus, splitter: str, clients: Sequence[ClientData], shares: Sequence[dict[str, int]]
) -> dict[str, object]:
    published, fixed = corpus.declared.rows, corpus.federated
    return {
        "name": corpus.name,
        "corpus": fixed.corpus if fixed else corpus.name,
        "licence": corpus.declared.licence,
        "files": {part: dict(found) for part, found in corpus.files.items()},
        "published_rows": list(published) if published else None,
        "splitter": splitter,
        "splitter_options": _options(config, splitter),
        "template": config.template,
        "template_hash": prompts.template_hash(config.template),
        "train_rows": [len(client.train) for client in clients],
        "heldout_rows": [len(client.heldout) for client in clients],
        "client_categories": [dict(share) for share in shares],
    }


def _options(config: Config, splitter: str) -> dict[str, object]:
    """The settings that this splitter reads."""
    read = {
        "dirichlet": ("alpha", "min_rows", "balance"),
        "quantity": ("alpha", "min_rows"),
        "shards": ("shards",),
        "unequal_shards": ("shards", "alpha", "min_rows"),
    }
    return {name: getattr(config, name) for name in read.get(splitter, ())}


def _heldout(config: Config, corpus: Corpus, clients: Sequence[ClientData]) -> str:
    if not corpus.test:
        return f"{HELDOUT_SHARE:.0%} of each client's rows"
    without = sum(not client.heldout for client in clients)
    said = f"{config.heldout_per_category} rows of each category" if config.heldout_per_category else "test split"
    return f"{said}; {without} clients have none of it" if without else said
