"""Pre-alignment: the emulator comes nearer, its LoRA is folded into weights of its own, and the original keeps every bit."""

import pytest
import torch
import transformers
from decoders import decoder, tokens
from small_models import PAD, examples

from fedmpi import models, offsite, training
from fedmpi.data import collate
from fedmpi.errors import ConfigError
from fedmpi.offsite.alignment import distance, goal
from fedmpi.offsite.preparation import fold
from fedmpi.offsite.shapes import outline
from fedmpi.tensors import digest

TEXT = [collate(examples(6, seed=index), PAD) for index in range(3)]
LORA = models.PeftConfig(rank=4)


def prepared(family, builder, **settings):
    """The original, what it was, its emulator before and after, and how far these are."""
    wanted = {"drop_rate": 0.5, "adapter_first": 0, "adapter_last": 2, "bits": 4, "prealign_steps": 12, "align_lr": 3e-3}
    config = offsite.Config(builder=builder, **{**wanted, **settings})
    model = decoder(family)
    values = digest(model.state_dict())
    emulator = offsite.build(model, config, TEXT)
    target = goal(model, emulator.layout, examples(12), config, seed=0, pad_id=PAD)
    before = distance(target, emulator.model, emulator.layout, 4)
    after, done = offsite.prealign(emulator, target, config, training.Config(), LORA, seed=0)
    assert digest(model.state_dict()) == values
    return model, after, before, distance(target, after.model, after.layout, 4), done


@pytest.mark.parametrize("builder", ["uniform", "influence", "shared", "thin", "quantized", "distilled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_comes_nearer_and_the_original_keeps_every_bit(family, builder):
    _, emulator, before, after, done = prepared(family, builder)
    assert after["hidden"] < before["hidden"]
    assert done.figures["align_tokens"] > 0 and done.state is not None
    assert type(emulator.model).__name__ in ("LlamaForCausalLM", "GPT2LMHeadModel")
    assert not any("lora" in name or parameter.requires_grad for name, parameter in emulator.model.named_parameters())
    again = models.add_adapter(emulator.model, LORA, 0)  # the federation's own
    assert models.trainable(again)


def test_what_did_not_change_stays_in_the_originals_memory():
    model, emulator, *_ = prepared("llama", "uniform")
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    own = {name for name, parameter in emulator.model.named_parameters() if parameter.data_ptr() not in theirs}
    assert own == {f"model.layers.{place}.self_attn.{name}.weight" for place in (0, 1) for name in ("q_proj", "v_proj")}
    model, emulator, *_ = prepared("llama", "distilled")
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    own = {name for name, parameter in emulator.model.named_parameters() if parameter.data_ptr() not in theirs}
    assert own == {name for name, _ in emulator.model.named_parameters() if name.startswith(("model.layers.0.", "model.layers.1."))}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("builder", ["uniform", "shared", "thin", "quantized"])
def test_folding_changes_nothing_but_the_form(family, builder):
    emulator = offsite.build(decoder(family), offsite.Config(builder=builder, drop_rate=0.5, adapter_last=2), TEXT)
    student = models.add_adapter(emulator.model, models.PeftConfig(rank=4, target_modules=("all-linear",)), 0)
    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.1)
    expected = student(tokens()).logits
    torch.testing.assert_close(fold(student)(tokens()).logits, expected.detach(), rtol=1e-4, atol=1e-4)


def test_no_steps_leave_the_emulator_as_it_was_built():
    _, emulator, before, after, done = prepared("llama", "uniform", prealign_steps=0)
    assert before == after and done.state is None
    assert torch.equal(emulator.model(tokens()).logits, offsite.assemble(decoder("llama"), (0, 3, 4, 5))(tokens()).logits)


def test_distilling_needs_steps_and_fp32():
    with pytest.raises(ConfigError, match="distilled and offsite.prealign_steps 0"):
        offsite.Config(builder="distilled", prealign_steps=0)
    config = offsite.Config(builder="distilled", drop_rate=0.5, adapter_last=2, prealign_steps=1)
    model = decoder("llama").to(torch.bfloat16)
    emulator = offsite.build(model, config)
    target = goal(model, emulator.layout, examples(4), config, seed=0, pad_id=PAD)
    with pytest.raises(ConfigError, match="trains whole layers, model.dtype is torch.bfloat16: give float32"):
        offsite.prealign(emulator, target, config, training.Config(), LORA, seed=0)


@pytest.mark.parametrize("builder", ["uniform", "influence", "shared", "thin", "quantized", "distilled"])
def test_shapes_alone_tell_what_a_client_will_hold(builder):
    _, emulator, *_ = prepared("llama", builder)
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(decoder("llama").config)
    config = offsite.Config(builder=builder, drop_rate=0.5, adapter_first=0, adapter_last=2, bits=4)
    planned = outline(config, shapes, LORA, emulator_travels=True).once
    stored = emulator.model.state_dict()
    real = {*dict(emulator.model.named_parameters()), *(name for name, _ in emulator.model.named_buffers() if name in stored)}
    assert builder == "shared" or planned.keys() == real  # which neighbours share, only text can tell
    assert sum(t.numel() * t.element_size() for t in planned.values()) == sum(
        stored[name].numel() * stored[name].element_size() for name in real
    )
