"""PEFT methods: each begins from its seed, is saved whole, is asked and goes on as alone, whatever stands beside it in a batch."""

import peft
import pytest
import torch
import transformers
from small_models import llama

from fedmpi import models
from fedmpi.data.batching import collate
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.errors import ConfigError, ModelError
from fedmpi.evaluation import harness
from fedmpi.evaluation.loss import inference
from fedmpi.models import PeftConfig
from fedmpi.models.logits import supervised_logits
from fedmpi.tensors import digest

METHODS = {
    "lora": {},
    "rslora": {"rslora": True, "target_modules": "all-linear"},
    "dora": {"dora": True},
    "prefix": {"method": "prefix"},
    "prefix-mlp": {"method": "prefix", "encoder": "mlp"},
    "ptuning": {"method": "ptuning"},
    "ptuning-lstm": {"method": "ptuning", "encoder": "lstm", "dropout": 0.1},
    "prompt": {"method": "prompt"},
    "none": {"method": "none"},
}
VIRTUAL = [name for name in METHODS if name.startswith(("p",))]
every_method = pytest.mark.parametrize("name", METHODS)


def opt() -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=50, max_position_embeddings=64, **size)).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=2, **size)).eval()


def adapted(name: str, make=llama, seed: int = 0) -> torch.nn.Module:
    """A model in which every trained value has moved a little."""
    model = models.add_adapter(make().requires_grad_(False), PeftConfig(num_virtual_tokens=4, **METHODS[name]), seed)
    generator = torch.Generator().manual_seed(1)
    values = {key: t + 0.05 * torch.randn(t.shape, generator=generator) for key, t in models.trainable(model).items()}
    models.load_trainable(model, values)
    return model


def batch(*lengths: int):
    ids = torch.arange(3, 3 + max(lengths)).tolist()
    return collate([Example(ids[:n], [IGNORED] * 2 + ids[2:n], f"row{n}") for n in lengths], 0)


@every_method
@pytest.mark.parametrize("make", [llama, opt, gpt2])
def test_a_folder_gives_the_logits_of_the_model_that_it_was_saved_from(name, make, tmp_path):
    model = adapted(name, make)
    models.save_adapter(model, models.trainable(model), tmp_path)
    again = models.adapted(make(), tmp_path)
    for wearer in (model, again):
        assert models.rows_in_front(wearer) == (4 if name.startswith(("pt", "prompt")) else 0)
    with inference(model):
        expected, found = (supervised_logits(m, batch(9, 14), torch.device("cpu"))[0] for m in (model, again))
    assert torch.equal(expected, found)
    if name != "none":
        opened = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        with inference(opened):
            assert torch.equal(supervised_logits(opened, batch(9, 14), torch.device("cpu"))[0], expected)


@every_method
@pytest.mark.parametrize("make", [llama, opt, gpt2])
def test_logits_of_a_row_do_not_depend_on_its_neighbours(name, make):
    model = adapted(name, make)
    with inference(model):
        both, targets = supervised_logits(model, batch(9, 14), torch.device("cpu"))
        alone, own = supervised_logits(model, batch(9), torch.device("cpu"))
    assert torch.equal(targets[: len(own)], own) and len(alone) == 7
    assert torch.allclose(both[: len(own)], alone, atol=1e-6)


@every_method
@pytest.mark.parametrize("make", [llama, opt, gpt2])
def test_generation_goes_on_from_padded_rows_as_from_single_ones(name, make):
    """peft alone leaves a gap between virtual tokens and a padded row."""
    model = adapted(name, make)
    ids = torch.arange(3, 17)
    padded, mask = torch.stack([torch.cat([torch.zeros(5).long(), ids[:9]]), ids]), torch.tensor([[0] * 5 + [1] * 9, [1] * 14])
    together = follow(model, padded, mask)
    alone = follow(model, ids[None, :9], mask[:1, 5:])
    for first, second in zip(together.logits, alone.logits, strict=False):
        assert torch.allclose(first[0], second[0], atol=1e-5)
    with inference(model):
        row = torch.cat([ids[:9], alone.sequences[0, -6:]])[None]
        full = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, models.rows_in_front(model) :]
    for step, logits in enumerate(alone.logits):
        assert torch.allclose(logits[0], full[8 + step], atol=1e-5)


def follow(model, ids, mask):
    with inference(model):
        who, inputs = models.to_continue(model, ids, mask)
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
        return who.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)


@every_method
def test_a_method_begins_from_its_seed_alone(name):
    settings = PeftConfig(num_virtual_tokens=4, **METHODS[name])
    torch.manual_seed(1)
    first = models.trainable(models.add_adapter(llama(), settings, 5))
    base = llama()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = models.trainable(models.add_adapter(base, settings, 5))
    assert torch.equal(torch.get_rng_state(), state) and digest(first) == digest(second)
    other = models.trainable(models.add_adapter(llama(), settings, 6))
    assert (digest(other) == digest(first)) == (name == "none")


