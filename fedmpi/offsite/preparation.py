"""Pre-alignment: an emulator made ready before it is given away, so that what clients get are no longer layers of the original.

LoRA on its layers is aligned and then folded into them (FedBiOT's w_E_init). A distilled emulator is trained in all its weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedmpi import models, training
from fedmpi.errors import ConfigError
from fedmpi.models.backbone import decoder_layers
from fedmpi.offsite import Config
from fedmpi.offsite.alignment import Aligned, Goal, align
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.modules import Again, LowRank
from fedmpi.offsite.proximal import factors
from fedmpi.offsite.structure import linears


def prealign(
    emulator: Emulator,
    goal: Goal,
    config: Config,
    train: training.Config,
    peft: models.PeftConfig,
    *,
    seed: int,
    hooks: Sequence[training.Hook] = (),
) -> tuple[Emulator, Aligned]:
    """The emulator after `prealign_steps`, in memory of its own where it changed; the original stays as it is."""
    if not config.prealign_steps:
        return emulator, Aligned({})
    learner = student(emulator, config, peft, seed)
    done = align(goal, learner, emulator.layout, config, train, steps=config.prealign_steps, seed=seed, hooks=hooks)
    return replace(emulator, model=settled(learner, config)), done


def student(emulator: Emulator, config: Config, peft: models.PeftConfig, seed: int) -> Any:
    """The emulator with what pre-alignment trains: LoRA on its layers, or these layers themselves."""
    return _own(emulator) if config.builder == "distilled" else with_lora(emulator, peft, seed)


def settled(learner: Any, config: Config) -> Any:
    """The bare model of a student that has learnt."""
    return learner.requires_grad_(False).eval() if config.builder == "distilled" else fold(learner)


@torch.no_grad()
def fold(learner: Any) -> Any:
    """The model with its LoRA inside its weights, which become new ones: the old may be another model's too."""
    for module, a, b, scale in factors(learner):
        layer = module.get_base_layer()
        if isinstance(layer, LowRank):
            layer.absorb(a, scale * b)
            continue
        change = scale * (b @ a)
        changed = layer.weight.float() + (change.T if hasattr(layer, "nf") else change)
        layer.weight = torch.nn.Parameter(changed.to(layer.weight.dtype), requires_grad=False)
    return learner.unload().requires_grad_(False).eval()


def with_lora(emulator: Emulator, peft: models.PeftConfig, seed: int) -> Any:
    """LoRA where the federation would put it, but on the emulator's layers alone."""
    wanted = tuple(peft.target_modules)
    leaves = None if wanted == ("all-linear",) else models.find_targets(emulator.model, wanted)
    names = tuple(
        f"{prefix}.{name}"
        for prefix, layer in _layers(emulator)
        for name, _ in linears(layer)
        if leaves is None or any(f".{prefix}.{name}".endswith(f".{leaf}") for leaf in leaves)
    )
    lora = models.PeftConfig(rank=peft.rank, alpha=peft.alpha, target_modules=names)
    return models.add_adapter(emulator.model, lora, seed)


def _own(emulator: Emulator) -> Any:
    """The model with the emulator's layers in memory of their own, to be trained as a whole."""
    if emulator.model.dtype != torch.float32:
        raise ConfigError(f"offsite.builder distilled trains whole layers, model.dtype is {emulator.model.dtype}: give float32")
    for _, layer in _layers(emulator):
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
        layer.requires_grad_(True)
    return emulator.model


def _layers(emulator: Emulator) -> list[tuple[str, torch.nn.Module]]:
    """The emulator's layers with their names, each once."""
    layout = emulator.layout
    places = range(layout.first, layout.last_emulated + 1)
    layers = decoder_layers(emulator.model)
    return [(f"{layout.path}.{place}", layers[place]) for place in places if not isinstance(layers[place], Again)]
