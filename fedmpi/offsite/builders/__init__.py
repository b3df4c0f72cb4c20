"""Emulators: what a client computes with instead of the layers that it may not see. Each builder is one file with one function.

    build(model, layout, public, config) -> Emulator

`model` is the bare original and stays as it is, `layout` the uniform split, `public` text that the server may look at. A builder's
file has its name. Where only shapes are wanted the model has no values, and builders do without text. This door needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedmpi.errors import DataError

if TYPE_CHECKING:
    from fedmpi.data import Batch
    from fedmpi.offsite import Config
    from fedmpi.offsite.layers import Layout


@dataclass(frozen=True)
class Emulator:
    """A compressed model, and which of its layers are which."""

    model: Any
    layout: "Layout"

    @property
    def structure(self) -> dict[str, Any]:
        """What the model is made of where its configuration does not say it."""
        from fedmpi.offsite.structure import structure

        return structure(self.model, self.layout)


def build(model: Any, config: "Config", public: "Sequence[Batch]" = ()) -> Emulator:
    """The emulator that these settings ask for. All but uniform and quantized look at public text."""
    from fedmpi.offsite.assembly import find_layers
    from fedmpi.offsite.layers import layout

    path, layers = find_layers(model)
    uniform = layout(path, len(layers), config.adapter_first or 0, config.adapter_last or 0, config.drop_rate)
    if config.builder in NEEDS_TEXT and not public and model.device.type != "meta":
        raise DataError(f"offsite.builder {config.builder} looks at public text and there is none: give offsite.public_name")
    made: Emulator = import_module(f"fedmpi.offsite.builders.{config.builder}").build(model, uniform, public, config)
    return made


NEEDS_TEXT = ("influence", "shared", "thin")
