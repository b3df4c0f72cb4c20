"""Held-out loss against transformers' own loss, weighted by hand."""

import pytest
import torch
from small_models import PAD, examples, llama, with_lora

from fedmpi.data.batching import collate
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.errors import DataError
from fedmpi.evaluation import heldout_loss


def test_equals_the_mean_over_supervised_tokens():
    model, data = llama(), examples(5)
    total, count, right = 0.0, 0, 0
    for example in data:
        batch = collate([example], PAD)
        out = model(batch.input_ids, labels=batch.labels)
        tokens = sum(label != IGNORED for label in example.labels[1:])
        total, count = total + float(out.loss) * tokens, count + tokens
        right += int((out.logits[:, :-1].argmax(-1) == batch.labels[:, 1:]).sum())
    score = heldout_loss(model, data, 2, PAD)
    assert score.loss == pytest.approx(total / count, rel=1e-6)
    assert (score.num_tokens, score.token_accuracy) == (count, right / count)


def test_independent_of_batch_size_and_order_of_examples():
    model, data = with_lora(llama()), examples(9)
    losses = [heldout_loss(model, data, size, PAD) for size in (1, 4, 64)]
    assert losses[1].loss == pytest.approx(losses[0].loss, rel=1e-6) and losses[2].loss == pytest.approx(losses[0].loss)
    assert len({score.token_accuracy for score in losses}) == 1
    assert heldout_loss(model, data[::-1], 64, PAD).loss == pytest.approx(losses[2].loss, rel=1e-6)


def test_pad_that_is_a_real_token_is_not_masked():
    """The mask comes from lengths: another pad id gives the same loss."""
    model, data = llama(), examples(6)
    assert heldout_loss(model, data, 6, 0).loss == pytest.approx(heldout_loss(model, data, 6, 7).loss, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_changes_nothing(training):
    model = with_lora(llama(), dropout=0.5).train(training)
    state = torch.get_rng_state()
    first, second = (heldout_loss(model, examples(3), 2, PAD) for _ in range(2))
    assert first == second
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_nothing_supervised_is_an_error():
    with pytest.raises(DataError, match="no supervised token in 1 examples"):
        heldout_loss(llama(), [Example([3, 4], [IGNORED, IGNORED], "blank")], 2, PAD)
    with pytest.raises(DataError, match="no supervised token in 0 examples"):
        heldout_loss(llama(), [], 2, PAD)
