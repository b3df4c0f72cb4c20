"""FedAvg over adapters (FedIT): Zhang et al., Towards Building the Federated GPT, arXiv 2305.05644, Algorithm 1; weights as in
McMahan et al., arXiv 1602.05629. Numbers in comments are steps of FedIT's Algorithm 1 as its text describes them.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedmpi import federation, models, training
from fedmpi.seeding import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmpi.federation import Federation, Update
    from fedmpi.hosting.host import Host
    from fedmpi.round import Round
    from fedmpi.tensors import Tensors


@dataclass(frozen=True)
class Config:
    """FedAvg has no settings of its own."""


@dataclass(frozen=True)
class Server:
    """What only the server holds: the adapter that the rounds improve, and what its aggregation remembers and tells."""

    SAVED = ("adapter", "memory")
    host: "Host"
    adapter: "Tensors"
    memory: "Tensors" = field(default_factory=dict)
    figures: "Mapping[str, float]" = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """What one client holds: its examples and, where it is kept, its optimiser's state."""

    id: int
    host: "Host"
    owned: "Tensors | None" = None


def build_server(config: Config, host: "Host") -> Server:
    """The adapter as it begins: equal to nothing, from the run's seed."""
    return Server(host, host.base.fresh)


def build_client(config: Config, host: "Host", client: int) -> Client:
    """A client value; its examples live in the host, which tokenises them once."""
    return Client(client, host)


def run_round(fed: "Federation", rnd: "Round", server: Server | None, clients: "Mapping[int, Client]") -> Server | None:
    """One communication round. Every rank runs this; `server` is None and `clients` is empty where they do not live."""
    sent = fed.broadcast(
        server.host.outgoing(server.adapter) if server else None
    )  # 1: the server sends the global adapter to the cohort
    server = (
        replace(server, adapter=server.host.whole(sent)) if server else None
    )  # what everybody decoded is what the round stands on
    check = server.host.check(server, rnd) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)  # 2-3: local tuning, sending back
    if server:
        server = server.host.aggregate(server, received, rnd)  # 4: the mean, weighted by data size, or another rule
    return server


def client_update(client: Client, sent: "Tensors", rnd: "Round") -> "Update":
    """Tune the received adapter on the client's own examples; the base is frozen and shared by all clients of this process."""
    with client.host.turn(client.id, sent, rnd) as model:
        fit = training.fit(
            model,
            client.host.examples(client.id),
            client.host.train,
            seed=seed_for(rnd.seed, "fit", client.id),
            pad_id=client.host.base.pad_id,
            state=training.OptimState.of(client.owned) if client.owned else None,
        )
        return federation.Update(
            client=client.id,
            tensors=models.trainable(model),
            metrics=fit.metrics(),
            owned=fit.state.pack() if fit.state else None,
        )
