"""What an algorithm makes of a model, as far as shapes tell: who holds which model, and what is sent. No memory, no values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmpi.models import PeftConfig, costs
from fedmpi.models.adapters import add_adapter, trained


@dataclass(frozen=True)
class Outline:
    """Models and messages on the meta device; `fedmpi.plan` turns them into figures."""

    server: Any
    client: Any
    down: Mapping[str, torch.Tensor]  # to a client in every round
    up: Mapping[str, torch.Tensor]  # and back
    once: Mapping[str, torch.Tensor] = field(default_factory=dict)  # to a client that opens no model folder, before the first
    alignment: "Alignment | None" = None


@dataclass(frozen=True)
class Alignment:
    """What the server computes to keep an emulator near the model: texts before the first round and in each, and what one costs."""

    before: costs.Work
    num_before: int
    within: costs.Work
    num_within: int
    teacher: int  # operations per token of the full model's pass

    def flops(self, length: int) -> tuple[int, int]:
        """Before the first round and in each, of texts of so many tokens."""
        ways = ((self.before, self.num_before), (self.within, self.num_within))
        before, within = (num * (work.of([length]) + self.teacher * length) for work, num in ways)
        return before, within


def same_for_all(shapes: Any, peft: PeftConfig) -> Outline:
    """Everybody holds the whole model, and what is trained is what travels."""
    with torch.device("meta"):
        model = add_adapter(shapes, peft, 0)
    return Outline(model, model, trained(model), trained(model))


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that makes up the model, buffers of packed weights included, and what is tied or shared once."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if seen.setdefault(id(tensor), name) == name}
