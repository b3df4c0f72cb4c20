"""An algorithm of one's own: FedAvg in which some clients lie, to see what `--aggregation.robust` bears. The attacks are those of
ByzFL (arXiv 2505.24802): hostile clients know what all others are about to send.

    cd examples && python -m fedmpi.run --algorithm hostile --hostile.attack sign_flip --clients 8 \
        --weights equal --aggregation.robust multi_krum

The file exports what every algorithm does (CONTRIBUTING.md lists it) and takes from FedAvg what stays as it is. Its own settings
are the fields of Config. Nothing is registered: the name on the command line is the module's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fedmpi import models, training
from fedmpi.algorithms import fedavg
from fedmpi.data import Example
from fedmpi.federation import Federation, Update
from fedmpi.hosting.host import Host
from fedmpi.round import Round
from fedmpi.seeding import seed_for
from fedmpi.tensors import Tensors

SINGLE = True  # who lies has seen what every other client sends


@dataclass(frozen=True)
class Config:
    """Who lies, and how.

    Args:
        attack: none; sign_flip = the opposite of one's own move; inner_product = against the mean of the honest; alie = the mean of
            the honest, moved by 1.5 of their deviations, which hides among them; noise = ten times one's own move, at random;
            label_poison = an honest turn on wrong labels
        clients: the first so many are hostile
    """

    attack: Literal["none", "sign_flip", "inner_product", "alie", "noise", "label_poison"] = "sign_flip"
    clients: int = 2


@dataclass(frozen=True)
class Server(fedavg.Server):
    """FedAvg's, and the settings."""

    config: Config = field(default_factory=Config)


@dataclass(frozen=True)
class Client(fedavg.Client):
    """FedAvg's, and whether its labels are wrong."""

    poisoned: bool = False


def build_server(config: Config, host: Host) -> Server:
    """The adapter as it begins."""
    return Server(host, host.base.fresh, config=config)


def build_client(config: Config, host: Host, client: int) -> Client:
    """A client value, which knows whether to be honest."""
    return Client(client, host, poisoned=config.attack == "label_poison" and client < config.clients)


def run_round(fed: Federation, rnd: Round, server: Server | None, clients: Mapping[int, Client]) -> Server | None:
    """FedAvg's round, but between gathering and aggregating the hostile replace what they sent."""
    sent = fed.broadcast(server.host.outgoing(server.adapter) if server else None)
    check = server.host.check(server, rnd) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)
    if server:
        updates = sorted(received, key=lambda update: update.client)
        server = server.host.aggregate(server, [attacked(update, updates, server, rnd) for update in updates], rnd)
    return server


def client_update(client: Client, sent: Tensors, rnd: Round) -> Update:
    """FedAvg's turn, or the same on wrong labels."""
    if not client.poisoned:
        return fedavg.client_update(client, sent, rnd)
    vocabulary = client.host.base.model.config.vocab_size
    wrong = [poisoned(example, vocabulary) for example in client.host.examples(client.id)]
    with client.host.turn(client.id, sent, rnd) as model:
        seed = seed_for(rnd.seed, "fit", client.id)
        fit = training.fit(model, wrong, client.host.train, seed=seed, pad_id=client.host.base.pad_id)
        return Update(client.id, models.trainable(model), fit.metrics())


def poisoned(example: Example, vocabulary: int) -> Example:
    """Every supervised token is to be the one opposite in the vocabulary."""
    return replace(example, labels=[vocabulary - 1 - label if label >= 0 else label for label in example.labels])


def attacked(update: Update, updates: list[Update], server: Server, rnd: Round) -> Update:
    """What a hostile client sends in the place of its update; an honest one's as it is."""
    lie = LIES.get(server.config.attack)
    if lie is None or update.client >= server.config.clients:
        return update
    noise = torch.Generator().manual_seed(seed_for(rnd.seed, "noise", update.client))
    tensors = {}
    for name, tensor in update.tensors.items():
        origin = server.adapter[name]
        honest = [other.tensors[name] - origin for other in updates if other.client >= server.config.clients]
        tensors[name] = origin + lie(tensor - origin, torch.stack(honest or [tensor - origin]), noise)
    return replace(update, tensors=tensors)


Lie = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]  # own move, honest moves -> a move
LIES: dict[str, Lie] = {
    "sign_flip": lambda own, honest, noise: -3.0 * own,
    "inner_product": lambda own, honest, noise: -3.0 * honest.mean(0),
    "alie": lambda own, honest, noise: honest.mean(0) - 1.5 * honest.std(0, correction=0),
    "noise": lambda own, honest, noise: 10.0 * own.square().mean().sqrt() * torch.randn(own.shape, generator=noise),
}
