"""Precision, checkpointing, and what the backward pass keeps: measured, not believed."""

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora

from fedmpi.errors import TrainingError
from fedmpi.training import Config, Hook, fit


def fitted(model=None, hooks=(), **settings):
    """A model after three steps, and the fit."""
    model = model or with_lora(llama())
    config = Config(**{"steps": 3, "batch_size": 2, "lr": 1e-2} | settings)
    return model, fit(model, examples(6), config, seed=2, pad_id=PAD, hooks=hooks)


@pytest.mark.parametrize(("precision", "near"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_autocast_is_near_fp32_and_leaves_fp32_behind(precision, near):
    _, exact = fitted()
    model, rounded = fitted(precision=precision)
    assert rounded.loss == pytest.approx(exact.loss, rel=near) and rounded.loss != exact.loss
    assert all(value.dtype is torch.float32 for value in trained(model).values())


class Watch(Hook):
    """What a hook sees: types, and the size of the gradient."""

    def __init__(self):
        self.types, self.norms, self.finite = set(), [], []

    def after_backward(self, step):
        gradients = [p.grad for p in step.model.parameters() if p.requires_grad]
        self.types |= {gradient.dtype for gradient in gradients}
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_fp16_scales_the_loss_and_hooks_see_gradients_of_the_loss_itself():
    exact, scaled = Watch(), Watch()
    fitted(hooks=[exact])
    fitted(hooks=[scaled], precision="fp16")
    assert scaled.norms == pytest.approx(exact.norms, rel=2e-2)


def test_fp16_leaves_a_step_out_whose_scale_was_too_large():
    """A loss of 100 times the usual size overflows 65504 once scaled: no step, a smaller scale, and no failure."""

    class Overflows(Hook):
        def before_fit(self, model):
            self.start = trained(model)

        def after_step(self, step):
            now = trained(step.model)
            self.moved = any(not torch.equal(now[name], value) for name, value in self.start.items())

    model = with_lora(llama())
    with torch.no_grad():
        model.get_base_model().lm_head.weight *= 3e4
    hook = Overflows()
    fit(model, examples(4), Config(steps=1, batch_size=2, lr=1e-2, precision="fp16"), seed=2, pad_id=PAD, hooks=[hook])
    assert not hook.moved


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pure_half_computes_in_the_type_of_the_base_and_gives_fp32_back(dtype):
    """What FederatedScope-LLM calls half precision: weights, gradients and optimiser state in one type."""
    watch = Watch()
    base = llama().to(dtype)
    model = with_lora(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    _, result = fitted(model, [watch], precision="half", optimizer_state="keep")
    assert watch.types == {dtype}
    assert {tensor.dtype for tensor in result.state.tensors.values()} == {dtype}
    values = trained(model)
    assert all(value.dtype is torch.float32 and torch.equal(value, value.to(dtype).float()) for value in values.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adam"])
def test_a_step_in_half_is_about_as_long_as_in_fp32(optimizer, dtype):
    """torch's fused SGD forgets most of it on a CPU; Adam's is a thousand times as long with an epsilon that is 0 in float16."""
    moved = {}
    for base, precision in ((torch.float32, "fp32"), (dtype, "half")):
        model = with_lora(llama().to(base))
        fitted(model, precision=precision, optimizer=optimizer, steps=1)
        moved[precision] = float(torch.cat([v.flatten() for name, v in trained(model).items() if ".lora_B." in name]).norm())
    assert 0.5 < moved["half"] / moved["fp32"] < 1.1


def test_pure_half_on_a_base_in_fp32_is_refused():
    with pytest.raises(TrainingError, match=r"which is torch.float32: give model\.dtype float16 or bfloat16"):
        fitted(precision="half")


class Saved:
    """Bytes of the tensors that autograd keeps for the backward pass, by where they lie, weights and checkpoints aside."""

    def __init__(self, model):
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        if torch._C._current_graph_task_id() != -1:  # what checkpointing computes again is gone with its layer
            return tensor
        if tensor.is_floating_point() and storage.data_ptr() not in self.weights:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor


def kept_bytes(model, **settings):
    with Saved(model) as saved:
        fit(model, examples(2), Config(steps=1, batch_size=2, **settings), seed=2, pad_id=PAD)
    return sum(saved.kept.values())


def only_layer(wanted, layers=6):
    """A model of which one layer has an adapter."""
    model = with_lora(llama(layers=layers))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f"layers.{wanted}." in name)
    return model


def test_the_frozen_part_in_front_of_what_is_trained_keeps_nothing():
    """The first trained layer decides what is kept: a layer more in front of it costs no byte, a layer behind it does."""
    last = kept_bytes(only_layer(5))
    assert kept_bytes(only_layer(1, layers=2)) == pytest.approx(last, rel=0.02)
    assert kept_bytes(only_layer(0)) > 4 * last


def test_checkpointing_keeps_less_and_changes_no_number():
    plain, checkpointed = (with_lora(llama(layers=6), dropout=0.2) for _ in range(2))
    assert kept_bytes(checkpointed, checkpointing=True) < 0.5 * kept_bytes(plain)
    assert all(torch.equal(trained(plain)[name], value) for name, value in trained(checkpointed).items())
    assert not checkpointed.is_gradient_checkpointing
