"""The layout: FedBiOT's LayerExtract in exact arithmetic, the names of tensors on both models, and what is impossible."""

import json
from dataclasses import asdict

import pytest

from fedmpi.errors import ConfigError
from fedmpi.offsite import Config, Layout, layout
from fedmpi.offsite.layers import evenly, how_many


def split(num_layers, first, last, drop_rate):
    return layout("model.layers", num_layers, first, last, drop_rate)


@pytest.mark.parametrize(
    ("num_layers", "first", "last", "drop_rate", "num_kept"),
    [  # the papers' LLaMA-7B, whose Table 5 counts 24 and 22 layers; 1 - 0.2 in binary would give 23 of 30
        (32, 0, 2, 0.2, 24),
        (32, 0, 2, 0.5, 15),
        (32, 0, 4, 0.2, 22),
        (32, 0, 4, 0.5, 14),
        (32, 2, 2, 0.2, 22),
        (32, 2, 2, 0.5, 14),
        (13, 1, 2, 0.1, 9),
        (12, 0, 2, 0, 10),
        (8, 0, 2, 0.8, 1),
    ],
)
def test_how_many_layers_stay(num_layers, first, last, drop_rate, num_kept):
    found = split(num_layers, first, last, drop_rate)
    assert len(found.emulator) == num_kept
    assert found.order == (*range(first), *found.emulator, *range(num_layers - last, num_layers))
    assert found.adapter == (*range(first), *range(num_layers - last, num_layers))


def test_every_tenth_of_every_depth_is_exact():
    for num in range(1, 130):
        for tenths in range(10):
            assert how_many(num, tenths / 10) == (10 - tenths) * num // 10


def test_places_are_strictly_ascending_and_reach_both_ends():
    for num in range(2, 130):
        for kept in range(2, num + 1):
            places = evenly(num, kept)
            assert places[0] == 0 and places[-1] == num - 1 and len(set(places)) == kept and places == sorted(places)
    assert evenly(7, 1) == [0]
    assert split(8, 1, 2, 0.4).emulator == (1, 3, 5)
    assert split(32, 2, 2, 0.2).emulator[:6] == (2, 3, 4, 5, 7, 8)  # 27 j // 21


def test_an_adapter_that_is_larger_than_the_model():
    with pytest.raises(ConfigError, match=r"adapter_first 2 and offsite.adapter_last 4 take 6 layers and the model has 5"):
        split(5, 2, 4, 0.2)
    with pytest.raises(ConfigError, match="leave at least one"):
        split(4, 0, 4, 0)


def test_a_drop_rate_that_leaves_no_layer():
    with pytest.raises(ConfigError, match=r"drop_rate 0.9 leaves none of the 6 layers .* drop 5 of them at most"):
        split(8, 0, 2, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_rate": 1.0}, "offsite.drop_rate is 1.0: .* less than 1"),
        ({"drop_rate": -0.1}, "offsite.drop_rate is -0.1"),
        ({"drop_rate": float("nan")}, "offsite.drop_rate is nan"),
        ({"adapter_first": -1}, "offsite.adapter_first is -1: it must be at least 0"),
        ({"adapter_first": 0, "adapter_last": 0}, "both 0: nothing would be trained"),
        ({"align_lr": 0.0}, "offsite.align_lr is 0.0"),
        ({"align_batch_size": 0}, "offsite.align_batch_size is 0"),
        ({"kd_weight": -1.0}, "offsite.kd_weight is -1.0"),
        ({"prox_weight": float("inf")}, "offsite.prox_weight is inf"),
        ({"align_pool": 3, "adapter_first": 1}, "align_pool is 3 and offsite.adapter_first 1: .* cannot be kept"),
        ({"public_path": "rows.jsonl"}, "offsite.public_path is rows.jsonl, builtin:toy is made by the program"),
        ({"builder": "magic"}, "offsite.builder is 'magic': allowed are uniform, influence, shared, thin, quantized, distilled"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Config(**settings)


def test_names_travel_between_the_models():
    found = split(32, 2, 2, 0.5)
    one = "base_model.model.model.layers.16.self_attn.q_proj.lora_A.default.weight"
    other = one.replace("layers.16.", f"layers.{found.order.index(16)}.")
    assert found.original(one) == one.replace("layers.16.", f"layers.{found.order[16]}.")
    for place, number in enumerate(found.order):
        ours, theirs = f"x.model.layers.{place}.mlp.2.weight", f"x.model.layers.{number}.mlp.2.weight"
        assert found.original(ours) == theirs and found.compressed(theirs) == ours
    assert found.compressed(one) == other if 16 in found.order else True
    assert found.original("model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert found.original("other_model.layers.3.weight") == "other_model.layers.3.weight"


def test_every_tensor_belongs_to_one_part():
    found = split(8, 1, 2, 0.4)
    parts = [found.part(f"base.model.layers.{number}.q.weight") for number in range(8)]
    assert parts == ["adapter", "emulator", None, "emulator", None, "emulator", "adapter", "adapter"]
    assert found.part("model.norm.weight") is None


def test_a_layout_travels_as_plain_values():
    found = split(8, 0, 2, 0.5)
    assert Layout(**{**json.loads(json.dumps(asdict(found))), "emulator": found.emulator}) == found
