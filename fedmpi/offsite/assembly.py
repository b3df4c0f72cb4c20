"""Models out of layers of another: found by structure, renumbered, sharing every tensor with the model they come from.

It must never know what an adapter on the layers is: it works on the bare backbone.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fedmpi.errors import ModelError
from fedmpi.models.backbone import decoder_layers
from fedmpi.offsite.modules import Again, renumber

# Settings under which a layer computes something else in another place, so that it cannot be moved.
IMMOVABLE = ("scale_attn_by_inverse_layer_idx",)


def find_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """Where the repeated layers of a model stand, and they themselves: the longest list, as long as its configuration says."""
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    said = _decoder(model.config).num_hidden_layers
    if len(layers) != said:
        raise ModelError(
            f"the layers of {type(model).__name__} are not found: looked for a list of {said} modules (num_hidden_layers), "
            f"the longest is {path} with {len(layers)}"
        )
    return path, layers


def assemble(model: Any, order: Sequence[int], stand_ins: Mapping[int, torch.nn.Module] | None = None) -> Any:
    """A model of the layers in `order`, of the same class, frozen; its tensors are in the same storage as the given model's.

    `stand_ins` take the place of layers, by original number. A layer that stands in `order` again is passed again. The given model
    is left as it is.
    """
    path, layers = find_layers(model)
    _refuse_immovable(model, order)
    twin = copied(model)
    source = twin.get_submodule(path)
    chosen: dict[int, torch.nn.Module] = {}
    places: list[torch.nn.Module] = []
    for place, number in enumerate(order):
        if number in chosen:
            places.append(Again(chosen[number], place))
            continue
        stand_in = (stand_ins or {}).get(number)
        chosen[number] = source[number] if stand_in is None else copied(stand_in, {id(model.config): twin.config})
        renumber(chosen[number], place)
        places.append(chosen[number])
    parent, _, name = path.rpartition(".")
    setattr(twin.get_submodule(parent), name, torch.nn.ModuleList(places))
    _shorten(_decoder(twin.config), len(layers), order)
    return twin.eval()


def copied(module: Any, known: Mapping[int, Any] = {}) -> Any:
    """A module of its own around the same storage; its parameters are new ones, so that either can be trained alone."""
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    memo |= {id(buffer): buffer for buffer in module.buffers()}
    return copy.deepcopy(module, memo | dict(known))


def _shorten(config: Any, num_layers: int, order: Sequence[int]) -> None:
    """Say the new depth, and let what is listed by layer (kinds of attention) travel with its layer."""
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(config, key, type(value)(value[number] for number in order))
    config.num_hidden_layers = len(order)


def _decoder(config: Any) -> Any:
    """The part of a configuration that speaks of the language model."""
    return config.get_text_config()


def _refuse_immovable(model: Any, order: Sequence[int]) -> None:
    moved = list(order) != list(range(len(order)))
    for key in IMMOVABLE:
        if moved and getattr(model.config, key, False):
            raise ModelError(
                f"{type(model).__name__} has {key} on: its layers depend on their number and cannot be moved, take another model"
            )
