"""Clients that share a process share ONE frozen base: memory grows by an adapter per client, not by a model."""

from fedmpi import data, federation, models
from fedmpi.algorithms import fedavg
from fedmpi.hosting.base import Base
from fedmpi.hosting.host import Host
from fedmpi.round import Round
from fedmpi.tensors import digest
from tests.lockstep.ranks import recipe


def test_hosted_clients_take_turns_on_one_frozen_base(settings: list[str]) -> None:
    wanted = recipe(*settings)
    parties = data.federate(wanted.data, wanted.clients, wanted.seed)
    host = Host(Base(wanted.model, wanted.peft, "cpu", 0), parties, wanted.data, wanted.train, wanted.eval)
    clients = [fedavg.build_client(fedavg.Config(), host, client) for client in range(3)]
    sent = fedavg.build_server(fedavg.Config(), host).adapter
    frozen = {name: p for name, p in host.base.model.named_parameters() if not p.requires_grad}
    before = {name: (p.data_ptr(), digest({name: p})) for name, p in frozen.items()}
    rnd = Round(0, 0, (0, 1, 2), 5, 40, 3)
    updates = [fedavg.client_update(client, sent, rnd) for client in clients]
    assert all(isinstance(update, federation.Update) for update in updates)
    assert len({digest(update.tensors) for update in updates}) == 3
    for client in clients:
        held = {name: p for name, p in client.host.base.model.named_parameters() if not p.requires_grad}
        assert {name: (p.data_ptr(), digest({name: p})) for name, p in held.items()} == before
    assert not set(models.trainable(host.base.model)) & set(frozen)


def test_an_update_depends_on_seed_round_and_client_alone(settings: list[str]) -> None:
    wanted = recipe(*settings)
    parties = data.federate(wanted.data, wanted.clients, wanted.seed)
    host = Host(Base(wanted.model, wanted.peft, "cpu", 0), parties, wanted.data, wanted.train, wanted.eval)
    sent = fedavg.build_server(fedavg.Config(), host).adapter

    def updated(client: int, seed: int) -> str:
        rnd = Round(0, 0, (client,), seed, 40, 9)
        return digest(fedavg.client_update(fedavg.build_client(fedavg.Config(), host, client), sent, rnd).tensors)

    first = updated(4, 1)
    updated(5, 1)  # whoever had the turn in between
    assert updated(4, 1) == first
    assert updated(4, 2) != first
