"""What an algorithm makes of a model, as far as shapes tell: who holds which model, and what is sent. No memory, no values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmpi.models import PeftConfig
from fedmpi.models.adapters import add_adapter, trained


@dataclass(frozen=True)
class Outline:
    """Models and messages on the meta device; `fedmpi.plan` turns them into figures."""

    server: Any
    client: Any
    down: Mapping[str, torch.Tensor]  # to a client in every round
    up: Mapping[str, torch.Tensor]  # and back
    once: Mapping[str, torch.Tensor] = field(default_factory=dict)  # to a client that opens no model folder, before the first


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
