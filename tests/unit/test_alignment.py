"""Alignment: each equation against numbers, where its gradient goes, what it moves, and that the teacher is asked once."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from decoders import FAMILIES, decoder
from small_models import PAD, examples, llama

from fedmpi import models, offsite, training
from fedmpi.data import collate
from fedmpi.errors import CheckpointError, DataError
from fedmpi.offsite.alignment import Gap, align, goal, hidden_gap, kl
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.teacher import Teacher, look, on_disk
from fedmpi.tensors import digest

CPU = torch.device("cpu")
CONFIG = offsite.Config(drop_rate=0.5, adapter_first=0, adapter_last=2, align_lr=1e-2, align_batch_size=3)
TRAIN = training.Config(betas=(0.9, 0.95))


def adapted(model, layout, part):
    """LoRA everywhere, no longer zero; only one part of it is trained."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(
                0, 0.1 if "lora_A" in name or layout.part(layout.original(name)) == "adapter" else 0, generator=generator
            )
        parameter.requires_grad_("lora_" in name and layout.part(layout.original(name)) == part)
    return model.eval()


class Pair:
    """A full model and its emulator, the adapter's LoRA equal in both."""

    def __init__(self, model=None, config=CONFIG):
        model = model or llama(layers=6, spread=0.1)
        made = offsite.build(model, config)
        self.layout = made.layout
        whole = replace(made.layout, emulator=tuple(made.layout.inner))
        self.student = adapted(made.model, made.layout, "emulator")
        self.full = adapted(model, whole, "adapter")
        theirs = dict(self.student.named_parameters())
        for name, parameter in self.full.named_parameters():
            if "lora_" in name:
                same = whole.part(name) == "adapter"
                parameter.data.copy_(theirs[self.layout.compressed(name)]) if same else parameter.data.zero_()

    def align(self, config=CONFIG, count=12, **asked):
        found = goal(self.full, self.layout, examples(count), config, seed=0, pad_id=PAD)
        return align(found, self.student, self.layout, config, TRAIN, **{"steps": 4, "seed": 0, **asked})


def values(model):
    return {name: digest({"": parameter}) for name, parameter in model.named_parameters()}


def test_eq_4_is_the_divergence_from_the_teacher_to_the_student():
    wanted, found = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(kl(wanted, found)) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    sure, tried = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert float(kl(sure + 3, tried - 2)) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert float(kl(tried, sure)) == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    assert float(kl(torch.cat([sure, sure]), torch.cat([tried, tried]))) == pytest.approx(2 * float(kl(sure, tried)))


