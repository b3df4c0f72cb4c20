"""Emulator builders: every family runs, generates, is rebuilt from plain values; smaller is smaller by the count that is given."""

import json
from functools import cache

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from decoders import FAMILIES, decoder, tokens
from small_models import PAD, examples

from fedmpi.data import collate
from fedmpi.errors import DataError, ModelError
from fedmpi.models import PeftConfig, add_adapter
from fedmpi.offsite import Config, build
from fedmpi.offsite.account import account
from fedmpi.offsite.alignment import distance, goal
from fedmpi.offsite.builders.influence import influence
from fedmpi.offsite.builders.thin import find_parts, in_factors
from fedmpi.offsite.modules import Again, LowRank, Quantized
from fedmpi.offsite.structure import reshape

BUILDERS = ("uniform", "influence", "shared", "thin", "quantized")
GENERATION = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def text(count=3):
    return [collate(examples(6, seed=index), PAD) for index in range(count)]


@cache
def original(family):
    return decoder(family)


@cache
def made(family, builder, drop_rate=0.5):
    return build(original(family), Config(builder=builder, drop_rate=drop_rate, adapter_last=2, bits=4), text())


def tensors(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("builder", BUILDERS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_with_a_cache_what_it_says_without(family, builder):
    model, mask = made(family, builder).model, torch.ones_like(tokens())
    before = original(family)(tokens()).logits
    said = [model.generate(tokens(), attention_mask=mask, use_cache=cached, **GENERATION) for cached in (True, False)]
    assert torch.equal(*said)
    assert torch.equal(original(family)(tokens()).logits, before)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_values_and_tensors_are_all_that_it_takes_to_make_it_elsewhere(family, builder):
    emulator = made(family, builder)
    told = json.loads(json.dumps([emulator.model.config.to_dict(), emulator.structure]))
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**told[0]))
    reshape(model, told[1])
    model.tie_weights()
    assert {name: t.shape for name, t in tensors(model).items()} == {name: t.shape for name, t in tensors(emulator.model).items()}
    for name, tensor in tensors(emulator.model).items():
        path, _, leaf = name.rpartition(".")
        new = torch.nn.Parameter(tensor, False) if isinstance(tensor, torch.nn.Parameter) else tensor
        setattr(model.get_submodule(path), leaf, new)
    model.tie_weights()
    assert torch.equal(model.eval()(tokens()).logits, emulator.model(tokens()).logits)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bitnet"])
def test_an_adapter_goes_on_and_its_gradient_passes(family, builder):
    emulator = build(decoder(family), Config(builder=builder, drop_rate=0.5, adapter_last=1), text())
    plain = emulator.model(tokens()).logits
    model = add_adapter(emulator.model, PeftConfig(rank=2, target_modules=("all-linear",)), 0)
    assert torch.equal(model(tokens()).logits, plain)
    model(tokens()).logits.square().sum().backward()
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert trained and all(parameter.grad.abs().sum() > 0 for parameter in trained)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bitnet"])
def test_smaller_means_smaller(family):
    """By half, in what is held, what is sent and what is computed, or it says otherwise."""
    counted = {builder: account(original(family), made(family, builder)).shares() for builder in BUILDERS}
    for builder, shares in counted.items():
        size = sum(t.numel() * t.element_size() for t in tensors(made(family, builder).model).values())
        whole = sum(t.numel() * t.element_size() for t in tensors(original(family)).values())
        told = account(original(family), made(family, builder))
        assert whole - size == told.original_bytes - told.held_bytes, "the bytes of the whole model differ by what is reported"
        assert shares["flops_per_token"] == pytest.approx(1.0 if builder == "shared" else 0.5, abs=0.01)
        assert shares["bytes"] == pytest.approx(0.07 if builder == "quantized" else 0.5, abs=0.04)
        assert shares["parameters"] == pytest.approx(0.5, abs=0.02)
    assert counted["thin"]["disclosed"] < counted["uniform"]["disclosed"] == counted["influence"]["disclosed"] < 1


def test_what_is_disclosed_is_counted_on_the_tensors():
    model = original("llama")
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    size = sum(parameter.numel() for parameter in model.parameters())
    emulator = made("llama", "uniform")
    assert account(model, emulator).disclosed == pytest.approx((size - 2 * layer) / size)
    moved = build(model, Config(drop_rate=0.5, adapter_last=2))
    moved.model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(model.model.layers[0].self_attn.q_proj.weight + 0.1)
    assert account(model, moved).disclosed == pytest.approx((size - 2 * layer - 32 * 32) / size)


def test_influence_is_what_a_layer_changes_and_the_least_influential_go():
    model = decoder("llama")
    for number in (1, 3):  # these two do nothing
        for module in (model.model.layers[number].self_attn.o_proj, model.model.layers[number].mlp.down_proj):
            torch.nn.init.zeros_(module.weight)
    change = influence(model, text())
    assert change[1] == pytest.approx(0, abs=1e-6) and change[3] == pytest.approx(0, abs=1e-6) and min(change[0], change[2]) > 1e-3
    emulator = build(model, Config(builder="influence", drop_rate=0.5, adapter_last=2), text())
    assert emulator.layout.emulator == (0, 2)
    torch.testing.assert_close(emulator.model(tokens()).logits, model(tokens()).logits)


