"""The engine: what computes a client's steps, here one rank for itself; others build on it. The loop above is the same for all.

Every rank of a client draws the same batches and keeps its share, so that counts of tokens need no communication and
K ranks with batch b give the step of one rank with batch K * b.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed as dist
from torch.amp.grad_scaler import GradScaler

from fedmpi.data.batching import Batch
from fedmpi.errors import TrainingError
from fedmpi.models.logits import IGNORED
from fedmpi.training.hooks import Hook


@dataclass(frozen=True)
class Engine:
    """A model to call forward, what happens from there to the moved weights, and this rank's place among those that train it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler  # does nothing unless the precision is fp16
    rank: int = 0
    size: int = 1
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext

    def share(self, batch: Batch) -> Batch:
        """This rank's rows; a rank left without any gets one that supervises nothing, since collectives need all."""
        if self.size == 1:
            return batch
        rows = slice(self.rank, None, self.size)
        if self.rank < len(batch.input_ids):
            labels = batch.labels[rows]
        else:
            rows, labels = slice(0, 1), torch.full_like(batch.labels[:1], IGNORED)
        width = int(batch.attention_mask[rows].any(0).nonzero().max()) + 1
        parts = ("input_ids", "attention_mask", *(() if batch.position_ids is None else ("position_ids",)))
        cut = {key: getattr(batch, key)[rows, :width] for key in parts}
        return replace(batch, **cut, labels=labels[:, :width], ids=batch.ids[rows])

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part of a step's loss."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def ready(self) -> None:
        """All parts are in: from here on gradients are those of the loss, whatever it was scaled by."""
        self.scaler.unscale_(self.optimizer)

    def clip(self, most: float | None) -> torch.Tensor:
        """The norm of the gradient, which is clipped to `most`; 0 where clipping is off, and where fp16 will leave the step out."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not most:
            return torch.zeros((), device=trained[0].device)
        norm = torch.nn.utils.clip_grad_norm_(trained, most).float()
        return norm.nan_to_num(0, 0, 0) if self.scaler.is_enabled() else norm

    def step(self) -> None:
        """Move the weights."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def clear(self) -> None:
        """No gradient is left."""
        self.optimizer.zero_grad()

    def admit(self, hooks: Sequence[Hook]) -> None:
        """Refuse hooks that this engine cannot serve."""

    def gather(self) -> None:
        """Make what was trained whole on every rank: here it is."""

    @property
    def bare(self) -> torch.nn.Module:
        """The model whose modules compute, without a wrapper."""
        return getattr(self.model, "module", self.model)

    def close(self) -> None:
        """Leave an ordinary model behind, and let go of the process group."""


def keeps_gradients(engine: str, hooks: Sequence[Hook]) -> None:
    """Refuse hooks that add to gradients, where these lie in parts, out of reach, when a hook is called."""
    names = [type(hook).__name__ for hook in hooks if type(hook).after_backward is not Hook.after_backward]
    if names:
        raise TrainingError(f"train.engine {engine} keeps gradients to itself, but {', '.join(names)} changes them: use ddp")
