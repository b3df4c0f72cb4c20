"""FedProx over adapters: Li et al., Federated Optimization in Heterogeneous Networks, arXiv 1812.06127, Algorithm 2. Each client
minimises its own loss plus (mu/2) |w - w_t|^2, the squared distance of what it trains from what it received. Numbers in comments
are lines of Algorithm 2.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedmpi import federation, models, training
from fedmpi.errors import ConfigError
from fedmpi.seeding import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmpi.federation import Federation, Update
    from fedmpi.hosting.host import Host
    from fedmpi.round import Round
    from fedmpi.tensors import Tensors
    from fedmpi.training import Step


@dataclass(frozen=True)
class Config:
    """The proximal term.

    Args:
        mu: how strongly a client is held to what it received; 0 is FedAvg
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what would push clients away."""
        if not 0 <= self.mu < float("inf"):
            raise ConfigError(f"fedprox.mu is {self.mu}: give a finite number of at least 0")


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
    mu: float
    owned: "Tensors | None" = None


@dataclass(frozen=True)
class Proximal(training.Hook):
    """Adds mu (w - w_t), the gradient of the proximal term, to every step's."""

    mu: float
    origin: "Tensors"

    def after_backward(self, step: "Step") -> None:
        """Gradients are there, unclipped."""
        for name, parameter in step.model.named_parameters():
            if parameter.grad is not None:
                away = parameter.detach() - self.origin[name].to(parameter.device)
                parameter.grad.add_(away.to(parameter.grad.dtype), alpha=self.mu)


def build_server(config: Config, host: "Host") -> Server:
    """The adapter as it begins: equal to nothing, from the run's seed."""
    return Server(host, host.base.fresh)


def build_client(config: Config, host: "Host", client: int) -> Client:
    """A client value; its examples live in the host, which tokenises them once."""
    return Client(client, host, config.mu)


def run_round(fed: "Federation", rnd: "Round", server: Server | None, clients: "Mapping[int, Client]") -> Server | None:
    """One communication round. Every rank runs this; `server` is None and `clients` is empty where they do not live."""
    sent = fed.broadcast(server.host.outgoing(server.adapter) if server else None)  # 2-3: the cohort gets w_t
    server = (
        replace(server, adapter=server.host.whole(sent)) if server else None
    )  # what everybody decoded is what the round stands on
    check = server.host.check(server, rnd) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)  # 4-5: w_k near w_t, sent back
    if server:
        server = server.host.aggregate(server, received, rnd)  # 6: their mean
    return server


def client_update(client: Client, sent: "Tensors", rnd: "Round") -> "Update":
    """Minimise the client's loss and the proximal term, inexactly, by the steps of one turn."""
    with client.host.turn(client.id, sent, rnd) as model:
        fit = training.fit(
            model,
            client.host.examples(client.id),
            client.host.train,
            seed=seed_for(rnd.seed, "fit", client.id),
            pad_id=client.host.base.pad_id,
            hooks=[Proximal(client.mu, models.trainable(model))],
            state=training.OptimState.of(client.owned) if client.owned else None,
        )
        return federation.Update(
            client=client.id,
            tensors=models.trainable(model),
            metrics=fit.metrics(),
            owned=fit.state.pack() if fit.state else None,
        )
