"""`python -m fedmpi.data NAME`: who the clients of a data set are. Of a model it knows the tokenizer, where one is named."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from fedmpi import config
from fedmpi.command import FINISHED, guarded
from fedmpi.data import Config
from fedmpi.data.clients import ClientData, Federated, federate
from fedmpi.data.declared import FEDERATED, Published
from fedmpi.data.prompts import Counts


@dataclass(frozen=True)
class Tokenizer:
    """Whose tokens are counted.

    Args:
        path: a folder, a hub id, or builtin:tiny; default none, and only rows are counted
    """

    path: str | None = None


@dataclass(frozen=True)
class Show:
    """Print the clients of a data set.

    Args:
        clients: number of clients; default what the data set fixes
        seed: the seed of the split
    """

    clients: int | None = None
    seed: int = 0
    data: Config = field(default_factory=Config)
    model: Tokenizer = field(default_factory=Tokenizer)


def main(arguments: Sequence[str]) -> int:
    """Print the table, or one line that says why there is none."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data.name", *arguments]
    return guarded(lambda: show(arguments), "data")


def show(arguments: Sequence[str]) -> int:
    """Read, deal, print."""
    given = config.parse(Show, arguments, "python -m fedmpi.data [NAME]", "Print the clients of a data set.")
    settings = Show(given.clients, given.seed, given.data, given.model)
    federated = federate(settings.data, settings.clients, settings.seed)
    print(table(federated, count(federated, settings)))
    return FINISHED


def count(federated: Federated, settings: Show) -> list[Counts] | None:
    """Tokens of each client's training rows, where a tokenizer is named."""
    if settings.model.path is None:
        return None
    from fedmpi import models
    from fedmpi.data import tokenize

    tokenizer = models.load_tokenizer(models.Config(path=settings.model.path))
    return [tokenize(client.train, tokenizer, settings.data)[1] for client in federated.clients]


def table(federated: Federated, counts: list[Counts] | None = None) -> str:
    """A line per client, then totals, largest, smallest and standard deviation of the rows, and what a paper prints of them."""
    lines = [f"{'client':>6}  {'train':>7}  {'held out':>8}{'  tokens'.rjust(12) if counts else ''}  categories"]
    for client, share in zip(federated.clients, federated.client_categories, strict=True):
        tokens = f"  {counts[client.id].tokens:>10}" if counts else ""
        lines.append(f"{client.id:>6}  {len(client.train):>7}  {len(client.heldout):>8}{tokens}  {_named(share)}")
    lines += _totals(federated) + (_token_totals(counts) if counts else [])
    fixed = FEDERATED.get(str(federated.record["name"]))
    return "\n".join([*lines, *(compare(federated, fixed.published) if fixed else [])])


def compare(federated: Federated, published: Published) -> list[str]:
    """The clients' whole volumes, before anything is held out, beside those that a paper prints."""
    dealt = numpy.array([_volume(federated, client) for client in federated.clients])
    ours = {"rows": int(dealt.sum()), "clients": len(dealt), "max": int(dealt.max()), "min": int(dealt.min()), "std": dealt.std()}
    theirs = (published.rows, published.clients, published.largest, published.smallest, published.std)
    named = [(name, mine, other) for (name, mine), other in zip(ours.items(), theirs, strict=True) if other is not None]
    within = {"rows": published.rows_to - 1, "std": 0.005}
    unlike = [
        f"{name} {round(mine, 2):.10g} here, {other:.10g} there"
        for name, mine, other in named
        if abs(mine - other) > within.get(name, 0)
    ]
    whole = f"whole volumes: max {ours['max']}, min {ours['min']}, std {ours['std']:.2f}"
    if not unlike:
        return [whole, f"{published.where}: all {len(named)} numbers are the same"]
    return [whole, f"{published.where} counts another release or part of this corpus: {'; '.join(unlike)}"]


def _volume(federated: Federated, client: ClientData) -> int:
    from_clients = len(federated.heldout) and federated.heldout_from.endswith("of each client's rows")
    return len(client.train) + (len(client.heldout) if from_clients else 0)


def _named(share: dict[str, int]) -> str:
    largest = sorted(((name, num) for name, num in share.items() if name), key=lambda item: -item[1])
    more = f", and {len(largest) - 8} more" if len(largest) > 9 else ""
    return ", ".join(f"{name} {num}" for name, num in largest[: 8 if more else 9]) + more or "-"


def _totals(federated: Federated) -> list[str]:
    train = numpy.array([len(client.train) for client in federated.clients])
    record = federated.record
    counts = f"{train.sum()} training rows, {len(federated.heldout)} held out ({federated.heldout_from})"
    lines = [
        f"{record['name']}, splitter {record['splitter']}: {len(train)} clients, {counts}",
        f"rows to train on: max {train.max()}, min {train.min()}, mean {train.mean():.1f}, std {train.std():.2f}",
    ]
    return [*lines, *_left_out(federated)]


def _left_out(federated: Federated) -> list[str]:
    """What of the files is not among the rows, or was changed in them."""
    lines = []
    files = federated.record.get("files") or {f"client {client}": facts for client, facts in federated.sites.items()}
    assert isinstance(files, dict)
    for part, facts in files.items():
        if facts.get("dropped"):
            lines.append(f"{part}: left out {', '.join(f'{num} {name}' for name, num in facts['dropped'].items())}")
        if facts.get("cleaned"):
            lines.append(f"{part}: characters replaced in {facts['cleaned']} rows")
    return lines


def _token_totals(counts: list[Counts]) -> list[str]:
    tokens = numpy.array([count.tokens for count in counts])
    cut, ends, dropped = (sum(getattr(count, name) for count in counts) for name in ("cut", "cut_responses", "dropped"))
    return [
        f"tokens: {tokens.sum()} in all, max {tokens.max()}, min {tokens.min()}, std {tokens.std():.2f}",
        f"samples cut for length: {cut}, of these {ends} in the response; without a token to learn, dropped: {dropped}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
