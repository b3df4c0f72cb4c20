"""What training costs: the closed form against torch's own count of what a backward pass does, and the papers' figures."""

import pytest
import torch
from small_models import llama
from test_methods import METHODS, gpt2, opt
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fedmpi import models
from fedmpi.models import PeftConfig, costs


def counted(model, lengths):
    """What torch counts of a step in which every row is as long as the others."""
    ids = torch.ones(len(lengths), lengths[0], dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, models.rows_in_front(model) :]
        cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("dora", "ptuning-lstm")])  # torch counts no LSTM
@pytest.mark.parametrize("make", [llama, opt, gpt2])
def test_operations_are_those_that_torch_counts(name, make):
    base = make().requires_grad_(False)
    base.set_attn_implementation("eager")
    model = models.add_adapter(base, PeftConfig(num_virtual_tokens=4, **METHODS[name]), 0).train()
    work = costs.step_of(model, 1, 8).work
    for lengths in ([8], [11], [11, 11])[: 2 if name == "prefix-mlp" else 3]:  # peft asks that encoder anew for every row
        product = 2 * 32 * sum(length * (length + work.cached) for length in lengths)  # of the first layer's attention
        assert work.of(lengths) - counted(model, lengths) in ((0, product) if name in ("lora", "prefix", "prefix-mlp") else (0,))


@pytest.mark.parametrize("targets", ["up_proj", "down_proj,v_proj", "o_proj"])
def test_the_first_trained_layer_is_gone_back_through_as_far_as_needed(targets):
    base = llama(layers=3).requires_grad_(False)
    base.set_attn_implementation("eager")
    model = models.add_adapter(base, PeftConfig(target_modules=targets), 0).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ".layers.0." not in name)
    assert costs.step_of(model, 1, 8).work.of([9]) == pytest.approx(counted(model, [9]), rel=0.05)


def test_a_pass_of_shapes_leaves_no_trace():
    model = models.add_adapter(llama(), PeftConfig(), 0)
    values = models.trainable(model)
    first = costs.step_of(model, 2, 8)
    assert first == costs.step_of(model, 2, 8) and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(values[name], value) for name, value in models.trainable(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_kept_grows_with_the_batch_and_with_what_is_gone_back_through():
    model = models.add_adapter(llama(layers=4), PeftConfig(), 0)
    one, two = costs.step_of(model, 1, 32).kept_bytes, costs.step_of(model, 2, 32).kept_bytes
    assert 1.9 * one < two < 2.1 * one
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and ".layers.3." in name)
    assert costs.step_of(model, 1, 32).kept_bytes < one / 2


@pytest.mark.parametrize(
    ("layers", "back", "trained", "figure"),
    [
        (4 + 22, 25, 4, "10.33"),  # drop 0.2: offsite tuning and FedOT, adapters at both ends
        (2 + 24, 1, 2, "5.47"),  # FedBiOT, adapter 2
        (4 + 22, 3, 4, "5.87"),  # FedBiOT, adapter 4
        (4 + 14, 17, 4, "7.09"),  # drop 0.5
        (2 + 15, 1, 2, "3.65"),
        (4 + 14, 3, 4, "4.25"),
    ],
)
def test_table_5_of_fedbiot(layers, back, trained, figure):
    found = costs.Layers(layers, trained, back, weights=202_375_168, adapter=131_072)  # LLaMA-2-7B, LoRA r 8 on q and v
    assert f"{costs.paper_count(found) / 1e9:.2f}" == figure
