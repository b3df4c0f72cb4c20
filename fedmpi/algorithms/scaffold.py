"""SCAFFOLD over adapters: Karimireddy et al., arXiv 1910.06378, Algorithm 1. Each client corrects its steps by c - c_i, which is
the whole federation's gradient less its own, as last seen. c_i belongs to the client: it is kept where the client lives, and
counts when the client's update does. Its change travels in a tensor group of its own, `control/`, in which every client weighs 1.

Line 12 is option II in the form that holds for any local optimiser: c_i becomes the mean of the client's own gradients in its turn,
which with plain SGD is c_i - c + (x - y_i) / (K lr) exactly. Numbers in comments are lines of Algorithm 1.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedmpi import aggregation, federation, models, training
from fedmpi.errors import ConfigError
from fedmpi.seeding import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmpi.federation import Federation, Update
    from fedmpi.hosting.host import Host
    from fedmpi.round import Round
    from fedmpi.settings.recipe import Recipe
    from fedmpi.tensors import Tensors
    from fedmpi.training import Step

SINGLE = True  # the server weighs control variates otherwise than adapters
CONTROL, KEPT = "control/", "optimiser/"
GROUPS = ("control",)  # tensor groups besides the adapter, which may have a codec of their own


@dataclass(frozen=True)
class Config:
    """SCAFFOLD has no settings of its own; its global step-size is that of --server_optimizer avgm --server.momentum 0."""


@dataclass(frozen=True)
class Server:
    """What only the server holds: the adapter x, the control variate c, and what aggregation remembers and tells."""

    SAVED = ("adapter", "control", "memory")
    host: "Host"
    adapter: "Tensors"
    control: "Tensors"
    memory: "Tensors" = field(default_factory=dict)
    figures: "Mapping[str, float]" = field(default_factory=dict)


@dataclass(frozen=True)
class Client:
    """What one client holds: its examples, and its own control variate c_i beside what else it keeps."""

    id: int
    host: "Host"
    owned: "Tensors | None" = None


class Corrected(training.Hook):
    """Adds c - c_i to every gradient, and keeps the sum of the gradients as they were."""

    def __init__(self, correction: "Tensors") -> None:
        self.correction, self.num = correction, 0
        self.sums: Tensors = {}

    def after_backward(self, step: "Step") -> None:
        """Gradients are there, unclipped."""
        self.num += 1
        for name, parameter in step.model.named_parameters():
            if parameter.grad is not None:
                gradient = parameter.grad.detach().float().cpu()
                self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient.clone()
                parameter.grad.add_(self.correction[name].to(parameter.grad))  # 10


def require(recipe: "Recipe") -> None:
    """Control variates are corrections of gradients: all clients must train the same tensors, and the mean must be their mean."""
    wanted = recipe.aggregation
    if wanted.rule != "mean" or wanted.robust != "none" or recipe.peft.client_ranks:
        given = f"aggregation.rule {wanted.rule}, aggregation.robust {wanted.robust}, peft.client_ranks {recipe.peft.client_ranks}"
        raise ConfigError(f"algorithm scaffold goes with rule mean, robust none and clients of one rank, not with {given}")


def outline(config: Config, shapes: object, recipe: "Recipe") -> "models.Outline":
    """For the plan: the control variates travel beside the adapter, both ways."""
    from fedmpi.tensors import prefixed

    plain = models.same_for_all(shapes, recipe.peft)
    both = {**plain.up, **prefixed(CONTROL, dict(plain.up))}
    return replace(plain, down=both, up=both)


def build_server(config: Config, host: "Host") -> Server:
    """1: the adapter as it begins, and a control variate of zeros."""
    return Server(host, host.base.fresh, {name: tensor.new_zeros(tensor.shape) for name, tensor in host.base.fresh.items()})


def build_client(config: Config, host: "Host", client: int) -> Client:
    """A client value; before its first turn its control variate is zero."""
    return Client(client, host)


def run_round(fed: "Federation", rnd: "Round", server: Server | None, clients: "Mapping[int, Client]") -> Server | None:
    """One communication round. Every rank runs this; `server` is None and `clients` is empty where they do not live."""
    from fedmpi.tensors import part, prefixed

    sent = fed.broadcast({**server.adapter, **prefixed(CONTROL, server.control)} if server else None)  # 4-5: x and c
    if server:  # what everybody decoded is what the round stands on
        server = replace(server, adapter={name: sent[name] for name in server.adapter}, control=part(sent, CONTROL))
    check = server.host.check(server, rnd, beside=prefixed(CONTROL, server.control)) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)  # 6-15
    if server:
        with aggregation.Spool(server.host.scratch) as changes:
            server = server.host.aggregate(server, changes.taking(received, CONTROL), rnd)  # 16-17: x by its weights
            control = {name: c + changes.total(CONTROL + name).float() / rnd.num_clients for name, c in server.control.items()}
        server = replace(server, control=control)  # 17: c + |S|/N times the mean change, every client alike
    return server


def client_update(client: Client, sent: "Tensors", rnd: "Round") -> "Update":
    """Corrected steps from x, and the client's next control variate."""
    from fedmpi.tensors import part, prefixed

    c, mine = part(sent, CONTROL), part(client.owned or {}, CONTROL)
    mine = mine or {name: tensor.new_zeros(tensor.shape) for name, tensor in c.items()}
    adapter = {name: tensor for name, tensor in sent.items() if not name.startswith(CONTROL)}
    kept, hook = part(client.owned or {}, KEPT), Corrected({name: c[name] - mine[name] for name in c})
    with client.host.turn(client.id, adapter, rnd) as model:  # 7
        fit = training.fit(  # 8-11
            model,
            client.host.examples(client.id),
            client.host.train,
            seed=seed_for(rnd.seed, "fit", client.id),
            pad_id=client.host.base.pad_id,
            hooks=[hook],
            state=training.OptimState.of(kept) if kept else None,
        )
        after = {name: total / hook.num for name, total in hook.sums.items()}  # 12
        change = {name: after[name] - mine[name] for name in after}
        return federation.Update(  # 13
            client=client.id,
            tensors={**models.trainable(model), **prefixed(CONTROL, change)},
            metrics=fit.metrics(),
            owned={**prefixed(CONTROL, after), **prefixed(KEPT, fit.state.pack() if fit.state else {})},  # 14
        )
