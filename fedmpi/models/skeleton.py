"""A model that is filled tensor by tensor as its weights come, from whoever has them. It must never open a model folder."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from fedmpi.errors import ModelError

PLACES = ("_name_or_path", "transformers_version")  # what a config says of the machine that read it


def nowhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says, without any path."""
    return {key: value for key, value in settings.items() if key not in PLACES}


def stored(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that makes up the model, tied ones once, in the model's order."""
    kept = model.state_dict(keep_vars=True)
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in kept)
    for name, tensor in (*model.named_parameters(), *buffers):
        yield name, tensor.detach()


def empty(settings: Mapping[str, Any]) -> PreTrainedModel:
    """The modules that a config.json describes; its weights have shapes and no memory."""
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.for_model(**settings)
        with init_empty_weights():
            return transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"no model can be made of the configuration that came: {type(error).__name__}: {reason}") from None


def put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Give the model one of its tensors; it is taken over as it is, not copied."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        place = getattr(module, leaf)
    except AttributeError:
        raise ModelError(f"the model has no tensor {name}: what came is of another model") from None
    if place.shape != tensor.shape:
        raise ModelError(f"{name} is {tuple(tensor.shape)}, the model's configuration says {tuple(place.shape)}")
    if isinstance(place, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, tensor)


def whole(model: PreTrainedModel, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model with nothing missing, frozen, in evaluation mode, on the device."""
    model.tie_weights()
    if missing := [name for name, tensor in stored(model) if tensor.is_meta]:
        raise ModelError(f"{len(missing)} tensors of the model never came: {', '.join(missing[:3])}")
    return model.requires_grad_(False).eval().to(device)
