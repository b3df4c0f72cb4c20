"""A base in int8 or nf4, and optimisers of bitsandbytes: on the CPU as on a GPU, or one clear line."""

import importlib.util
import sys

import pytest
import torch
from small_models import PAD, examples, llama, with_lora

from fedmpi import models
from fedmpi.errors import ConfigError, ModelError, TrainingError
from fedmpi.evaluation import heldout_loss
from fedmpi.models import costs
from fedmpi.settings import recipe
from fedmpi.training import Config, fit, optim

HAS_IT = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes here: pip install 'fedmpi[quant]'"
)


@HAS_IT
@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.35), ("nf4", 0.25)])
def test_a_quantised_base_is_small_stays_as_it_is_and_its_adapter_learns(quantization, share):
    whole = models.load_model(models.Config())
    base = models.load_model(models.Config(quantization=quantization))
    assert base.get_memory_footprint() < share * whole.get_memory_footprint()
    assert costs.forward_per_token(base) == costs.forward_per_token(whole)
    states = [p.quant_state.as_dict(packed=False) for p in base.parameters() if hasattr(p, "quant_state")]
    beside = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    beside += [p.SCB for p in base.parameters() if getattr(p, "SCB", None) is not None]
    shapes, held = models.load_shapes(models.Config()), sum(t.nbytes for t in (*base.parameters(), *beside))
    assert models.held_bytes(shapes, models.stored(shapes), quantization) == pytest.approx(held, rel=1e-3)
    model = models.add_adapter(base, models.PeftConfig(), 0)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = heldout_loss(model, examples(8), 8, PAD).loss  # as in every run, and what bitsandbytes would pack the base for
    result = fit(model, examples(8), Config(steps=8, batch_size=8, lr=1e-2), seed=0, pad_id=PAD)
    assert result.last_loss < 0.95 * result.first_loss and heldout_loss(model, examples(8), 8, PAD).loss < 0.95 * before
    assert all(values.any() for name, values in models.trainable(model).items() if ".lora_B." in name)
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {tensor.dtype for tensor in models.trainable(model).values()} == {torch.float32}


def test_quantisation_without_its_backend_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.quantization nf4 needs bitsandbytes: pip install 'fedmpi\[quant\]'"):
        models.load_model(models.Config(quantization="nf4"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peft.method=none"], "peft.method none trains it"),
        (["--aggregation.rule=fedex"], "aggregation.rule fedex adds to the base"),
        (["--aggregation.rule=flora"], "aggregation.rule flora adds to the base"),
        (["--train.engine=deepspeed", "--train.zero_stage=3", "--ranks_per_client=2"], "train.zero_stage 3 shares out the base"),
        (["--train.engine=fsdp", "--ranks_per_client=2"], "train.engine fsdp shares out the base"),
    ],
)
def test_what_does_not_go_with_a_quantised_base(arguments, words):
    with pytest.raises(ConfigError) as caught:
        recipe.read(["--model.quantization=int8", *arguments], "test", "")
    assert str(caught.value).startswith("model.quantization int8") and words in str(caught.value)


@HAS_IT
def test_eight_bit_state_is_a_quarter_and_the_steps_are_nearly_the_same():
    gradients = torch.randn(5, 128, 64, generator=torch.Generator().manual_seed(0))
    moved, state_bytes = {}, {}
    for name in ("adamw", "adamw8bit"):
        parameter = torch.nn.Parameter(torch.zeros(128, 64))
        optimizer = optim.build({"weight": parameter}, Config(optimizer=name, lr=1e-2))
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        moved[name] = parameter.detach().flatten()
        memory = optimizer.state[parameter].values()
        state_bytes[name] = sum(value.nbytes for value in memory if isinstance(value, torch.Tensor) and value.numel() == 128 * 64)
    assert state_bytes["adamw8bit"] == state_bytes["adamw"] / 4
    assert torch.nn.functional.cosine_similarity(*moved.values(), dim=0) > 0.99


@HAS_IT
def test_paging_without_a_gpu_is_refused():
    with pytest.raises(TrainingError, match=r"paged_adamw8bit pages between GPU and CPU, this rank trains on cpu: leave paged out"):
        fit(with_lora(llama()), examples(2), Config(optimizer="paged_adamw8bit"), seed=0, pad_id=PAD)


def test_an_optimiser_without_its_package_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match=r"train\.optimizer adamw8bit needs bitsandbytes: pip install 'fedmpi\[quant\]'"):
        fit(with_lora(llama()), examples(2), Config(optimizer="adamw8bit"), seed=0, pad_id=PAD)


@pytest.mark.parametrize("settings", [{"optimizer_state": "keep"}, {"engine": "deepspeed"}, {"engine": "fsdp"}])
def test_what_does_not_go_with_eight_bit_state(settings):
    with pytest.raises(ConfigError, match="with train.optimizer adamw8bit"):
        Config(optimizer="adamw8bit", **settings)
