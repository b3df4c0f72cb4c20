"""Models out of layers: the same numbers where nothing is dropped, shared memory, caches, saving; for every family."""

import pytest
import torch
from decoders import FAMILIES, decoder, tokens
from small_models import llama

from fedmpi.errors import ModelError
from fedmpi.models import Config as ModelConfig
from fedmpi.models import load_model
from fedmpi.offsite import Config, assemble, build, find_layers

KEPT = (0, 1, 3, 5)


def logits(model, **settings):
    return model(tokens(), **settings).logits


def storages(model):
    return {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    return decoder(request.param)


def test_with_nothing_dropped_it_is_the_full_model(model):
    assert torch.equal(logits(assemble(model, range(6))), logits(model))


def test_the_full_model_stays_as_it_is(model):
    before, settings = logits(model), model.config.to_dict()
    assemble(model, KEPT)
    assert torch.equal(logits(model), before) and model.config.to_dict() == settings
    assert len(find_layers(model)[1]) == 6


def test_frozen_tensors_stand_in_the_full_models_memory(model):
    small = assemble(model, KEPT)
    assert storages(small) <= storages(model)
    assert not any(parameter.requires_grad for parameter in small.parameters())
    for parameter in small.parameters():  # what is trained there is frozen here
        parameter.requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_computes_what_the_full_model_without_these_layers_computes(model):
    """Independently: the full model with the dropped layers' outputs replaced by their inputs."""
    _, layers = find_layers(model)

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [layers[n].register_forward_hook(skip, with_kwargs=True) for n in range(6) if n not in KEPT]
    expected = logits(model, use_cache=False)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(assemble(model, KEPT), use_cache=False), expected)


def test_generation_with_a_cache_says_the_same(model):
    small = assemble(model, KEPT)
    asked = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    said = [small.generate(tokens(), use_cache=cached, **asked) for cached in (True, False)]
    assert torch.equal(*said) and said[0].shape[1] > tokens().shape[1]


def test_it_is_saved_and_opened_as_any_model(model, tmp_path):
    small = assemble(model, KEPT)
    small.save_pretrained(tmp_path)
    again = load_model(ModelConfig(str(tmp_path)))
    assert torch.equal(logits(again), logits(small))
    assert again.config.num_hidden_layers == 4


def test_a_layer_that_is_shared_has_one_set_of_parameters(model):
    twice = assemble(model, (0, 0, 0, 3, 3, 5))
    once = assemble(model, (0, 3, 5))
    assert len(list(twice.parameters())) == len(list(once.parameters()))
    asked = {"attention_mask": torch.ones_like(tokens()), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*[twice.generate(tokens(), use_cache=cached, **asked) for cached in (True, False)])


def test_kinds_of_attention_travel_with_their_layers():
    model = decoder("qwen2")
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 4
    assert assemble(model, (1, 2, 5)).config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_tied_embeddings_stay_tied():
    small = assemble(decoder("qwen2"), KEPT)
    assert small.get_input_embeddings().weight is small.get_output_embeddings().weight


def test_layers_that_compute_by_their_number_are_not_moved():
    model = decoder("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx on: its layers depend on their number"):
        assemble(model, KEPT)
    assert torch.equal(logits(assemble(model, range(6))), logits(model))


def test_layers_that_are_not_found_say_what_was_looked_for():
    model = llama(layers=3)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match=r"looked for a list of 7 modules .* the longest is model.layers with 3"):
        find_layers(model)
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match="no list of repeated layers"):
        find_layers(model)


def test_the_uniform_builder_drops_at_equal_distances():
    made = build(decoder("llama"), Config(adapter_first=1, adapter_last=2, drop_rate=0.4))
    assert made.layout.order == (0, 1, 4, 5)
    assert made.layout.path == "model.layers" and made.model.config.num_hidden_layers == len(made.layout.order)
