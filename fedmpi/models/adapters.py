"""Adapters: LoRA on a frozen backbone, as named tensors and as a PEFT folder. It must never know who trains it."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmpi.errors import ModelError
from fedmpi.models import PeftConfig
from fedmpi.models.backbone import decoder_layers
from fedmpi.seeding import seed_for
from fedmpi.tensors import Tensors, save_file

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft 0.21 asks transformers 5.23 by an old name

ALL_LINEAR = "all-linear"
ADAPTER = "default"
# How decoders name their projections. A model that has only a fused one gets its adapter there.
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q", "v"),
    ("wq", "wv"),
    ("q_lin", "v_lin"),
    ("to_q", "to_v"),
)
FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "wqkv", "W_pack", "in_proj")


def add_adapter(model: PreTrainedModel, peft: PeftConfig, seed: int) -> PeftModel:
    """Wrap the model with a fresh adapter: in fp32, equal for equal seeds on every device, nothing else changed."""
    targets: str | list[str] = (
        ALL_LINEAR if peft.target_modules == (ALL_LINEAR,) else find_targets(model, tuple(peft.target_modules))
    )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.rank,
        lora_alpha=peft.alpha,
        lora_dropout=peft.dropout,
        init_lora_weights="gaussian" if peft.init == "gaussian" else True,
        target_modules=targets,
        fan_in_fan_out=_all_conv1d(model, targets),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws numbers that are replaced below
        adapted = get_peft_model(model, config)
    _initialise(adapted, peft, seed)
    return adapted.eval()


def find_targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """The modules that get an adapter: those wanted, else query and value projections of the repeated layers."""
    if not wanted:
        return _query_and_value(model)
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    nothing = sorted(target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names))
    if nothing:
        raise ModelError(
            f"peft.target_modules {', '.join(nothing)} match no module: "
            f"the model has {', '.join(_leaves(model))}, or say {ALL_LINEAR}"
        )
    return sorted(set(wanted))


def trainable(model: torch.nn.Module) -> Tensors:
    """Copies of what is trained, by parameter name in order: CPU, fp32, contiguous, side by side in memory, ready to be sent."""
    parameters = dict(sorted(_trained(model).items()))
    sizes = [parameter.numel() for parameter in parameters.values()]
    parts = torch.split_with_sizes(torch.empty(sum(sizes)), sizes)
    copies = {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}
    with torch.no_grad():
        for name, parameter in parameters.items():
            copies[name].copy_(parameter)
    return copies


@torch.no_grad()
def load_trainable(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write values into what is trained, in place, so that the base and every optimiser keep their tensors."""
    parameters = _trained(model)
    if parameters.keys() != tensors.keys():
        missing, surplus = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
        raise ModelError(f"the adapter does not fit the model: missing {missing[:3]}, surplus {surplus[:3]}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(f"{name} is {tuple(tensors[name].shape)}: the model's adapter expects {tuple(parameter.shape)}")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def save_adapter(model: PeftModel, tensors: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """Write a PEFT folder whose bytes depend on the values alone: no path, no date, no order of a set."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, state_dict=dict(tensors), save_embedding_layers=False)
    if len(state) != len(tensors):
        raise ModelError(f"PEFT would save {len(state)} of the adapter's {len(tensors)} tensors: it would not be whole")
    ordered = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    save_file(ordered, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {**model.peft_config[ADAPTER].to_dict(), "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _initialise(model: PeftModel, peft: PeftConfig, seed: int) -> None:
    """A from the seed and its own name, so that neither the order of modules nor the device matters; B zero."""
    for name, parameter in _trained(model).items():
        if ".lora_A." not in name:
            torch.nn.init.zeros_(parameter)
            continue
        generator = torch.Generator().manual_seed(seed_for(seed, "adapter", name))
        values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        if peft.init == "gaussian":
            values.normal_(0, 1 / peft.rank, generator=generator)
        else:  # the uniform range of a fresh linear layer
            bound = parameter.shape[1] ** -0.5
            values.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)


def _query_and_value(model: PreTrainedModel) -> list[str]:
    leaves = set(_leaves(decoder_layers(model)))
    for pair in QUERY_AND_VALUE:
        if leaves.issuperset(pair):
            return sorted(pair)
    for fused in FUSED:
        if fused in leaves:
            return [fused]
    raise ModelError(
        f"no query and value projections found in {type(model).__name__}: name modules in peft.target_modules; "
        f"its layers have {', '.join(sorted(leaves)) or 'no linear modules'}"
    )


def _leaves(model: torch.nn.Module) -> list[str]:
    """The last name parts of all linear modules."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def _all_conv1d(model: PreTrainedModel, targets: str | list[str]) -> bool:
    """GPT-2's transposed layers must be announced to peft."""
    chosen = [
        m for name, m in model.named_modules() if _is_linear(m) and (targets == ALL_LINEAR or name.rpartition(".")[2] in targets)
    ]
    return bool(chosen) and all(isinstance(module, Conv1D) for module in chosen)


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot stand in adapter_config.json")
