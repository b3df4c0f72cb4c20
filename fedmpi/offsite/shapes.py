"""What offsite tuning makes of a model, from shapes alone: who holds which layers, and what is sent. For `fedmpi.plan`."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from fedmpi.errors import ConfigError
from fedmpi.models import Outline, PeftConfig, add_adapter, costs, find_targets, only, stored, trained
from fedmpi.models.backbone import decoder_layers
from fedmpi.models.outline import Alignment
from fedmpi.offsite import Config
from fedmpi.offsite.builders import Emulator, build
from fedmpi.offsite.preparation import settled, student

TOKENS = 8  # of the text that is passed; what it costs holds for every length
NOTHING = costs.Work(0, 0, 0, 0, 0)


def outline(config: Config, shapes: Any, peft: PeftConfig, emulator_travels: bool) -> Outline:
    """Clients hold the compressed model and train its adapter layers; the emulator's LoRA travels down beside them, if at all."""
    emulator, before = _prealigned(build(shapes, config), config, peft)
    layout, held = emulator.layout, stored(emulator.model)
    own = [place for place in range(len(layout.order)) if layout.order[place] in layout.adapter]
    server = _tuned(shapes, peft, layout.adapter)
    client = _tuned(emulator.model, peft, range(len(layout.order)) if emulator_travels else own)
    down, layers = trained(client), decoder_layers(client)
    within = NOTHING
    if emulator_travels and config.align_steps:
        with only(down, [name for name in down if layout.part(layout.original(name)) == "emulator"]):
            within = costs.step_of(client, 1, TOKENS).work
    for place in set(range(len(layers))) - set(own):
        layers[place].requires_grad_(False)
    steps = (config.prealign_steps, config.align_steps if emulator_travels else 0)
    num_before, num_within = (config.align_batch_size * num for num in steps)
    aligned = Alignment(before, num_before, within, num_within, teacher=costs.forward_per_token(server))
    return Outline(server, client, down, trained(client), held, aligned)


def _prealigned(emulator: Emulator, config: Config, peft: PeftConfig) -> tuple[Emulator, costs.Work]:
    """The emulator as it is handed out (what is folded into factors makes them grow), and what a text of the alignment costs."""
    if not config.prealign_steps:
        return emulator, NOTHING
    with torch.device("meta"):
        learner = student(emulator, config, peft, 0)
        work = costs.step_of(learner, 1, TOKENS).work
        return replace(emulator, model=settled(learner, config)), work


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
