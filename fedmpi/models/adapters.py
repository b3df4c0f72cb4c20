"""Adapters: what is trained on a backbone, as named tensors and as a folder. It must never know who trains it."""

import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmpi.errors import ModelError
from fedmpi.models import PeftConfig
from fedmpi.models.backbone import decoder_layers
from fedmpi.models.folding import fold_in, names_of_changes
from fedmpi.models.library import PeftModel, get_peft_model, get_peft_model_state_dict, without_optional
from fedmpi.models.methods import describe, initialise, require_place
from fedmpi.tensors import Tensors, copies, save_file

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft 0.21 asks transformers 5.23 by an old name

ADAPTER = "default"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
WHOLE = {"method": "none"}  # what stands in the settings where no adapter but the whole model was trained


def add_adapter(
    model: PreTrainedModel,
    peft: PeftConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: Collection[int] | None = None,
) -> PreTrainedModel | PeftModel:
    """Wrap the model with what the method trains: in fp32, equal for equal seeds on every device, nothing else changed.

    The tokenizer turns `init_text` into a prompt; no other method looks at it. With method none it is the model that is trained.
    With `layers`, counted from 0, lora and none keep to these of the repeated layers.
    """
    if peft.method == "none":
        moving = [model] if layers is None else [decoder_layers(model)[number] for number in layers]
        model.float()
        for module in moving:
            module.requires_grad_(True)
        return model.eval()
    require_place(model, peft.method)
    try:
        with torch.random.fork_rng(devices=[]), without_optional():  # peft draws numbers that are replaced below
            adapted = get_peft_model(model, describe(model, peft, layers))
    except (ValueError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{type(model).__name__} cannot take peft.method {peft.method}: {reason}") from None
    initialise(adapted, peft, seed, tokenizer)
    return adapted.eval()


def drop_where_trained(model: Any, dropout: float) -> None:
    """LoRA that is trained drops this share of what goes into it; LoRA that is frozen is a part of the base and drops nothing."""
    for module in model.modules():
        if ADAPTER in getattr(module, "lora_dropout", {}):
            module.lora_dropout[ADAPTER].p = dropout if module.lora_B[ADAPTER].weight.requires_grad else 0.0


def trainable(model: torch.nn.Module) -> Tensors:
    """Copies of what is trained, by parameter name in order."""
    return copies(trained(model))


def load_trainable(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write values into what is trained, in place."""
    write(trained(model), tensors)


@torch.no_grad()
def write(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write values into these parameters. LoRA factors of another rank take the place of those that are there."""
    if parameters.keys() != tensors.keys():
        missing, surplus = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
        raise ModelError(f"the adapter does not fit the model: missing {missing[:3]}, surplus {surplus[:3]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape and not _other_rank(name, parameter, tensors[name]):
            raise ModelError(f"{name} is {tuple(tensors[name].shape)}: the model's adapter expects {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            parameter.grad, parameter.data = None, parameter.new_empty(tensors[name].shape)
        parameter.copy_(tensors[name])


def _other_rank(name: str, parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether these are factors that differ in their rank alone."""
    kept = slice(1, None) if ".lora_A." in name else slice(0, 1) if ".lora_B." in name else slice(0, 0)
    return parameter.ndim == tensor.ndim == 2 and kept != slice(0, 0) and parameter.shape[kept] == tensor.shape[kept]


@contextmanager
def only(parameters: Mapping[str, torch.nn.Parameter], names: Collection[str]) -> Iterator[None]:
    """For a while, of these parameters that are trained only those of `names` are."""
    idle = [parameter for name, parameter in parameters.items() if name not in names]
    for parameter in idle:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in idle:
            parameter.requires_grad_(True)


def save_adapter(model: PreTrainedModel | PeftModel, tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write a PEFT folder whose bytes depend on the values alone: no path, no date, no order of a set.

    Where the whole model was trained, peft has no form for it: the folder then holds the trained tensors under their own names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        state, settings = _peft_state(model, tensors), {**model.peft_config[ADAPTER].to_dict(), "inference_mode": True}
    else:
        state, settings = dict(tensors), {**WHOLE, "base_model_name_or_path": model.name_or_path}
    save_file({name: state[name].detach().cpu() for name in sorted(state)}, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def adapted(model: PreTrainedModel, folder: Path) -> Any:
    """The model with what a folder holds on it, and what the run folded into the base, ready to be asked."""
    if not (folder / SETTINGS).is_file():
        raise ModelError(f"{folder} is no PEFT folder (no {SETTINGS}): the run has not finished, or take another folder")
    try:
        if _is_whole(folder):
            load_trainable(model.float().requires_grad_(True), load_file(folder / WEIGHTS))
            return model.requires_grad_(False).eval()
        fold_in(model, folder)
        with warnings.catch_warnings(), without_optional():  # peft asks transformers by names that are to change
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(model, folder).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the adapter in {folder} does not fit the model: {type(error).__name__}: {reason}") from None


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with what a folder holds written into its weights: W0 + BA."""
    wearing = adapted(model, folder)
    if bare(wearing) is not wearing:
        method = wearing.active_peft_config.peft_type.value
        raise ModelError(
            f"{folder} holds virtual tokens ({method}), which stand before a text and are in no weight: keep the adapter"
        )
    return wearing.merge_and_unload() if isinstance(wearing, PeftModel) else wearing


@contextmanager
def worn(model: PreTrainedModel, folder: Path | None) -> Iterator[Any]:
    """The model with what a folder holds on it, for a while; without a folder, the model as it is."""
    if folder is None:
        yield model
        return
    dtype = model.dtype
    whole, changed = _is_whole(folder), names_of_changes(folder)
    kept = {name: tensor.clone() for name, tensor in model.named_parameters() if whole or name in changed}
    wearing = adapted(model, folder)
    try:
        yield wearing
    finally:
        if not whole and bare(wearing) is wearing:  # it stands in the model's own modules
            wearing.unload()
        if kept:
            model.to(dtype).load_state_dict(kept, strict=False)


def bare(model: Any) -> Any:
    """The backbone as it was, where an adapter stands before it rather than in it; else the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning else model


def _peft_state(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as peft keeps them: an encoder of virtual tokens leaves what it says, not itself."""
    if model.active_peft_config.is_prompt_learning:
        return {"prompt_embeddings": _said(model, tensors)}
    state: Tensors = get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    if len(state) != len(tensors):
        raise ModelError(f"PEFT would save {len(state)} of the adapter's {len(tensors)} tensors: it would not be whole")
    return state


@torch.no_grad()
def _said(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the encoder with these values makes of the virtual tokens, computed where and as the model computes it."""
    encoder, prefix = model.prompt_encoder[ADAPTER], f"prompt_encoder.{ADAPTER}."
    device, was_training = encoder.embedding.weight.device, encoder.training
    values = {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items()}
    said: torch.Tensor = functional_call(encoder.eval(), values, (model.prompt_tokens[ADAPTER].to(device)[None],))
    encoder.train(was_training)
    return said[0]


def _is_whole(folder: Path) -> bool:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8")) if (folder / SETTINGS).is_file() else {}
    return WHOLE.items() <= settings.items()


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name in order."""
    return dict(sorted(moving(model).items()))


def moving(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The same in the model's own order: `named_parameters` in half its time, since each turn of a client pays for it twice."""
    found: dict[str, torch.nn.Parameter] = {}
    _walk(model, "", found, set())
    return found


def _walk(module: torch.nn.Module, prefix: str, found: dict[str, torch.nn.Parameter], seen: set[int]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            found[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", found, seen)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot stand in {SETTINGS}")
