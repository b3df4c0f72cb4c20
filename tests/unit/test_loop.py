"""The optimiser loop against a plain loop written out here, and what it promises about seeds, counts and faults."""

import math
from itertools import islice

import pytest
import torch
from small_models import PAD, examples, llama, trained, with_lora
from torch.utils.flop_counter import FlopCounterMode

from fedmpi.data.batching import batches
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.errors import ConfigError, NonFinite, TrainingError
from fedmpi.seeding import seed_for
from fedmpi.training import Config, Hook, fit
from fedmpi.training.loop import num_micro_batches


def by_hand(model, data, config, seed):
    """Full logits, transformers' own loss times its count: another way to the same steps."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    stream = batches(data, config.batch_size, seed_for(seed, "batches"), PAD)
    losses = []
    for _ in range(config.steps):
        group = list(islice(stream, config.accumulation))
        total = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in group)
        loss = 0.0
        for batch in group:
            count = int((batch.labels[:, 1:] != IGNORED).sum())
            loss = loss + model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss * count
        optimizer.zero_grad()
        (loss / total).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        losses.append(loss.item() / total)
    return losses


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_equal_those_written_out(accumulation):
    config = Config(steps=5, batch_size=3, lr=1e-2, clip_norm=0.1, accumulation=accumulation, weight_decay=0.1)
    ours, theirs = with_lora(llama()), with_lora(llama())
    result = fit(ours, examples(7), config, seed=3, pad_id=PAD)
    losses = by_hand(theirs, examples(7), config, 3)
    assert result.first_loss == pytest.approx(losses[0], rel=1e-5)
    assert result.last_loss == pytest.approx(losses[-1], rel=1e-5)
    for name, value in trained(theirs).items():
        torch.testing.assert_close(trained(ours)[name], value, rtol=1e-4, atol=1e-6)


def test_accumulation_divides_once_by_the_tokens_of_all_micro_batches():
    """Batches of unequal token counts: a mean of means would differ."""
    data = examples(8)
    one, four = with_lora(llama()), with_lora(llama())
    whole = fit(one, data, Config(steps=1, batch_size=8, optimizer="sgd", lr=1.0, clip_norm=0), seed=1, pad_id=PAD)
    parts = Config(steps=1, batch_size=2, accumulation=4, optimizer="sgd", lr=1.0, clip_norm=None)
    split = fit(four, data, parts, seed=1, pad_id=PAD)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (split.tokens, split.supervised) == (whole.tokens, whole.supervised)
    for name, value in trained(one).items():
        torch.testing.assert_close(trained(four)[name], value, rtol=1e-4, atol=1e-6)


def test_result_depends_on_seed_data_and_start_only():
    """Dropout on, the global generators disturbed, gradients and optimiser state left behind by someone else."""
    config = Config(steps=3, batch_size=2)
    runs = []
    for noise, seed in ((1, 5), (2, 5), (1, 6)):
        model = with_lora(llama(), dropout=0.3)
        torch.manual_seed(noise)
        for parameter in model.parameters():
            if parameter.requires_grad and noise == 2:
                parameter.grad = torch.ones_like(parameter)
        fit(model, examples(6), config, seed=seed, pad_id=PAD)
        runs.append(trained(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_only_the_adapter_moves():
    model = with_lora(llama())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.eval()
    fit(model, examples(4), Config(steps=2, batch_size=2), seed=0, pad_id=PAD)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 6), (2, 3), (4, 2)])
def test_epochs_draw_every_example_so_many_times(accumulation, steps):
    seen: list[str] = []

    class Note(Hook):
        def before_step(self, step):
            seen.extend(name for batch in step.batches for name in batch.ids)

    config = Config(epochs=2, batch_size=3, accumulation=accumulation)
    result = fit(with_lora(llama()), examples(7), config, seed=0, pad_id=PAD, hooks=[Note()])
    assert result.steps == steps
    assert sorted(seen) == sorted([f"row{i}" for i in range(7)] * 2)


def test_num_micro_batches_with_ranks():
    assert num_micro_batches(Config(epochs=3, batch_size=4), 9) == 9
    assert num_micro_batches(Config(epochs=3, batch_size=4), 9, num_ranks=2) == 6
    assert num_micro_batches(Config(steps=5, accumulation=2), 9, num_ranks=2) == 10


def test_counts_are_of_real_and_supervised_tokens():
    data = examples(5)
    result = fit(with_lora(llama()), data, Config(epochs=1, batch_size=2), seed=0, pad_id=PAD)
    assert result.tokens == sum(len(example.input_ids) for example in data)
    assert result.supervised == sum(label != IGNORED for example in data for label in example.labels[1:])


def test_flops_of_a_fit_are_those_that_torch_counts():
    """Of the head torch sees what supervised tokens need; in the first layer it leaves out one product of attention."""
    model = with_lora(llama(layers=4))
    model.base_model.model.set_attn_implementation("eager")
    rows = [Example([5] * 12, [IGNORED] + [5] * 11, "a")] * 2
    counter = FlopCounterMode(display=False)
    with counter:
        result = fit(model, rows, Config(epochs=1, batch_size=2), seed=0, pad_id=PAD)
    head, product = 2 * (4 * 50 * 32), 2 * (2 * 32 * 12 * 12)  # two rows of it forward and backward; of two samples
    assert result.flops == counter.get_total_flops() + head + product
    assert fit(model, rows, Config(epochs=3, batch_size=1), seed=0, pad_id=PAD).flops == 3 * result.flops


def test_flops_of_full_training_are_six_per_weight_and_attention():
    model = llama().requires_grad_(True)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.get_input_embeddings().weight.numel()
    result = fit(model, [Example([5] * 10, [5] * 10, "a")], Config(epochs=1, batch_size=1, lr=1e-9), seed=0, pad_id=PAD)
    assert result.flops == 6 * 10 * matrices + 3 * 2 * 2 * 2 * 10 * 10 * 32


def test_loss_falls():
    result = fit(with_lora(llama()), examples(4), Config(steps=30, batch_size=4, lr=3e-2), seed=0, pad_id=PAD)
    assert result.last_loss < 0.9 * result.first_loss
    assert result.last_loss < result.loss < result.first_loss


def test_bf16_autocast_trains_fp32_weights():
    model = with_lora(llama())
    config = Config(steps=3, batch_size=4, lr=1e-2)
    full = fit(with_lora(llama()), examples(4), config, seed=0, pad_id=PAD)
    half = fit(model, examples(4), Config(steps=3, batch_size=4, lr=1e-2, precision="bf16"), seed=0, pad_id=PAD)
    assert half.loss == pytest.approx(full.loss, rel=0.02) and half.loss != full.loss
    assert all(value.dtype == torch.float32 for value in trained(model).values())


@pytest.mark.parametrize("clip_norm", [0, 1.0])
def test_a_loss_that_is_not_finite_names_step_and_samples(clip_norm):
    """One token of the vocabulary is poisoned, and stands in one sample."""
    model, data = llama(vocab=51), examples(6)
    model.get_input_embeddings().weight.data[50] = math.nan
    data[4].input_ids[3] = 50
    order = [batch.ids for batch in islice(batches(data, 2, seed_for(0, "batches"), PAD), 3)]
    bad = next(index for index, ids in enumerate(order) if "row4" in ids)
    with pytest.raises(NonFinite) as caught:
        fit(with_lora(model), data, Config(steps=3, batch_size=2, clip_norm=clip_norm), seed=0, pad_id=PAD)
    assert str(caught.value) == f"step {bad} of 3: loss is nan, samples {', '.join(order[bad])}; lower train.lr"


def test_weights_broken_by_the_last_step_are_refused():
    model = with_lora(llama())
    with pytest.raises(NonFinite, match="after step 0 the norm of the trained weights is"):
        fit(model, examples(4), Config(steps=1, lr=1e39, optimizer="sgd", clip_norm=0), seed=0, pad_id=PAD)


class Poison(Hook):
    """Makes the gradient of the named steps infinite."""

    def __init__(self, steps):
        self.steps, self.after = steps, []

    def after_backward(self, step):
        if step.index in self.steps:
            next(p for p in step.model.parameters() if p.requires_grad).grad.fill_(math.inf)

    def after_step(self, step):
        self.after.append(step.index)


def test_a_step_that_is_not_finite_is_skipped_where_that_is_asked_for():
    """Skipping steps 1 and 3 of 5 leaves the weights that a run gets which does not take those steps."""
    config = Config(steps=5, batch_size=2, on_nonfinite="skip", optimizer="sgd", lr=0.5)
    skipping, poison = with_lora(llama()), Poison({1, 3})
    result = fit(skipping, examples(10), config, seed=4, pad_id=PAD, hooks=[poison])
    assert (result.steps, poison.after, len(result.skipped)) == (3, [0, 2, 4], 2)
    assert result.skipped[0].startswith("step 1 of 5: the norm of the gradient is inf, samples row")
    assert result.metrics()["skipped"] == list(result.skipped)

    class Still(Hook):
        def after_backward(self, step):
            for parameter in step.model.parameters():
                if parameter.requires_grad and step.index in (1, 3):
                    parameter.grad.zero_()

    still = with_lora(llama())
    fit(still, examples(10), Config(steps=5, batch_size=2, optimizer="sgd", lr=0.5), seed=4, pad_id=PAD, hooks=[Still()])
    assert all(torch.equal(trained(still)[name], value) for name, value in trained(skipping).items())


def test_a_turn_of_which_nothing_is_left_fails():
    config = Config(steps=2, batch_size=2, on_nonfinite="skip")
    with pytest.raises(NonFinite, match=r"all 2 steps were skipped; the first: step 0 of 2: the norm of the gradient is inf"):
        fit(with_lora(llama()), examples(4), config, seed=0, pad_id=PAD, hooks=[Poison({0, 1})])


def test_nothing_to_train_on_or_with():
    with pytest.raises(TrainingError, match="no examples to train on"):
        fit(with_lora(llama()), [], Config(), seed=0, pad_id=PAD)
    with pytest.raises(TrainingError, match="no parameter of the model requires gradients"):
        fit(llama(), examples(2), Config(), seed=0, pad_id=PAD)
    with pytest.raises(TrainingError, match="samples blank have no supervised token"):
        fit(with_lora(llama()), [Example([3, 4], [IGNORED] * 2, "blank")], Config(), seed=0, pad_id=PAD)
    with pytest.raises(TrainingError, match=r"train\.engine ddp needs a client with ranks of its own"):
        fit(with_lora(llama()), examples(2), Config(engine="ddp"), seed=0, pad_id=PAD)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("epochs", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("accumulation", 0, "at least 1"),
        ("lr", 0.0, "a finite number above 0"),
        ("lr", math.nan, "a finite number above 0"),
        ("lr", math.inf, "a finite number above 0"),
        ("betas", (0.9, 1.0), "two numbers from 0 to below 1"),
        ("weight_decay", -0.1, "0 or more"),
        ("warmup_steps", -1, "0 or more"),
        ("clip_norm", -1.0, "above 0, or 0 or null"),
        ("optimizer", "adagrad", "one of adamw, adam, sgd, adamw8bit, paged_adamw, paged_adamw8bit"),
        ("schedule", "step", "one of constant, cosine, linear"),
        ("precision", "fp8", "one of fp32, bf16, fp16, half"),
        ("engine", "horovod", "one of plain, ddp, fsdp, deepspeed"),
        ("on_nonfinite", "ignore", "one of fail, skip"),
        ("optimizer_state", "lost", "one of fresh, keep"),
    ],
)
def test_a_config_that_cannot_be_names_its_key(key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        Config(**{key: value})
    assert str(caught.value).startswith(f"train.{key} is {value!r}; allowed is {allowed}")