def test_influence_by_hand():
    model, batch = decoder("gpt2"), text(1)[0]
    said = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
    cosines = [
        torch.nn.functional.cosine_similarity(said[2][row, column], said[3][row, column], dim=0)
        for row in range(len(batch.ids))
        for column in range(int(batch.attention_mask[row].sum()))
    ]
    assert influence(model, [batch])[2] == pytest.approx(1 - float(torch.stack(cosines).mean()), abs=1e-5)


def test_neighbours_share_the_middle_one_and_the_boundaries_are_the_influential():
    model = decoder("llama", num_hidden_layers=8)
    for number in (1, 2, 4):
        for module in (model.model.layers[number].self_attn.o_proj, model.model.layers[number].mlp.down_proj):
            module.weight.data *= 1e-3
    emulator = build(model, Config(builder="shared", drop_rate=0.5, adapter_last=2), text())
    assert emulator.layout.emulator == (1, 1, 1, 3, 3, 5)
    layers = emulator.model.model.layers
    assert sum(isinstance(layer, Again) for layer in layers) == 3 and len(layers) == 8


def test_thin_is_nearer_than_dropping_at_equal_size():
    """No weight was trained; both hold half of the layers' weights."""
    model, config = decoder("llama"), Config(drop_rate=0.5, adapter_last=2, adapter_first=0)
    found = {}
    for builder in ("uniform", "thin"):
        emulator = made("llama", builder)
        wanted = goal(model, emulator.layout, examples(12, seed=9), config, seed=0, pad_id=PAD)
        found[builder] = distance(wanted, emulator.model, emulator.layout, 4)
    assert found["thin"]["hidden"] < 0.8 * found["uniform"]["hidden"]


def test_factors_are_the_best_for_the_inputs_seen():
    """No other matrix of this rank is nearer on these inputs: the singular values left out say by how much it must miss."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(12, 10)
    x = torch.randn(500, 12, generator=generator) * torch.linspace(0.1, 3, 12)
    thin = in_factors(module, 0.5, x.T @ x)
    missed = float((thin(x) - module(x)).norm().detach())
    values = torch.linalg.svdvals((x @ module.weight.T).detach())
    assert len(thin.down) == 2 and missed == pytest.approx(float(values[2:].norm()), rel=0.01)
    module.weight.data[1:] = 0
    torch.testing.assert_close(in_factors(module, 0.5, x.T @ x)(x), module(x), rtol=1e-3, atol=1e-3)


def test_nothing_is_lost_where_nothing_is_dropped_but_channels_without_effect():
    model = decoder("llama")
    for layer in model.model.layers[:4]:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight[:, ::2])
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            matrix = getattr(layer.self_attn, name).weight
            matrix.data = torch.outer(matrix[:, 0], matrix[0]) * 10
    emulator = build(model, Config(builder="thin", drop_rate=0.5, adapter_last=2), text(6))
    torch.testing.assert_close(emulator.model(tokens()).logits, model(tokens()).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("inputs", [64, 33])
def test_quantized_is_rounded_to_the_nearest_and_its_gradient_is_its_own(bits, steps, inputs):
    torch.manual_seed(0)
    weight = torch.randn(2000, inputs)
    module = Quantized(inputs, 2000, bits, bias=False)
    module.put(weight)
    rounded = torch.cat([piece for _, piece in module.pieces(torch.float32)])
    groups = weight.reshape(2000, module.scales.shape[1], -1)
    step = groups.abs().amax(-1, keepdim=True) / steps
    assert bool(((rounded.reshape(groups.shape) - groups).abs() <= step / 2 * 1.001).all())
    assert module.codes.numel() == 2000 * (inputs if bits == 8 else (inputs + 1) // 2) and module.codes.element_size() == 1
    x = torch.randn(3, 5, inputs, requires_grad=True)
    torch.testing.assert_close(module(x), x @ rounded.T)
    upstream = torch.randn(3, 5, 2000)
    module(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ rounded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [LowRank(6, 4, 2, bias=True), Quantized(6, 4, 8, bias=True)])
def test_a_change_of_low_rank_is_taken_in(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_()
    if isinstance(module, Quantized):
        module.put(torch.randn(4, 6))
    x, down, up = torch.randn(3, 6), torch.randn(2, 6), torch.randn(4, 2)
    before = module(x)
    module.absorb(down, up)
    torch.testing.assert_close(module(x), before + x @ (up @ down).T)


def test_a_builder_that_looks_at_text_says_when_there_is_none():
    for builder in ("influence", "shared", "thin"):
        with pytest.raises(DataError, match=f"offsite.builder {builder} looks at public text and there is none"):
            build(original("llama"), Config(builder=builder, adapter_last=2))


@pytest.mark.parametrize("builder", BUILDERS)
def test_shapes_alone_do_for_a_plan(builder):
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(original("llama").config)
    planned = build(shapes, Config(builder=builder, drop_rate=0.5, adapter_last=2, bits=4))
    real = made("llama", builder)
    assert sum(t.numel() for t in tensors(planned.model).values()) == sum(t.numel() for t in tensors(real.model).values())


def test_a_structure_of_another_model_is_refused():
    model = decoder("llama", num_hidden_layers=3)
    with pytest.raises(ModelError, match="does not fit the configuration that came"):
        reshape(model, made("llama", "thin").structure)


def test_layers_without_a_feed_forward_say_what_was_looked_for():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"no feed-forward is found in model.layers.2: looked for .* it has 0; take another"):
        find_parts(layer, made("llama", "uniform").layout, 2)
