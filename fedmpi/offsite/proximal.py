"""The proximal term of FedBiOT (Wu et al., KDD 2024, Eq. 6 and 9): a client's adapter stays near the one that it received.

    (epsilon / 2) * sum over modules of ||s B A - s B_t A_t||_F^2          with LoRA, and ||w - w_t||^2 of what is trained without

The distance is that of the products, which are as large as the weights they change. They are never formed: with U = [B - B_t, B_t]
and V = [A; A - A_t] the difference is U V, and its squared norm is the sum over the entries of (U'U)(VV'), matrices of 2r x 2r.
The terms of ||BA||^2 - 2 <BA, B_t A_t> + ||B_t A_t||^2 would cancel: at differences of 1e-4 nothing of them is left in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch

from fedmpi.models.adapters import ADAPTER
from fedmpi.training.hooks import Hook, Step


class Proximal(Hook):
    """Adds the term's gradient to that of the loss; `values` are the term at each step, on the model's device."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.values: list[torch.Tensor] = []
        self._received: dict[torch.nn.Parameter, torch.Tensor] = {}

    @property
    def mean(self) -> float:
        """Over the steps so far."""
        return float(torch.stack(self.values).mean())

    def before_fit(self, model: torch.nn.Module) -> None:
        """What is in the model now is what was received."""
        self._received = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        self.values = []

    def after_backward(self, step: Step) -> None:
        """Eq. 9: its second summand joins the first."""
        value = self.weight / 2 * self.distance(step.model)
        if self.weight:
            value.backward()  # type: ignore[no-untyped-call]
        self.values.append(value.detach())

    def distance(self, model: torch.nn.Module) -> torch.Tensor:
        """The squared distance to what was received."""
        alone = dict.fromkeys(self._received)
        total = torch.zeros((), device=next(iter(alone)).device)
        for _, a, b, scale in factors(model):
            if a in alone or b in alone:
                total = total + scale**2 * squared_product_gap(a, b, self._before(a), self._before(b))
                alone.pop(a, None)
                alone.pop(b, None)
        for parameter in alone:
            total = total + (parameter.float() - self._received[parameter].float()).square().sum()
        return total

    def _before(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A factor that is not trained is still what it was."""
        return self._received.get(parameter, parameter.detach())


def squared_product_gap(a: torch.Tensor, b: torch.Tensor, a_before: torch.Tensor, b_before: torch.Tensor) -> torch.Tensor:
    """||B A - B_t A_t||_F^2 for factors A (r, inputs) and B (outputs, r)."""
    a, b, a_before, b_before = (factor.float() for factor in (a, b, a_before, b_before))
    left = torch.cat([b - b_before, b_before], dim=1)
    right = torch.cat([a, a - a_before], dim=0)
    return ((left.T @ left) * (right @ right.T)).sum()


def factors(model: torch.nn.Module) -> Iterator[tuple[Any, Any, Any, float]]:
    """Every LoRA module with its A, B and scale."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if ADAPTER in getattr(module, "lora_A", {}):
            yield module, module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER]
