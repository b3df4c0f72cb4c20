"""Alignment of an emulator with the layers that it stands for: FedBiOT's lower level (Wu et al., KDD 2024, Eq. 3 to 5 and 7).

    ||E(x) - E*(x)||_2^2 + lambda * KL(M(x; A, E*) || M(x; A, E)),     averaged over the supervised positions of public text

It is the one optimiser loop with this loss. What is trained is what requires a gradient in the student: the emulator's part, while
the adapter is frozen and lets the gradient pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

from fedmpi import training
from fedmpi.data import Batch, Example, collate
from fedmpi.models import costs
from fedmpi.offsite import Config
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.teacher import PooledTeacher, Teacher, Views, keep, look, pool


@dataclass(frozen=True)
class Goal:
    """Whom an emulator imitates, and on which public examples."""

    teacher: Teacher | PooledTeacher
    examples: Sequence[Example]
    pad_id: int


@dataclass(frozen=True)
class Aligned:
    """What an alignment came to: means over supervised positions, and the optimiser's state by names on the original model."""

    figures: dict[str, float]
    state: training.OptimState | None = None


def goal(
    model: torch.nn.Module,
    layout: Layout,
    examples: Sequence[Example],
    config: Config,
    *,
    seed: int,
    pad_id: int,
    folder: Path | None = None,
) -> Goal:
    """The full model as a goal, whatever adapter is loaded into it later; with a pool, its lower part is passed here, once, and
    what it gives is kept in `folder`."""
    if not config.align_pool:
        return Goal(Teacher(model, layout), examples, pad_id)
    chosen = pool(examples, config.align_pool * config.align_batch_size, seed)
    kept = keep(model, layout, chosen, config.align_batch_size, pad_id, folder)
    return Goal(PooledTeacher(model, layout, kept), chosen, pad_id)


def align(
    goal: Goal,
    student: torch.nn.Module,
    layout: Layout,
    config: Config,
    train: training.Config,
    *,
    steps: int,
    seed: int,
    state: training.OptimState | None = None,
    hooks: Sequence[training.Hook] = (),
) -> Aligned:
    """Bring the student nearer, in place. Settings that alignment has not of its own are those of local training."""
    if not steps:
        return Aligned({}, state)
    settings = replace(
        train,
        steps=steps,
        epochs=None,
        batch_size=config.align_batch_size,
        lr=config.align_lr,
        accumulation=1,
        engine="plain",
        optimizer_state=config.align_optimizer_state,
        hooks=(),
    )
    gap = Gap(goal.teacher, layout.last_emulated, config.kd_weight, config.normalise)
    kept = _renamed(state, layout.compressed) if state else None
    fit = training.fit(student, goal.examples, settings, seed=seed, pad_id=goal.pad_id, hooks=hooks, state=kept, loss=gap)
    figures = {
        "align_loss": fit.loss,
        "align_hidden": float(gap.hidden) / fit.supervised,
        "align_kd": float(gap.divergence) / fit.supervised,
        "align_tokens": float(fit.tokens),
        "align_seconds": fit.seconds,
        "align_flops": float(fit.flops + costs.forward_per_token(goal.teacher.model) * fit.tokens),
    }
    return Aligned(figures, _renamed(fit.state, layout.original) if fit.state else None)


@torch.no_grad()
def distance(goal: Goal, student: torch.nn.Module, layout: Layout, batch_size: int) -> dict[str, float]:
    """How far the student is from the goal on all its examples: both terms and, in units of the goal, the hidden states' error."""
    device = next(student.parameters()).device
    total, count = torch.zeros(3, dtype=torch.float64), 0
    for start in range(0, len(goal.examples), batch_size):
        batch = collate(goal.examples[start : start + batch_size], goal.pad_id)
        wanted = goal.teacher(batch, device)
        found = look(student.eval(), layout.last_emulated, batch, device)
        terms = [hidden_gap(wanted.hidden, found.hidden), wanted.hidden.square().sum(), kl(wanted.logits, found.logits)]
        total += torch.stack(terms).double().cpu()
        count += batch.num_supervised
    hidden, norm, divergence = total.tolist()
    return {"hidden": hidden / count, "relative": math.sqrt(hidden / norm), "kd": divergence / count}


class Gap:
    """Eq. 7 as a loss of the loop, and the sums of its two terms."""

    def __init__(self, teacher: Callable[[Batch, torch.device], Views], place: int, kd_weight: float, normalise: str) -> None:
        self.teacher, self.place, self.kd_weight, self.normalise = teacher, place, kd_weight, normalise
        self.hidden = self.divergence = torch.zeros(())

    def __call__(self, model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
        """The sum over the batch's supervised positions. Without dropout, which the teacher has not either."""
        if model.training:
            model.eval()
        wanted = self.teacher(batch, device)
        found = look(model, self.place, batch, device)
        hidden = hidden_gap(wanted.hidden, found.hidden, self.normalise)
        divergence = kl(wanted.logits, found.logits)
        self.hidden = self.hidden.to(device) + hidden.detach()
        self.divergence = self.divergence.to(device) + divergence.detach()
        return hidden + self.kd_weight * divergence if self.kd_weight else hidden


def hidden_gap(wanted: torch.Tensor, found: torch.Tensor, normalise: str = "none") -> torch.Tensor:
    """Eq. 3, summed over positions: the squared distance; rms, as offsite tuning's code: its mean in units of the wanted rms."""
    gap = found - wanted
    if normalise == "rms":
        return (gap / wanted.square().mean(-1, keepdim=True).sqrt()).square().mean(-1).sum()
    return gap.square().sum()


def kl(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Eq. 4, summed over positions: KL(wanted || found) of the distributions that logits say, at temperature 1."""
    sure, tried = log_softmax(wanted.float(), -1), log_softmax(found.float(), -1)
    return (sure.exp() * (sure - tried)).sum()


def _renamed(state: training.OptimState, rename: Callable[[str], str]) -> training.OptimState:
    return replace(state, tensors={rename(name): tensor for name, tensor in state.tensors.items()})
