"""Which modules of a backbone get an adapter: those that are named, else what projects queries and values. It trains nothing."""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmpi.errors import ModelError
from fedmpi.models.backbone import decoder_layers

ALL_LINEAR = "all-linear"
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


def inside(model: PreTrainedModel, targets: str | list[str], layers: Collection[int]) -> list[str]:
    """The whole names of the targets that lie in these of the repeated layers."""
    repeated = decoder_layers(model)
    there = {id(module) for number in layers for module in repeated[number].modules() if _is_linear(module)}
    found = [name for name, module in model.named_modules() if id(module) in there and _is_target(name, targets)]
    if not found:
        numbers = ", ".join(map(str, layers))
        raise ModelError(
            f"layers {numbers} have no module for an adapter: peft.target_modules chooses from {', '.join(_leaves(model))}"
        )
    return found


def _is_target(name: str, targets: str | list[str]) -> bool:
    return targets == ALL_LINEAR or any(f".{name}".endswith(f".{target}") for target in targets)


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


def all_conv1d(model: PreTrainedModel, targets: str | list[str]) -> bool:
    """GPT-2's transposed layers must be announced to peft, which spares the head when it takes all."""
    head = model.get_output_embeddings()
    chosen = [
        module
        for name, module in model.named_modules()
        if _is_linear(module) and (_is_target(name, targets) if targets != ALL_LINEAR else module is not head)
    ]
    return bool(chosen) and all(isinstance(module, Conv1D) for module in chosen)
