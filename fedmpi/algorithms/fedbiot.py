"""FedBiOT: Wu et al., LLM Local Fine-tuning in Federated Learning without Full Model, KDD 2024, arXiv 2406.17706, Algorithm 2.

Clients tune the last layers behind an emulator of the others; the server, which alone has the model, aligns the emulator with it on
public data in every round. Numbers in comments are the lines of Algorithm 2; line 1, the split, was done before the first round.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedmpi import federation, offsite, training
from fedmpi.seeding import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmpi.federation import Federation, Update
    from fedmpi.hosting.host import Host, Original, Split
    from fedmpi.models import Outline
    from fedmpi.round import Round
    from fedmpi.settings.recipe import Recipe
    from fedmpi.tensors import Tensors

SCHEME = offsite.Scheme(first=0, last=2, tunes_emulator=True)


@dataclass(frozen=True)
class Config:
    """FedBiOT has no settings of its own: lambda is --offsite.kd_weight, epsilon --offsite.prox_weight."""


@dataclass(frozen=True)
class Server:
    """The LoRA of the adapter and that of the emulator, and what the alignment's optimiser and the aggregation remember."""

    SAVED = ("adapter", "emulator", "optimizer", "memory")
    host: "Host"
    split: "Split"
    original: "Original"
    adapter: "Tensors"
    emulator: "Tensors"
    optimizer: "Tensors" = field(default_factory=dict)
    memory: "Tensors" = field(default_factory=dict)
    figures: "Mapping[str, float]" = field(default_factory=dict)  # of the round's alignment and aggregation

    @property
    def outgoing(self) -> "Tensors":
        """What clients receive in a round."""
        return {**self.adapter, **self.emulator}


@dataclass(frozen=True)
class Client:
    """What one client holds: its examples and, where it is kept, its optimiser's state. The model in its host is the emulator's."""

    id: int
    host: "Host"
    split: "Split"
    owned: "Tensors | None" = None


def build_server(config: Config, host: "Host") -> Server:
    """Both LoRA as they begin: equal to nothing, since the alignment before the rounds is merged into the emulator."""
    base, split, original = host.base, host.split, host.original
    assert split is not None and original is not None
    return Server(host, split, original, base.part(base.fresh, "adapter"), base.part(base.fresh, "emulator"))


def build_client(config: Config, host: "Host", client: int) -> Client:
    """A client value; its emulator came before, its examples live in the host."""
    assert host.split is not None
    return Client(client, host, host.split)


def outline(config: Config, shapes: object, wanted: "Recipe") -> "Outline":
    """For `fedmpi.plan`: who holds what, and what is sent, from shapes alone."""
    return offsite.outline(SCHEME.resolve(wanted.offsite), shapes, wanted.peft, SCHEME.tunes_emulator)


def run_round(fed: "Federation", rnd: "Round", server: Server | None, clients: "Mapping[int, Client]") -> Server | None:
    """One communication round. Every rank runs this; `server` is None and `clients` is empty where they do not live."""
    if server:
        server = align_emulator(server, rnd)  # 3-6
    sent = fed.broadcast(server.outgoing if server else None)  # 7
    if server:  # what clients decoded is what the server goes on from
        server = replace(server, adapter=server.host.base.part(sent, "adapter"), emulator=server.host.base.part(sent, "emulator"))
    check = server.host.check(server, rnd) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)  # 8-15
    if server:
        mean = server.host.aggregate(server, received, rnd)  # 16, Eq. 11
        server = replace(mean, figures={**server.figures, **mean.figures, "prox": fed.outcome.mean("prox")})
    return server


def align_emulator(server: Server, rnd: "Round") -> Server:
    """E steps on the emulator's LoRA, on public data, with the adapter of now in both models (Eq. 7)."""
    base, split, original = server.host.base, server.split, server.original
    if not split.config.align_steps:
        return server
    original.base.load(server.adapter)
    base.load(server.outgoing)
    base.tune("emulator")
    done = offsite.align(
        original.goal(),
        base.model,
        split.layout,
        split.config,
        server.host.train,
        steps=split.config.align_steps,  # 3: E
        seed=seed_for(rnd.seed, "align"),  # 4
        state=training.OptimState.of(server.optimizer) if server.optimizer else None,
    )  # 5
    emulator, optimizer = base.take("emulator"), done.state.pack() if done.state else {}
    return replace(server, emulator=emulator, optimizer=optimizer, figures=done.figures)


def client_update(client: Client, sent: "Tensors", rnd: "Round") -> "Update":
    """K steps on the adapter's LoRA behind the frozen emulator, near to what was received."""
    base, near = client.host.base, offsite.Proximal(client.split.config.prox_weight)
    base.load(sent)  # 9, Eq. 8
    base.tune("adapter")
    fit = training.fit(  # 10-13
        base.model,
        client.host.examples(client.id),
        client.host.train,
        seed=seed_for(rnd.seed, "fit", client.id),
        pad_id=base.pad_id,
        hooks=[near],  # 11, Eq. 9; the step is Eq. 10
        state=training.OptimState.of(client.owned) if client.owned else None,
    )
    return federation.Update(
        client=client.id,
        tensors=base.take("adapter"),  # 14
        metrics={**fit.metrics(), "prox": near.mean},
        owned=fit.state.pack() if fit.state else None,
    )
