"""Adapters: found targets, equal beginnings, one shared base, and a PEFT folder with the same bytes everywhere."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from small_models import llama

from fedmpi.errors import ConfigError, ModelError
from fedmpi.models import PeftConfig, add_adapter, find_targets, load_trainable, save_adapter, trainable
from fedmpi.tensors import digest


def noisy(tensors, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def on_meta(config_class, **settings):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config_class(**settings))


SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL_GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4}
NEOX = {**SMALL, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (lambda: llama(), ["q_proj", "v_proj"]),
        (lambda: on_meta(transformers.Phi3Config, **SMALL, pad_token_id=0), ["qkv_proj"]),
        (lambda: on_meta(transformers.GPTNeoXConfig, **NEOX), ["query_key_value"]),
        (lambda: on_meta(transformers.GPT2Config, **SMALL_GPT2), ["c_attn"]),
        (lambda: on_meta(transformers.BertConfig, **SMALL, is_decoder=True), ["query", "value"]),
    ],
)
def test_query_and_value_projections_are_found(model, found):
    assert find_targets(model(), ()) == found


def test_a_model_without_them_says_what_it_has():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(2))

    with pytest.raises(ModelError, match=r"no query and value projections found in Odd: .*its layers have 0"):
        find_targets(Odd(), ())


def test_targets_that_match_nothing_are_all_named_with_what_exists():
    with pytest.raises(ModelError, match=r"nope, proj match no module: the model has .*down_proj.*q_proj") as caught:
        find_targets(llama(), ("q_proj", "proj", "nope"))
    assert "\n" not in str(caught.value)
    assert find_targets(llama(), ("v_proj", "self_attn.q_proj")) == ["self_attn.q_proj", "v_proj"]


def test_impossible_settings():
    for settings in ({"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(ConfigError, match=f"peft.{next(iter(settings))}"):
            PeftConfig(**settings)


def test_all_linear_spares_the_head():
    names = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name in trainable(add_adapter(llama(), PeftConfig(target_modules=("all-linear",)), 0))
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_gpt2_is_adapted_and_reloaded(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SMALL_GPT2)
    make = lambda: transformers.GPT2LMHeadModel(config).eval()  # noqa: E731
    base = make()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = add_adapter(base, PeftConfig(), 0)
    values = noisy(trainable(model))
    load_trainable(model, values)
    save_adapter(model, values, tmp_path)
    again = make()
    again.load_state_dict(weights)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(peft.PeftModel.from_pretrained(again, tmp_path)(ids).logits, model(ids).logits)


def test_an_adapter_begins_as_nothing_and_leaves_the_base_frozen():
    base = llama()
    ids = torch.arange(3, 12)[None]
    before = base(ids).logits.clone()
    model = add_adapter(base, PeftConfig(dropout=0.5), 0)
    assert torch.equal(model(ids).logits, before) and not model.training
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_beginning_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = digest(trainable(add_adapter(llama(), PeftConfig(), 5)))
    base = llama()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    model = add_adapter(base, PeftConfig(), 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(trainable(model)) == first
    assert digest(trainable(add_adapter(llama(), PeftConfig(), 6))) != first


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_is_drawn_as_asked_and_b_is_zero(init):
    model = add_adapter(llama(layers=8), PeftConfig(rank=4, init=init), 0)
    tensors = trainable(model)
    a = torch.cat([t.flatten() for name, t in tensors.items() if "lora_A" in name])
    assert all(not t.any() for name, t in tensors.items() if "lora_B" in name)
    if init == "gaussian":
        assert a.std().item() == pytest.approx(1 / 4, rel=0.1) and a.abs().max() > 2.5 / 4
    else:
        assert a.std().item() == pytest.approx((1 / 32) ** 0.5 / 3**0.5, rel=0.1) and a.abs().max() <= (1 / 32) ** 0.5


def test_trained_tensors_are_fp32_on_a_half_precision_base():
    model = add_adapter(llama().to(torch.bfloat16), PeftConfig(), 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model.train()(torch.arange(3, 12)[None], labels=torch.arange(3, 12)[None]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_trainable_are_sorted_copies():
    model = add_adapter(llama(), PeftConfig(), 0)
    tensors = trainable(model)
    assert list(tensors) == sorted(tensors) and all(t.is_contiguous() and not t.requires_grad for t in tensors.values())
    for tensor in tensors.values():
        tensor.fill_(9)
    assert not any((t == 9).all() for t in trainable(model).values())


def test_hosted_clients_share_one_base_and_keep_their_parameters():
    """Clients take turns on one model: only values change, never the storage of base or adapter."""
    model = add_adapter(llama(), PeftConfig(), 0)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    base = digest({name: p for name, p in model.named_parameters() if not p.requires_grad})
    for client in range(3):
        values = noisy(trainable(model), seed=client)
        load_trainable(model, values)
        assert digest(trainable(model)) == digest(values)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert base == digest({name: p for name, p in model.named_parameters() if not p.requires_grad})


def test_tensors_that_do_not_fit_change_nothing():
    model = add_adapter(llama(), PeftConfig(), 0)
    before, good = digest(trainable(model)), noisy(trainable(model))
    last = max(good)
    wrong = [
        {k: v for k, v in good.items() if k != last},
        {**good, "more": torch.zeros(1)},
        {**good, last: torch.zeros(3, 3)},
    ]
    for tensors, words in zip(wrong, [f"missing .*{last}", "surplus .*more", f"{last} is .3, 3.: .* expects"], strict=True):
        with pytest.raises(ModelError, match=words):
            load_trainable(model, tensors)
    assert digest(trainable(model)) == before


def test_folder_opens_with_peft_and_gives_the_same_logits(tmp_path):
    model = add_adapter(llama(), PeftConfig(dropout=0.1), 0)
    values = noisy(trainable(model))
    load_trainable(model, values)
    save_adapter(model, values, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.arange(3, 12)[None]
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    merged = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").merge_and_unload()
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)


def test_folder_holds_the_given_values_not_the_models(tmp_path):
    model = add_adapter(llama(), PeftConfig(), 0)
    values = noisy(trainable(model))
    save_adapter(model, values, tmp_path)
    load_trainable(model, values)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


CODE = """
import sys; sys.path.insert(0, {tests!r})
import torch; from small_models import llama
from fedmpi.models import PeftConfig, add_adapter, save_adapter, trainable
model = llama(); model.name_or_path = "builtin:tiny"
adapted = add_adapter(model, PeftConfig(target_modules=("q_proj", "v_proj", "k_proj", "o_proj", "up_proj")), 4)
save_adapter(adapted, trainable(adapted), sys.argv[1])
"""


def test_bytes_of_the_folder_do_not_depend_on_process_or_place(tmp_path):
    folders = [tmp_path / "one", tmp_path / "deeper" / "two"]
    code = CODE.format(tests=os.path.dirname(__file__))
    for hash_seed, folder in enumerate(folders):
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed + 1)}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, cwd=tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    settings = json.loads((folders[0] / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "builtin:tiny" and settings["inference_mode"] is True
    assert settings["target_modules"] == sorted(settings["target_modules"]) and len(settings["target_modules"]) == 5
    assert str(tmp_path) not in (folders[0] / "adapter_config.json").read_text()


def test_shepherds_adapter_on_llama_7b_has_17_891_328_parameters():
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    model = on_meta(transformers.LlamaConfig, vocab_size=32000, **shape)
    targets = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    with torch.device("meta"):
        adapted = add_adapter(model, PeftConfig(rank=8, init="gaussian", target_modules=targets), 0)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 17_891_328
