"""Rates against numbers worked out by hand; a kept optimiser state goes on as if there had been no break."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load, save
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi.errors import TrainingError
from fedmpi.training import Config, Hook, OptimState, fit, optim


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 2, [0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("cosine", 0, [1, 0.8535533905932737, 0.5, 0.14644660940672624]),
        ("cosine", 2, [0.5, 1, 1, 0.5]),
        ("linear", 9, [1 / 9, 2 / 9, 3 / 9, 4 / 9]),
    ],
)
def test_rate(schedule, warmup, expected):
    config = Config(lr=2.0, schedule=schedule, warmup_steps=warmup)
    assert [optim.rate(config, index, 4) for index in range(4)] == pytest.approx([2 * share for share in expected])


def test_the_rate_is_used():
    """With SGD and no clipping a step moves weights in proportion to its rate."""
    moved = []
    for warmup in (1, 4):
        model = with_lora(llama())
        before = trained(model)
        config = Config(steps=1, optimizer="sgd", lr=0.5, warmup_steps=warmup, clip_norm=0)
        fit(model, examples(4), config, seed=0, pad_id=PAD)
        moved.append(sum(float((trained(model)[name] - before[name]).abs().sum()) for name in before))
    assert moved[0] == pytest.approx(4 * moved[1], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_a_kept_state_goes_on(optimizer):
    """Whole-set batches make two turns of three steps equal to one of six, if nothing is forgotten between them."""
    data = examples(4)
    once, twice, forgetful = (with_lora(llama()) for _ in range(3))
    fit(once, data, Config(steps=6, batch_size=4, optimizer=optimizer), seed=0, pad_id=PAD)
    keep = Config(steps=3, batch_size=4, optimizer=optimizer, optimizer_state="keep")
    first = fit(twice, data, keep, seed=0, pad_id=PAD)
    assert first.state is not None and first.state.step == 3
    restored = OptimState(load(save(first.state.tensors)), first.state.step)
    second = fit(twice, data, keep, seed=1, pad_id=PAD, state=restored)
    assert second.state is not None and second.state.step == 6
    for seed in (0, 1):
        fit(forgetful, data, Config(steps=3, batch_size=4, optimizer=optimizer), seed=seed, pad_id=PAD)
    for name, value in trained(once).items():
        torch.testing.assert_close(trained(twice)[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(trained(forgetful)[name], value, atol=1e-5) for name, value in trained(once).items())


def test_a_state_is_not_changed_by_going_on_from_it():
    keep = Config(steps=2, batch_size=2, optimizer_state="keep")
    model = with_lora(llama())
    state = fit(model, examples(4), keep, seed=0, pad_id=PAD).state
    copies = {name: tensor.clone() for name, tensor in state.tensors.items()}
    fit(model, examples(4), keep, seed=1, pad_id=PAD, state=state)
    assert all(torch.equal(copies[name], tensor) for name, tensor in state.tensors.items())


def test_a_turn_leaves_nothing_but_the_trained_values():
    """What it made is gone with it, so that a GPU holds one client's optimiser at a time; what is kept is a copy for the CPU."""

    class Looks(Hook):
        def after_step(self, step):
            self.seen = weakref.ref(step.optimizer)
            self.places = {value.data_ptr() for memory in step.optimizer.state.values() for value in memory.values()}

    model, hook = with_lora(llama()), Looks()
    kept = fit(model, examples(4), Config(steps=2, optimizer_state="keep"), seed=0, pad_id=PAD, hooks=[hook]).state
    gc.collect()
    assert hook.seen() is None and all(parameter.grad is None for parameter in model.parameters())
    assert kept.tensors and hook.places.isdisjoint(tensor.data_ptr() for tensor in kept.tensors.values())


def test_fresh_keeps_nothing_and_sgd_has_nothing_to_keep():
    assert fit(with_lora(llama()), examples(2), Config(steps=1), seed=0, pad_id=PAD).state is None
    kept = fit(with_lora(llama()), examples(2), Config(steps=1, optimizer="sgd", optimizer_state="keep"), seed=0, pad_id=PAD)
    assert kept.state == OptimState({}, 1)


@pytest.mark.parametrize(("name", "found"), [("absent.exp_avg", "no such parameter"), (None, r"its shape is \(4, 32\)")])
def test_a_state_of_another_model_is_refused(name, found):
    model = with_lora(llama())
    name = name or f"{next(n for n, p in model.named_parameters() if p.requires_grad)}.exp_avg"
    with pytest.raises(TrainingError, match=found):
        fit(model, examples(2), Config(), seed=0, pad_id=PAD, state=OptimState({name: torch.zeros(2)}, 1))
