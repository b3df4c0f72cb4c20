"""FedBiOT's loss terms, each alone, through the loop of a server and a client that share nothing: what moves, and what may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import training
from fedmpi.algorithms import fedbiot
from fedmpi.data import toy
from fedmpi.offsite import alignment
from fedmpi.tensors import digest
from fedmpi.training import Hook
from tests.lockstep.ranks import recipe, run

SMALL = (
    *("--algorithm=fedbiot", "--clients=1", "--rounds=1", "--data.name=json", "--data.splitter=iid", "--data.max_length=64"),
    *("--peft.rank=2", "--train.steps=3", "--train.batch_size=2", "--train.lr=0.01", "--eval_every=0", "--offsite.drop_rate=0.5"),
    *("--offsite.prealign_steps=1", "--offsite.align_batch_size=2", "--offsite.align_lr=0.01"),
)
Values = dict[str, str]


class Displaced(Hook):
    """A client that begins away from what it received, so that the proximal term has something to pull on."""

    def before_fit(self, model: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1)


def silent(model: torch.nn.Module, batch: Any, device: torch.device) -> torch.Tensor:
    """No loss on the client's own rows."""
    return sum((0 * p.sum() for p in model.parameters() if p.requires_grad), torch.zeros(()))


def values_of(base: Any) -> Values:
    """Every parameter of a process's model, by its name on the original one."""
    named = base.model.named_parameters()
    return {base.layout.original(name) if base.layout else name: digest({"": parameter}) for name, parameter in named}


def parts_of(base: Any, before: Values, after: Values) -> set[tuple[str | None, bool]]:
    """To which parts that which moved belongs, and whether it is LoRA; a part that moved must have moved as a whole."""
    moved = {name for name in before if before[name] != after[name]}
    parts = {(base.layout.part(name), "lora_" in name) for name in moved}
    for part, lora in parts:
        assert moved >= {name for name in before if base.layout.part(name) == part and ("lora_" in name) == lora}
    return parts


def product(tensors: Any) -> float:
    """|B A|^2 over all modules: the distance to an adapter that is nothing yet."""
    pairs = ((tensors[name], tensors[name.replace("lora_A", "lora_B")]) for name in tensors if "lora_A" in name)
    return sum(float((b @ a).square().sum()) for a, b in pairs)


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What alignment and a client's turn change, and how far a client ends from what it received, and from a tenth beside it."""
    seen: dict[str, Any] = {}
    align, update = fedbiot.align_emulator, fedbiot.client_update

    def aligned(server: Any, rnd: Any) -> Any:
        base, full = server.host.base, server.original.base
        base.load(server.outgoing)
        full.load(server.adapter)
        before, whole = values_of(base), values_of(full)
        after = align(server, rnd)
        base.load(after.outgoing)
        seen["server"], seen["model"] = parts_of(base, before, values_of(base)), values_of(full) == whole
        return after

    def updated(client: Any, sent: Any, rnd: Any) -> Any:
        base = client.host.base
        base.load(sent)
        before = values_of(base)
        made = update(client, sent, rnd)
        seen["client"] = parts_of(base, before, values_of(base))
        began = {name: sent[name] + 0.1 for name in made.tensors}
        seen["away"] = product(made.tensors), product(began)
        return made

    monkeypatch.setattr(fedbiot, "align_emulator", aligned)
    monkeypatch.setattr(fedbiot, "client_update", updated)
    return seen


@pytest.fixture
def alone(deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run with these settings in two ranks, and tell what moved."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy.rows(12, 0, "train")))

    def with_settings(*more: str) -> dict[str, Any]:
        seen = watch(monkeypatch)
        wanted = recipe(f"--model.path={deep_folder}", f"--data.path={rows}", *SMALL, *more)
        assert run(wanted, tmp_path / "run", 2) == [0, 0]
        assert seen["model"], "the original model moved"
        return seen

    return with_settings


ADAPTER, EMULATOR = {("adapter", True)}, {("emulator", True)}


def mute_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *given, **more: fit(*given, **{"loss": silent, **more}), raising=False)


def test_the_clients_loss_alone_moves_the_adapter(alone: Any) -> None:
    seen = alone("--offsite.align_steps=0", "--offsite.prox_weight=0")
    assert seen["client"] == ADAPTER and seen["server"] == set()


def test_the_proximal_term_alone_pulls_the_adapter_back(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mute_clients(monkeypatch)
    seen = alone("--offsite.align_steps=0", "--offsite.prox_weight=1", f"--train.hooks=[{__name__}.Displaced]")
    assert seen["client"] == ADAPTER and seen["server"] == set()
    assert 0 < seen["away"][0] < 0.9 * seen["away"][1]


def test_without_any_term_nothing_moves(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mute_clients(monkeypatch)
    seen = alone("--offsite.align_steps=0", "--offsite.prox_weight=0")
    assert seen["client"] == set() and seen["server"] == set()


@pytest.mark.parametrize("term", ["hidden", "kd"])
def test_a_term_of_the_alignment_alone_moves_the_emulator(alone: Any, monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    mute_clients(monkeypatch)
    if term == "kd":  # Eq. 3 has no weight to be set to nothing
        monkeypatch.setattr(alignment, "hidden_gap", lambda wanted, found, *normalise: 0 * found.sum())
    seen = alone("--offsite.align_steps=3", "--offsite.prox_weight=0", f"--offsite.kd_weight={int(term == 'kd')}")
    assert seen["client"] == set() and seen["server"] == EMULATOR


def test_dropout_is_for_the_adapter_and_leaves_the_emulator_alone(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training mode, at a client whose emulator has LoRA that is not nothing."""
    update, found = fedbiot.client_update, {}

    def watched(client: Any, sent: Any, rnd: Any) -> Any:
        base, layout = client.host.base, client.split.layout
        made = update(client, sent, rnd)
        text = torch.arange(3, 30)[None]
        for training_mode in (True, False):
            with torch.no_grad():
                said = base.model.train(training_mode)(input_ids=text, output_hidden_states=True, use_cache=False).hidden_states
            found[training_mode] = said[layout.last_emulated + 1], said[-1]
        return made

    monkeypatch.setattr(fedbiot, "client_update", watched)
    alone("--offsite.align_steps=2", "--peft.dropout=0.5")
    assert torch.equal(found[True][0], found[False][0]) and not torch.equal(found[True][1], found[False][1])
