"""What a client's training comes to, step by step and in the end. It must never know how a step is computed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmpi.data.batching import Batch
from fedmpi.errors import NonFinite
from fedmpi.training.hooks import Step
from fedmpi.training.optim import OptimState


@dataclass(frozen=True)
class Fit:
    """What a client's training came to; losses are means over supervised tokens, counts are of all the client's ranks.

    `flops` is what the mathematics of forward and backward takes, attention and head included (see `models.costs`). `skipped`
    says which steps were left out and why. `state` is there with optimizer_state `keep`.
    """

    loss: float
    first_loss: float
    last_loss: float
    steps: int
    examples: int
    tokens: int
    supervised: int
    seconds: float
    flops: int
    skipped: tuple[str, ...] = ()
    state: OptimState | None = None

    def metrics(self) -> dict[str, Any]:
        """What travels with an update: the figures, and which steps were skipped and why."""
        names = ("loss", "first_loss", "last_loss", "steps", "examples", "tokens", "supervised", "seconds", "flops")
        return {name: float(getattr(self, name)) for name in names} | {"skipped": list(self.skipped)}


@dataclass
class Tally:
    """What the steps came to; sums of loss and norms of gradients wait on their device until they are looked at."""

    losses: list[float] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    flops: int = 0
    pending: list[tuple[Step, int, torch.Tensor]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parts: int = 1  # that a micro-batch is cut into, for want of memory

    def count(self, batches: Sequence[Batch], flops: int) -> None:
        """These were passed through the model."""
        self.examples += sum(batch.num_examples for batch in batches)
        self.tokens += sum(batch.num_tokens for batch in batches)
        self.flops += flops

    def look(self, total: Callable[[torch.Tensor], torch.Tensor], skips: bool) -> bool:
        """Take in what is pending, the same on every rank of the client; whether the last of the steps may be taken.

        What is not finite fails the fit, or is noted as a step to skip.
        """
        if not self.pending:
            return True
        values = total(torch.stack([evidence for _, _, evidence in self.pending])).tolist()
        sound = True
        for (step, supervised, _), (loss, norm) in zip(self.pending, values, strict=True):
            sound = math.isfinite(loss) and math.isfinite(norm)
            if sound:
                self.losses.append(loss)
                self.supervised.append(supervised)
                continue
            what = f"loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
            note = f"step {step.index} of {step.num_steps}: {what}, samples {names(step)}"
            if not skips:
                raise NonFinite(f"{note}; lower train.lr")
            self.skipped.append(note)
        self.pending.clear()
        return sound

    def fit(self, num_steps: int, seconds: float, state: OptimState | None) -> Fit:
        """All of it."""
        supervised = sum(self.supervised)
        return Fit(
            loss=math.fsum(self.losses) / supervised,
            first_loss=self.losses[0] / self.supervised[0],
            last_loss=self.losses[-1] / self.supervised[-1],
            steps=num_steps - len(self.skipped),
            examples=self.examples,
            tokens=self.tokens,
            supervised=supervised,
            seconds=seconds,
            flops=self.flops,
            skipped=tuple(self.skipped),
            state=state,
        )


def names(step: Step) -> str:
    """The samples of a step, as an error shows them."""
    ids = [str(name) for batch in step.batches for name in batch.ids]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