@every_method
def test_every_trained_tensor_gets_a_gradient(name):
    model = adapted(name).train()
    logits, targets = supervised_logits(model, batch(9, 14), torch.device("cpu"))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == models.trainable(model).keys()
    assert [key for key, p in trained.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", VIRTUAL)
def test_the_base_is_asked_without_virtual_tokens(name):
    model, base = adapted(name), llama()
    ids = torch.arange(3, 12)[None]
    assert torch.equal(models.bare(model)(ids).logits, base(ids).logits)
    assert not torch.allclose(model(ids).logits[:, -9:], base(ids).logits, atol=1e-3)
    assert models.virtual_positions(model) == 4 and models.virtual_positions(base) == 0


@every_method
def test_a_model_wears_what_it_is_given_and_takes_it_off(name, tmp_path):
    model, base = adapted(name), llama()
    models.save_adapter(model, models.trainable(model), tmp_path)
    before = digest(dict(base.named_parameters()))
    with models.worn(base, tmp_path) as wearing, inference(wearing):
        said = supervised_logits(wearing, batch(9), torch.device("cpu"))[0]
    with inference(model):
        assert torch.equal(said, supervised_logits(model, batch(9), torch.device("cpu"))[0])
    assert digest(dict(base.named_parameters())) == before
    with models.worn(base, None) as wearing:
        assert wearing is base


def test_text_becomes_the_first_prompt_repeated_or_cut():
    def words(text):
        return {"input_ids": [1, *(3 + "abcdef".index(letter) for letter in text)]}

    table = llama().get_input_embeddings().weight
    for text, length, ids in (("ab", 5, [1, 3, 4, 1, 3]), ("abcdef", 3, [1, 3, 4])):
        settings = PeftConfig(method="prompt", init_text=text, num_virtual_tokens=length)
        [prompt] = models.trainable(models.add_adapter(llama(), settings, 0, words)).values()
        assert torch.equal(prompt, table[ids])
    with pytest.raises(ModelError, match="tokenizer"):
        models.add_adapter(llama(), settings, 0)
    with pytest.raises(ModelError, match="no token"):
        models.add_adapter(llama(), settings, 0, lambda text: {"input_ids": []})


def test_virtual_tokens_begin_as_wide_as_the_models_embeddings_or_as_peft_draws_them():
    for init, spread in (("default", 0.02), ("gaussian", 1.0)):
        for method in ("prompt", "prefix"):
            settings = PeftConfig(method=method, num_virtual_tokens=60, init=init)
            [values] = models.trainable(models.add_adapter(llama(), settings, 0)).values()
            assert values.std().item() == pytest.approx(spread, rel=0.1)


def test_prefix_fits_grouped_query_attention():
    """Two of four heads hold keys: a prefix is as wide as what is cached."""
    settings = PeftConfig(method="prefix", num_virtual_tokens=3)
    [values] = models.trainable(models.add_adapter(llama(), settings, 0)).values()
    assert values.shape == (3, 2 * 2 * 2 * 8)  # layers, keys and values, heads, width


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "prompt", "num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"alpha": 0}, "alpha is 0"),
        (
            {"method": "prompt", "encoder": "mlp"},
            "encoder is 'mlp', but peft.method prompt .* prefix and ptuning",
        ),
        ({"method": "prefix", "encoder": "lstm"}, "prefix has mlp or none"),
        ({"init_text": "Think."}, "init_text is 'Think.', but peft.method lora has none"),
        ({"method": "prefix", "dropout": 0.1}, "dropout is 0.1, but peft.method prefix has none"),
        ({"method": "ptuning", "dropout": 0.1}, "only lstm"),
        ({"method": "ptuning", "target_modules": "q_proj"}, "target_modules .* belongs to lora"),
        ({"method": "none", "dora": True}, "dora is True, but peft.method none has none"),
    ],
)
def test_settings_that_a_method_does_not_read_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PeftConfig(**settings)


def test_a_whole_model_does_not_fit_another(tmp_path):
    model = adapted("none")
    models.save_adapter(model, models.trainable(model), tmp_path)
    with pytest.raises(ModelError, match=r"model.layers.2"):
        models.adapted(llama(layers=3), tmp_path)
    with pytest.raises(ModelError, match=r"weight is \(50, 32\)"):
        models.adapted(llama(vocab=60), tmp_path)


def test_a_model_without_a_cache_of_keys_takes_no_prefix():
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="MambaForCausalLM cannot take peft.method prefix: its forward has no past_key_values"):
        models.add_adapter(transformers.MambaForCausalLM(config), PeftConfig(method="prefix"), 0)


@pytest.mark.parametrize(("name", "words"), [("prompt", "do not know the virtual tokens"), ("none", "changes the model itself")])
def test_the_harness_is_not_asked_what_it_would_score_wrongly(name, words, tmp_path):
    model = adapted(name)
    models.save_adapter(model, models.trainable(model), tmp_path)
    with pytest.raises(ConfigError, match=words):
        harness.require_readable(models.Config("any"), tmp_path)
