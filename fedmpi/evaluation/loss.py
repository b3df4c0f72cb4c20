"""Held-out loss: the mean loss per supervised token on what no client trained on. It leaves the model as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedmpi import watch
from fedmpi.data.batching import collate
from fedmpi.data.prompts import Example
from fedmpi.errors import DataError
from fedmpi.models.logits import supervised_logits


@dataclass(frozen=True)
class LossScore:
    """Mean loss and share of right next tokens over `num_tokens` supervised tokens."""

    loss: float
    num_tokens: int
    token_accuracy: float


def heldout_loss(model: torch.nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int) -> LossScore:
    """Sums are taken in float64 in one order, so the batch size moves the result by the noise of a forward pass only.

    Examples of like length stand in one batch: less padding, and the order is a function of the examples alone.
    """
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    total, right, count = 0.0, 0, 0
    with inference(model):
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad_id)
            logits, targets = supervised_logits(model, batch, device)
            total += float(cross_entropy(logits.float(), targets, reduction="none").double().sum())
            right += int((logits.argmax(-1) == targets).sum())
            count += len(targets)
            watch.tick()
    if not count:
        raise DataError(f"held-out loss: no supervised token in {len(examples)} examples; give a held-out split")
    return LossScore(total / count, count, right / count)


def overall(by_client: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """One score of clients' own: the mean over all their tokens, summed in the order of the clients."""
    scores = [LossScore(**by_client[client]) for client in sorted(by_client)]  # type: ignore[arg-type]
    count = sum(score.num_tokens for score in scores)
    loss, right = (sum(getattr(s, key) * s.num_tokens for s in scores) for key in ("loss", "token_accuracy"))
    return {"eval_loss": loss / count, "eval_token_accuracy": right / count}


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
