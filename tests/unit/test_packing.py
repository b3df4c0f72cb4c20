"""Packing: samples that share a row neither see nor predict one another, on every model that is let through; others are refused."""

import random

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import PAD, examples, llama, trained, with_lora
from torch.nn.functional import cross_entropy

from fedmpi import data, evaluation, models, training
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.errors import ConfigError
from fedmpi.hosting.base import Base
from fedmpi.hosting.host import Host
from fedmpi.models.logits import supervised_logits
from fedmpi.training.engines import Engine

SMALL = {"vocab_size": 50, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, initializer_range=0.3)),
    "llama, eager": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, initializer_range=0.3, attn_implementation="eager")
    ),
    "mistral, a window of 6": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=6, initializer_range=0.3)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA, num_key_value_heads=2, initializer_range=0.3)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    ),
}


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits, targets = supervised_logits(model, batch, torch.device("cpu"))
    loss = cross_entropy(logits, targets, reduction="sum") / batch.num_supervised
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_have_the_loss_and_the_gradient_of_rows_apart(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    models.require_packing(model, name)
    rows = examples(9)
    apart, packed = data.collate(rows, PAD), data.collate(data.pack(rows, 40), PAD)
    assert len(packed.input_ids) < len(apart.input_ids) == packed.num_examples == 9
    assert (packed.num_supervised, packed.num_tokens) == (apart.num_supervised, apart.num_tokens)
    (loss, gradients), (other, others) = (loss_and_gradients(model, batch) for batch in (apart, packed))
    assert other == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def test_a_sample_does_not_see_what_stands_before_it_in_its_row():
    torch.manual_seed(0)
    model, (one, two, three) = MODELS["llama"]().eval(), examples(3)

    def last(*before: Example) -> torch.Tensor:
        (row,) = data.pack([*before, three], 64)
        batch = data.collate([row], PAD)
        first = sum(row.lengths[: row.id.split(", ").index(three.id)])
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return logits[0, first : first + len(three.input_ids)]

    torch.testing.assert_close(last(one), last(two), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last(one, two), last(), rtol=1e-5, atol=1e-5)


def bloom():
    return transformers.BloomForCausalLM(transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=4))


def prompted():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(llama(spread=0.3), config)


class Forgetful(transformers.LlamaForCausalLM):
    """Takes positions and does not heed them."""

    def forward(self, input_ids=None, position_ids=None, **others):
        return super().forward(input_ids=input_ids, **others)


@pytest.mark.parametrize("made", [bloom, prompted, lambda: Forgetful(transformers.LlamaConfig(**LLAMA, initializer_range=0.3))])
def test_models_that_mix_samples_are_refused(made):
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="data.packing: this one with this adapter and attention lets samples"):
        models.require_packing(made().eval(), "this one")


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60), max_length=st.integers(30, 90))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths, max_length):
    rows = [Example(list(range(i, i + n)), [IGNORED, *range(i + 1, i + n)], f"r{i}") for i, n in enumerate(lengths)]
    packs = data.pack(rows, max_length)
    assert all(len(pack.input_ids) == sum(pack.lengths) <= max_length for pack in packs)
    found = [name for pack in packs for name in pack.id.split(", ")]
    assert sorted(found) == sorted(row.id for row in rows)
    assert sum(data.collate([pack], PAD).num_supervised for pack in packs) == sum(n - 1 for n in lengths)
    assert len(packs) <= 1 + 2 * sum(lengths) // max_length  # two rows that are both half empty would have been one
    assert packs == data.pack(rows, max_length)


def test_a_fit_counts_samples_and_not_rows():
    model, rows = with_lora(llama()), examples(12)
    packs = data.pack(rows, 60)
    fit = training.fit(model, packs, training.Config(epochs=1, batch_size=2, lr=0.01), seed=0, pad_id=PAD)
    assert fit.examples == 12 and fit.tokens == sum(len(row.input_ids) for row in rows) and fit.steps == -(-len(packs) // 2)
    again = with_lora(llama())
    training.fit(again, packs, training.Config(epochs=1, batch_size=2, lr=0.01), seed=0, pad_id=PAD)
    for name, value in trained(model).items():
        assert torch.equal(value, trained(again)[name])


def test_the_ranks_of_a_client_share_packed_rows():
    batch = data.collate(data.pack(examples(12), 40), PAD)
    shares = [Engine(None, None, None, rank=rank, size=2).share(batch) for rank in range(2)]
    for rank, share in enumerate(shares):
        width = share.input_ids.shape[1]
        assert torch.equal(share.position_ids, batch.position_ids[rank::2, :width]) and share.ids == batch.ids[rank::2]
    assert sum(len(share.input_ids) for share in shares) == len(batch.input_ids)


def test_a_host_packs_training_rows_and_still_counts_them_one_by_one():
    config = data.Config(num_rows=40, packing=True, max_length=256)
    base = Base(models.Config(), models.PeftConfig(rank=2), "cpu", 0)
    host = Host(base, data.federate(config, 2, 0), config, training.Config(), evaluation.Config())
    assert host.num_examples(0) == len(host.parties.clients[0].train) > len(host.examples(0))
    assert host.about(0)["samples"]["rows"] == host.num_examples(0)


def test_packing_and_grouping_are_one_too_many():
    with pytest.raises(ConfigError, match="data.packing leaves no padding"):
        data.Config(packing=True, group_by_length=True)


def test_a_large_corpus_is_packed_at_once():
    rng = random.Random(0)
    rows = [Example([5] * rng.randint(20, 400), [IGNORED, 5], str(i)) for i in range(20_000)]
    packs = data.pack(rows, 512)
    assert sum(len(pack.input_ids) for pack in packs) / (512 * len(packs)) > 0.97
