"""Hooks: small objects that the optimiser loop calls at five points. They see a step; they never see rounds or links.

Several hooks are called in the order given, at every point. A term of the loss is added in `after_backward`: call
`.backward()` on it there, or add its gradient; in a client of several ranks the gradient is by then the same on each.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmpi.errors import ConfigError

if TYPE_CHECKING:  # algorithm files define hooks, and must load without torch
    import torch

    from fedmpi.data.batching import Batch


@dataclass(frozen=True)
class Step:
    """One optimiser step; `loss` is this rank's part of its mean over supervised tokens, None before backward."""

    model: "torch.nn.Module"
    optimizer: "torch.optim.Optimizer"
    index: int
    num_steps: int
    batches: "Sequence[Batch]"
    loss: "torch.Tensor | None" = None


class Hook:
    """Does nothing at each of the five points; a hook redefines those it needs."""

    def before_fit(self, model: "torch.nn.Module") -> None:
        """The model is ready and nothing has been trained."""

    def before_step(self, step: Step) -> None:
        """The batches are drawn, gradients are empty, the learning rate is set."""

    def after_backward(self, step: Step) -> None:
        """Gradients of the whole step are there, unclipped; a hook may add to them."""

    def after_step(self, step: Step) -> None:
        """The weights have moved."""

    def after_fit(self, model: "torch.nn.Module") -> None:
        """All steps are done."""


def load_hooks(names: Sequence[str]) -> tuple[Hook, ...]:
    """New hooks from dotted names, in order; every name that fails is listed in one ConfigError."""
    hooks, faults = [], []
    for name in names:
        try:
            hooks.append(_load(name))
        except (ImportError, AttributeError, TypeError) as error:
            faults.append(f"{name} ({error})")
    if faults:
        raise ConfigError(f"train.hooks: cannot load {'; '.join(faults)}; give names of Hook classes")
    return tuple(hooks)


def _load(name: str) -> Hook:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ImportError("no module in the name")
    hook = getattr(importlib.import_module(module), attribute)()
    if not isinstance(hook, Hook):
        raise TypeError(f"makes a {type(hook).__name__}, not a Hook")
    return hook
