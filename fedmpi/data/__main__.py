"""`python -m fedmpi.data NAME`: who the clients of a data set are. It must never know a model."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from fedmpi import config
from fedmpi.data import Config
from fedmpi.data.clients import Federated, federate
from fedmpi.errors import FedmpiError


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


def main(arguments: Sequence[str]) -> int:
    """Print the table, or one line that says why there is none."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data.name", *arguments]
    try:
        given = config.parse(Show, arguments, "python -m fedmpi.data [NAME]", "Print the clients of a data set.")
        settings = Show(given.clients, given.seed, given.data)
        print(table(federate(settings.data, settings.clients, settings.seed)))
    except FedmpiError as error:
        config.fail(error, "data")
        return 2
    return 0


def table(federated: Federated) -> str:
    """A line per client, then totals, largest, smallest and standard deviation of the training rows."""
    lines = [f"{'client':>6}  {'train':>7}  {'held out':>8}  categories"]
    for client, share in zip(federated.clients, federated.client_categories, strict=True):
        named = ", ".join(f"{name} {num}" for name, num in sorted(share.items(), key=lambda item: -item[1]) if name)
        lines.append(f"{client.id:>6}  {len(client.train):>7}  {len(client.heldout):>8}  {named or '-'}")
    return "\n".join([*lines, *_totals(federated)])


def _totals(federated: Federated) -> list[str]:
    train = numpy.array([len(client.train) for client in federated.clients])
    record = federated.record
    counts = f"{train.sum()} training rows, {len(federated.heldout)} held out ({record['heldout']})"
    return [
        f"{record['name']}, splitter {record['splitter']}: {len(train)} clients, {counts}",
        f"rows to train on: max {train.max()}, min {train.min()}, mean {train.mean():.1f}, std {train.std():.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
