"""What a compressed model is made of where its configuration does not say it, as plain values, and a model of that make.

A client that has a configuration alone makes an empty model, reshapes it, and fills it; so does who opens an emulator's folder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fedmpi.errors import ModelError
from fedmpi.offsite.assembly import find_layers
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.modules import Again, LowRank, Quantized

Structure = Mapping[str, Mapping[str, Any]]


def structure(model: Any, layout: Layout) -> dict[str, dict[str, Any]]:
    """Where the emulator's layers are not made as the adapter's, which are the original's own."""
    layers = find_layers(model)[1]
    plain = dict(layers[0 if layout.first else -1].named_parameters())
    found: dict[str, dict[str, Any]] = {"again": {}, "low_rank": {}, "quantized": {}, "shapes": {}}
    for place, layer in enumerate(layers):
        if isinstance(layer, Again):
            found["again"][str(place)] = next(first for first, other in enumerate(layers) if other is layer.source)
            continue
        prefix = f"{layout.path}.{place}"
        for name, module in layer.named_modules(prefix=prefix):
            if isinstance(module, Quantized):
                found["quantized"][name] = [module.bits, len(module.down)]
            elif isinstance(module, LowRank):
                found["low_rank"][name] = len(module.down)
        for name, parameter in layer.named_parameters():
            owner = layer.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, LowRank) and name in plain and plain[name].shape != parameter.shape:
                found["shapes"][f"{prefix}.{name}"] = list(parameter.shape)
    return {kind: values for kind, values in found.items() if values}


def reshape(model: Any, wanted: Structure) -> None:
    """Give an empty model this make; new tensors have a shape and no memory."""
    layers = find_layers(model)[1]
    try:
        with torch.device("meta"):
            for name, rank in wanted.get("low_rank", {}).items():
                was = model.get_submodule(name)
                replace(model, name, LowRank(*widths(was), rank, was.bias is not None))
            for name, (bits, rank) in wanted.get("quantized", {}).items():
                was = model.get_submodule(name)
                replace(model, name, Quantized(*widths(was), bits, was.bias is not None, rank))
            for name, shape in wanted.get("shapes", {}).items():
                narrow(model, name, torch.empty(shape))
        for place, first in wanted.get("again", {}).items():
            layers[int(place)] = Again(layers[first], int(place))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the structure that came does not fit the configuration that came: {type(error).__name__}: {error}"
        ) from None


def narrow(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a parameter of another shape in the place of one, and let its module know."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if leaf == "weight" and tensor.ndim == 2:
        if hasattr(module, "nf"):  # GPT-2's transposed layers
            module.nx, module.nf = tensor.shape
        else:
            module.out_features, module.in_features = tensor.shape


def widths(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if hasattr(module, "nf"):
        inputs, outputs = module.weight.shape
        return int(inputs), int(outputs)
    return int(module.in_features), int(module.out_features)


def matrix(module: Any) -> torch.Tensor:
    """The weight of a linear module as (outputs, inputs)."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if hasattr(module, "nf") else weight


def linears(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The linear modules of a layer, GPT-2's among them."""
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear) or (hasattr(module, "nf") and hasattr(module, "weight")):
            yield name, module


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
