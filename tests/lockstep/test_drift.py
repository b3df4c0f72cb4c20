"""FedProx and SCAFFOLD against what their papers say, on a small model with plain SGD."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmpi import models, training
from fedmpi.algorithms.fedprox import Proximal
from fedmpi.algorithms.scaffold import Corrected
from fedmpi.errors import ConfigError
from fedmpi.tensors import Tensors
from tests.lockstep.ranks import adapter, recipe, run
from tests.unit.small_models import PAD, examples, llama, with_lora

STEPS, LR = 5, 0.1
SGD = training.Config(steps=STEPS, batch_size=4, lr=LR, optimizer="sgd", clip_norm=None)


def fitted(hook: training.Hook | None, model: torch.nn.Module | None = None) -> tuple[Tensors, Tensors]:
    """What is trained before and after a turn."""
    model = model or started()
    before = models.trainable(model)
    training.fit(model, examples(12), SGD, seed=1, pad_id=PAD, hooks=[hook] if hook else [])
    return before, models.trainable(model)


def started() -> torch.nn.Module:
    model = with_lora(llama(spread=0.3))
    torch.manual_seed(4)
    models.load_trainable(model, {name: torch.randn(t.shape) * 0.1 for name, t in models.trainable(model).items()})
    return model


def distance(left: Tensors, right: Tensors) -> float:
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5


def test_the_proximal_gradient_is_that_of_the_term() -> None:
    model = started()
    origin = {name: tensor + 0.5 for name, tensor in models.trainable(model).items()}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    term = sum(0.3 / 2 * (p - origin[name]).square().sum() for name, p in parameters.items())
    expected = torch.autograd.grad(term, list(parameters.values()))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    Proximal(0.3, origin).after_backward(training.Step(model, None, 0, 1, []))  # type: ignore[arg-type]
    for p, gradient in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_strong_term_holds_the_client_back_and_none_is_fedavg() -> None:
    before, free = fitted(None)
    model = started()
    held = fitted(Proximal(5.0, models.trainable(model)), model)[1]
    assert distance(before, held) < 0.5 * distance(before, free)
    model = started()
    assert distance(free, fitted(Proximal(0.0, models.trainable(model)), model)[1]) == 0.0


def test_the_control_variate_is_option_two_of_the_paper() -> None:
    """With plain SGD the mean gradient is c_i - c + (x - y) / (K lr)."""
    model = started()
    correction = {name: torch.full_like(t, 0.01) for name, t in models.trainable(model).items()}  # c - c_i
    hook = Corrected(correction)
    before, after = fitted(hook, model)
    assert hook.num == STEPS
    for name in before:
        expected = -correction[name] + (before[name] - after[name]) / (STEPS * LR)
        torch.testing.assert_close(hook.sums[name] / STEPS, expected, rtol=1e-4, atol=1e-6)


def test_the_servers_variate_is_the_mean_of_all_clients(settings: list[str], tmp_path: Path) -> None:
    """After rounds with everybody, c is the mean of the c_i that the clients keep, each weighing 1."""
    from safetensors.torch import load_file

    wanted = recipe(*settings, "--algorithm=scaffold", "--clients_per_round=9", "--rounds=2")
    assert run(wanted, tmp_path, 3) == [0] * 3

    last = json.loads((tmp_path / "checkpoints" / "round-000001" / "manifest.json").read_text())
    assert len(last["owned"]) == 9
    owned = [
        load_file(tmp_path / "checkpoints" / "clients" / f"client-{client}-{sha[:16]}.safetensors")
        for client, sha in last["owned"].items()
    ]

    state = load_file(tmp_path / "checkpoints" / "round-000001" / "state.safetensors")
    controls = {name.removeprefix("control/"): t for name, t in state.items() if name.startswith("control/")}
    assert controls
    for name, c in controls.items():
        torch.testing.assert_close(c, torch.stack([mine[f"control/{name}"] for mine in owned]).mean(0), rtol=1e-4, atol=1e-6)
    assert any(c.abs().max() > 0 for c in controls.values())


def test_each_of_them_is_another_method(settings: list[str], tmp_path: Path) -> None:
    short = [*settings, "--rounds=2"]
    for name in ("fedavg", "fedprox", "scaffold"):
        run(replace(recipe(*short, f"--algorithm={name}")), tmp_path / name)
    assert len({adapter(tmp_path / name) for name in ("fedavg", "fedprox", "scaffold")}) == 3


@pytest.mark.parametrize("more", ["--aggregation.rule=fedex", "--peft.client_ranks=4,8"])
def test_scaffold_says_what_it_goes_with(settings: list[str], more: str) -> None:
    with pytest.raises(ConfigError, match="scaffold goes with rule mean"):
        recipe(*settings, "--algorithm=scaffold", more)


def test_fedprox_wants_a_strength(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"fedprox.mu is -1"):
        recipe(*settings, "--algorithm=fedprox", "--fedprox.mu=-1")