def test_eq_3_is_a_squared_distance_and_can_be_taken_in_units_of_the_teacher():
    wanted, found = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[4.0, 6.0], [1.0, 0.0]])
    assert float(hidden_gap(wanted, found)) == 1 + 4 + 1
    assert float(hidden_gap(wanted, found, "rms")) == pytest.approx((1 + 4) / 2 / 12.5 + 1 / 2 / 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_looked_at_is_the_layers_output_where_the_next_token_is_supervised(family):
    model, batch = decoder(family), collate(examples(4), PAD)
    seen = look(model, 3, batch, CPU)
    said = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False)
    hidden, logits = [], []
    for row in range(4):
        for column in range(batch.labels.shape[1] - 1):
            if batch.labels[row, column + 1] != -100:
                hidden.append(said.hidden_states[4][row, column])
                logits.append(said.logits[row, column])
    assert len(hidden) == batch.num_supervised
    torch.testing.assert_close(seen.hidden, torch.stack(hidden))
    torch.testing.assert_close(seen.logits, torch.stack(logits), rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_sum_of_both_terms_over_supervised_positions():
    pair, batch = Pair(), collate(examples(3), PAD)
    wanted = Teacher(pair.full, pair.layout)(batch, CPU)
    found = look(pair.student, pair.layout.last_emulated, batch, CPU)
    terms = [float(term.detach()) for term in (hidden_gap(wanted.hidden, found.hidden), kl(wanted.logits, found.logits))]
    assert terms[0] > 0 and terms[1] > 0
    for kd_weight in (0.0, 0.5):
        gap = Gap(Teacher(pair.full, pair.layout), pair.layout.last_emulated, kd_weight, "none")
        assert float(gap(pair.student, batch, CPU).detach()) == pytest.approx(terms[0] + kd_weight * terms[1])
        assert [float(gap.hidden), float(gap.divergence)] == pytest.approx(terms)


def test_the_gradient_of_the_divergence_passes_through_the_frozen_adapter():
    pair, batch = Pair(), collate(examples(3), PAD)
    wanted, place = Teacher(pair.full, pair.layout)(batch, CPU), pair.layout.last_emulated
    kl(wanted.logits, look(pair.student, place, batch, CPU).logits).backward()
    named = dict(pair.student.named_parameters())
    moved = {name for name, parameter in named.items() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert moved and all(pair.layout.part(pair.layout.original(name)) == "emulator" for name in moved)
    name = next(name for name in sorted(moved) if "lora_B" in name)
    index = int(named[name].grad.abs().argmax())
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            named[name].view(-1)[index] += sign * 1e-2
            logits = look(pair.student.double(), place, batch, CPU).logits
            ends.append(float(kl(wanted.logits.double(), logits)))
            pair.student.float()
            named[name].view(-1)[index] -= sign * 1e-2
    assert float(named[name].grad.view(-1)[index]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=0.02)


@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_alignment_moves_the_emulators_part_and_nothing_else(kd_weight):
    pair = Pair()
    before, full = values(pair.student), values(pair.full)
    pair.align(replace(CONFIG, kd_weight=kd_weight))
    after = values(pair.student)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {name for name, p in pair.student.named_parameters() if p.requires_grad}
    assert {pair.layout.part(pair.layout.original(name)) for name in moved} == {"emulator"}
    assert values(pair.full) == full


def test_it_brings_the_emulator_nearer():
    pair = Pair()
    first = pair.align(steps=1).figures
    pair.align(steps=40)
    last = pair.align(steps=1).figures
    assert last["align_hidden"] < 0.8 * first["align_hidden"]


def test_with_nothing_dropped_there_is_nothing_to_align():
    config = replace(CONFIG, drop_rate=0.0)
    figures = Pair(config=config).align(config, steps=1).figures
    assert figures["align_loss"] == figures["align_hidden"] == figures["align_kd"] == 0


def test_the_optimiser_is_kept_under_original_names_and_goes_on():
    kept, fresh = Pair(), Pair()
    first, _ = (pair.align(steps=2).state for pair in (kept, fresh))
    assert {kept.layout.part(name) for name in first.tensors} == {"emulator"}
    assert any(".layers.3." in name for name in first.tensors)  # the emulator's second layer
    second = kept.align(steps=2, state=training.OptimState.of(first.pack())).state
    fresh.align(steps=2)
    assert (first.step, second.step) == (2, 4)
    assert values(kept.student) != values(fresh.student)


def test_a_models_own_dropout_is_off():
    """GPT-2 has a tenth of it; a student with it would be told to make up for noise."""
    pair = Pair(decoder("gpt2"), replace(CONFIG, drop_rate=0.0))
    assert pair.align(steps=1).figures["align_loss"] == pytest.approx(0, abs=1e-6)


def test_no_steps_leave_everything_as_it_is():
    pair = Pair()
    before, state = values(pair.student), pair.align(steps=1).state
    after = values(pair.student)
    assert pair.align(steps=0, state=state).state is state and values(pair.student) == after != before


def test_a_fresh_optimiser_is_not_handed_on():
    config = replace(CONFIG, align_optimizer_state="fresh")
    assert Pair().align(config).state is None


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_texts():
    pairs = Pair(), Pair(), Pair()
    for pair, seed in zip(pairs, (5, 5, 6), strict=True):
        pair.align(seed=seed)
    assert values(pairs[0].student) == values(pairs[1].student) != values(pairs[2].student)


@pytest.mark.parametrize("pool", [0, 2])
def test_the_full_model_is_asked_once_for_a_batch_or_once_for_a_pooled_text(pool):
    texts = []
    model, config = llama(layers=6, spread=0.1), replace(CONFIG, align_pool=pool)
    pair = Pair(model)
    inner = offsite.find_layers(model)[1][3]  # dropped from the emulator
    inner.register_forward_hook(lambda module, given, output: texts.append(len(output)))
    pair.align(config)
    assert sum(texts) == (6 if pool else 4 * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pool_gives_what_the_full_model_gives_with_whatever_adapter(family):
    pair = Pair(decoder(family))
    found = goal(pair.full, pair.layout, examples(12), replace(CONFIG, align_pool=2), seed=0, pad_id=PAD)
    assert len(found.examples) == 6 and set(found.teacher.kept) == {example.id for example in found.examples}
    for _ in range(2):
        for batch in (collate(found.examples[:3], PAD), collate(found.examples[1:5], PAD)):
            wanted, kept = Teacher(pair.full, pair.layout)(batch, CPU), found.teacher(batch, CPU)
            torch.testing.assert_close(kept.hidden, wanted.hidden, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(kept.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        trained = models.trainable(pair.full)
        models.load_trainable(pair.full, {name: tensor + 0.3 for name, tensor in trained.items()})


def test_a_pool_lies_in_a_file_without_a_name_that_goes_with_it(tmp_path):
    mapped = lambda: sum(str(tmp_path) in line for line in open("/proc/self/maps"))  # noqa: E731, SIM115
    pair, config = Pair(), replace(CONFIG, align_pool=2)
    found = goal(pair.full, pair.layout, examples(12), config, seed=0, pad_id=PAD, folder=tmp_path)
    memory = goal(pair.full, pair.layout, examples(12), config, seed=0, pad_id=PAD)
    assert list(tmp_path.iterdir()) == [] and mapped() == 1
    assert {name: states.tolist() for name, states in found.teacher.kept.items()} == {
        name: states.tolist() for name, states in memory.teacher.kept.items()
    }
    del found
    gc.collect()
    assert mapped() == 0


def test_a_pool_without_room_says_so():
    with pytest.raises(CheckpointError, match=r"offsite.align_pool: \d+ bytes of hidden states could not be kept in /proc"):
        on_disk((2, 3), torch.float32, Path("/proc"))


def test_a_pool_needs_texts_that_can_be_told_apart():
    same = [replace(example, id="row") for example in examples(6)]
    pair = Pair()
    with pytest.raises(DataError, match="of 6 public examples 5 share their id"):
        goal(pair.full, pair.layout, same, replace(CONFIG, align_pool=2), seed=0, pad_id=PAD)


def test_the_layer_that_is_compared_is_the_emulators_last():
    layout = Layout("model.layers", 8, 2, 2, (2, 4))
    assert Teacher(torch.nn.Identity(), layout).place == 5
