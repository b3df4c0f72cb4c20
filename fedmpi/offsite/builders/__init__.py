"""Emulators: what a client computes with instead of the layers that it may not see. Each builder is one file with one function.

    build(model, layout, batches, config) -> Emulator

`model` is the bare original and stays as it is, `layout` the uniform split, `batches` public text. A builder's file has its name.
This door needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmpi.data import Batch
    from fedmpi.offsite import Config
    from fedmpi.offsite.layers import Layout


@dataclass(frozen=True)
class Emulator:
    """A compressed model, and which of its layers are which.

    `structure` is what its modules are where the configuration does not say it, as plain values: `reshape` reads it.
    """

    model: Any
    layout: "Layout"
    structure: Mapping[str, Any] = field(default_factory=dict)


def build(model: Any, config: "Config", batches: "Sequence[Batch]" = ()) -> Emulator:
    """The emulator that these settings ask for."""
    from fedmpi.offsite.assembly import find_layers
    from fedmpi.offsite.layers import layout

    path, layers = find_layers(model)
    uniform = layout(path, len(layers), config.adapter_first or 0, config.adapter_last or 0, config.drop_rate)
    made: Emulator = import_module(f"fedmpi.offsite.builders.{config.builder}").build(model, uniform, batches, config)
    return made
