"""What offsite tuning makes of a model, from shapes alone: who holds which layers, and what is sent. For `fedmpi.plan`."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from fedmpi.errors import ConfigError
from fedmpi.models import Outline, PeftConfig, add_adapter, find_targets, stored, trained
from fedmpi.models.backbone import decoder_layers
from fedmpi.offsite import Config
from fedmpi.offsite.builders import build
from fedmpi.offsite.preparation import fold, with_lora


def outline(config: Config, shapes: Any, peft: PeftConfig, emulator_travels: bool) -> Outline:
    """Clients hold the compressed model and train its adapter layers; the emulator's LoRA travels down beside them, if at all."""
    emulator = build(shapes, config)
    if config.prealign_steps and config.builder != "distilled":
        with torch.device("meta"):
            emulator = replace(emulator, model=fold(with_lora(emulator, peft, 0)))  # what is folded into factors makes them grow
    layout, held = emulator.layout, stored(emulator.model)
    own = [place for place in range(len(layout.order)) if layout.order[place] in layout.adapter]
    server = _tuned(shapes, peft, layout.adapter)
    client = _tuned(emulator.model, peft, range(len(layout.order)) if emulator_travels else own)
    down = trained(client)
    layers = decoder_layers(client)
    for place in set(range(len(layers))) - set(own):
        layers[place].requires_grad_(False)
    return Outline(server, client, down, trained(client), held)


def _tuned(model: Any, peft: PeftConfig, numbers: Collection[int]) -> Any:
    """The model with what the method trains in these layers alone."""
    layers = decoder_layers(model)
    if peft.method == "none":
        for number in numbers:
            layers[number].requires_grad_(True)
        return model
    if peft.method != "lora":
        raise ConfigError(f"peft.method {peft.method} has no place in single layers: offsite tuning takes lora or none")
    path = next(name for name, module in model.named_modules() if module is layers)
    wanted = tuple(peft.target_modules)
    leaves = None if wanted == ("all-linear",) else find_targets(model, wanted)
    names = [
        name
        for name, module in model.named_modules()
        if any(name.startswith(f"{path}.{number}.") for number in numbers)
        and isinstance(module, torch.nn.Linear)
        and (leaves is None or any(f".{name}".endswith(f".{leaf}") for leaf in leaves))
    ]
    with torch.device("meta"):
        return add_adapter(model, PeftConfig(rank=peft.rank, alpha=peft.alpha, target_modules=tuple(names)), 0)
