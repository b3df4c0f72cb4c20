"""The proximal term: value and gradient against the dense form and finite differences, and what it does in the real loop."""

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi.offsite import Proximal
from fedmpi.offsite.proximal import factors, squared_product_gap
from fedmpi.training import Config, Hook, fit

ROUGH = Config(steps=3, batch_size=4, lr=1e-2)


def pair(seed, size=1.0, rank=4, outputs=48, inputs=32):
    generator = torch.Generator().manual_seed(seed)
    return [size * torch.randn(*shape, generator=generator) for shape in ((rank, inputs), (outputs, rank))]


def dense(a, b, a_before, b_before):
    """The definition, in float64, with the matrices written out."""
    a, b, a_before, b_before = (factor.double() for factor in (a, b, a_before, b_before))
    return (b @ a - b_before @ a_before).square().sum()


def adapted(seed=0):
    """A model with LoRA that is no longer zero."""
    model = with_lora(llama(), seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("delta", [1.0, 1e-2, 1e-4])
def test_the_value_is_that_of_the_dense_form_even_for_small_differences(delta):
    before, step = pair(0), pair(1, delta)
    now = [w + d for w, d in zip(before, step, strict=True)]
    expected = float(dense(*now, *before))
    assert float(squared_product_gap(*now, *before)) == pytest.approx(expected, rel=1e-3)
    if delta == 1e-4:  # what would be left of it otherwise
        (a, b), (a_before, b_before) = now, before
        terms = [
            ((x.T @ y) * (v @ w.T)).sum()
            for x, y, v, w in ((b, b, a, a), (b, b_before, a, a_before), (b_before,) * 2 + (a_before,) * 2)
        ]
        naive = float(terms[0] - 2 * terms[1] + terms[2])
        assert abs(naive - expected) > 0.5 * expected


def test_the_gradient_is_that_of_the_dense_form_and_of_finite_differences():
    model, hook = adapted(), Proximal(0.7)
    hook.before_fit(model)
    received = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    for index, parameter in enumerate(received):
        parameter.data += (
            pair(index, 1e-2, *parameter.shape, 1)[0].view_as(parameter)
            if parameter.ndim == 1
            else 1e-2 * torch.randn_like(parameter)
        )
    (0.7 / 2 * hook.distance(model)).backward()
    for _, a, b, scale in factors(model):
        assert scale == 2.0  # alpha 8, rank 4
        twins = [w.detach().double().requires_grad_() for w in (a, b)]
        (0.7 / 2 * scale**2 * dense(*twins, received[a], received[b])).backward()
        for found, twin in zip((a, b), twins, strict=True):
            torch.testing.assert_close(found.grad.double(), twin.grad, rtol=1e-4, atol=1e-7)
    _, a, b, scale = next(factors(model))
    for parameter, place in ((a, (1, 3)), (b, (5, 2))):
        values = []
        for sign in (1, -1):
            moved = [w.detach().double() for w in (a, b)]
            moved[0 if parameter is a else 1][place] += sign * 1e-5
            values.append(float(0.7 / 2 * scale**2 * dense(*moved, received[a], received[b])))
        assert float(parameter.grad[place]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3)


def test_it_is_nothing_at_first_and_positive_after_one_step():
    hook = Proximal(1.0)
    fit(adapted(), examples(4), ROUGH, seed=0, pad_id=PAD, hooks=[hook])
    values = [float(value) for value in hook.values]
    assert values[0] == 0 and values[1] > 0 and values[2] > 0


def test_a_fresh_adapter_is_pulled_too():
    """B = 0: there the product, and with it the gradient of a squared sum of both factors alone, would vanish."""
    hook = Proximal(1.0)
    fit(with_lora(llama()), examples(4), ROUGH, seed=0, pad_id=PAD, hooks=[hook])
    assert float(hook.values[1]) > 0


def moved(epsilon, **settings):
    model, hook = adapted(), Proximal(epsilon)
    fit(model, examples(4), Config(steps=20, batch_size=4, lr=1e-2, **settings), seed=0, pad_id=PAD, hooks=[hook])
    return float(hook.distance(model).detach())


def test_a_larger_weight_keeps_the_adapter_nearer():
    free, near, nearer = moved(0.0), moved(1.0), moved(100.0)
    assert free > 1.5 * near > 1.5 * 1.5 * nearer > 0


class Spy(Hook):
    """Reads gradients where a hook after the proximal one finds them."""

    def after_backward(self, step):
        self.gradients = {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}


def test_it_joins_the_gradient_of_the_loss_and_no_other_parameter():
    plain, both = Spy(), Spy()
    start, config = adapted(), Config(steps=2, batch_size=4, lr=1e-2, clip_norm=None, optimizer="sgd")
    hook = Proximal(3.0)
    fit(start, examples(4), config, seed=0, pad_id=PAD, hooks=[hook, both])
    fit(adapted(), examples(4), config, seed=0, pad_id=PAD, hooks=[Proximal(0.0), plain])
    assert both.gradients.keys() == plain.gradients.keys() == trained(start).keys()
    assert any(not torch.equal(both.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_weight_zero_changes_no_bit():
    models = adapted(), adapted()
    fit(models[0], examples(4), ROUGH, seed=0, pad_id=PAD)
    fit(models[1], examples(4), ROUGH, seed=0, pad_id=PAD, hooks=[Proximal(0.0)])
    assert all(torch.equal(trained(models[0])[name], value) for name, value in trained(models[1]).items())


def test_without_lora_it_is_the_distance_of_weights():
    model, hook = llama(), Proximal(2.0)
    layer = model.model.layers[1].requires_grad_(True)
    hook.before_fit(model)
    for parameter in layer.parameters():
        parameter.data += 0.5
    count = sum(parameter.numel() for parameter in layer.parameters())
    value = hook.distance(model)
    assert float(value.detach()) == pytest.approx(0.25 * count)
    value.backward()
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter))


def test_with_one_factor_frozen_the_other_is_pulled_by_the_product():
    model, hook = adapted(), Proximal(1.0)
    for _, a, _, _ in factors(model):
        a.requires_grad_(False)
    hook.before_fit(model)
    before = {b: b.detach().clone() for _, _, b, _ in factors(model)}
    for b in before:
        b.data += 0.01
    expected = sum(scale**2 * float(dense(a, b, a, before[b])) for _, a, b, scale in factors(model))
    assert float(hook.distance(model).detach()) == pytest.approx(expected, rel=1e-5)
