"""FedOT: offsite tuning (Xiao et al., arXiv 2302.04870) in a federation: Kuang et al., FederatedScope-LLM, arXiv 2309.00363,
section 4.2. The adapter is the first and the last layers, the emulator is distilled once and frozen, the adapter alone travels.

With `--scenario local` it is LocalOT, every client by itself; with `global` it is offsite tuning of one party that has all data.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedmpi import federation, offsite, training
from fedmpi.seeding import seed_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedmpi.federation import Federation, Update
    from fedmpi.hosting.host import Host
    from fedmpi.models import Outline
    from fedmpi.round import Round
    from fedmpi.settings.recipe import Recipe
    from fedmpi.tensors import Tensors

SCHEME = offsite.Scheme(first=2, last=2, tunes_emulator=False)


@dataclass(frozen=True)
class Config:
    """FedOT has no settings of its own: those of offsite tuning are --offsite.*"""


@dataclass(frozen=True)
class Server:
    """The adapter that the rounds improve, and what its aggregation remembers and tells. The original model only measures."""

    SAVED = ("adapter", "memory")
    host: "Host"
    adapter: "Tensors"
    memory: "Tensors" = field(default_factory=dict)
    figures: "Mapping[str, float]" = field(default_factory=dict)

    @property
    def outgoing(self) -> "Tensors":
        """What clients receive in a round."""
        return self.adapter


@dataclass(frozen=True)
class Client:
    """What one client holds: its examples and, where it is kept, its optimiser's state. The model in its host is the emulator's."""

    id: int
    host: "Host"
    owned: "Tensors | None" = None


def build_server(config: Config, host: "Host") -> Server:
    """The adapter as it begins."""
    return Server(host, host.base.fresh)


def build_client(config: Config, host: "Host", client: int) -> Client:
    """A client value; its emulator came before, its examples live in the host."""
    return Client(client, host)


def outline(config: Config, shapes: object, wanted: "Recipe") -> "Outline":
    """For `fedmpi.plan`: who holds what, and what is sent, from shapes alone."""
    return offsite.outline(SCHEME.resolve(wanted.offsite), shapes, wanted.peft, SCHEME.tunes_emulator)


def run_round(fed: "Federation", rnd: "Round", server: Server | None, clients: "Mapping[int, Client]") -> Server | None:
    """One communication round. Every rank runs this; `server` is None and `clients` is empty where they do not live."""
    sent = fed.broadcast(server.outgoing if server else None)  # the server sends the adapter
    server = replace(server, adapter=sent) if server else None  # what everybody decoded is what the round stands on
    check = server.host.check(server, rnd) if server else None
    received = fed.gather(rnd, clients, lambda client: client_update(client, sent, rnd), check)  # tuned around the emulator
    if server:
        server = server.host.aggregate(server, received, rnd)  # mean, weighted by data size
    return server


def client_update(client: Client, sent: "Tensors", rnd: "Round") -> "Update":
    """Tune the received adapter around the frozen emulator on the client's own examples."""
    base = client.host.base
    base.load(sent)
    fit = training.fit(
        base.model,
        client.host.examples(client.id),
        client.host.train,
        seed=seed_for(rnd.seed, "fit", client.id),
        pad_id=base.pad_id,
        state=training.OptimState.of(client.owned) if client.owned else None,
    )
    return federation.Update(client.id, base.take(), fit.metrics(), owned=fit.state.pack() if fit.state else None)
