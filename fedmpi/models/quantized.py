"""A frozen base in int8 or nf4 through bitsandbytes, on GPUs and on CPUs. It must never know what is trained on it."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from fedmpi.errors import ModelError
from fedmpi.models import Config


def loading(config: Config, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What the loader is told: linear layers are quantised on the device as they are read; the head and all else keep `dtype`."""
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"model.quantization {config.quantization} needs bitsandbytes: pip install 'fedmpi[quant]'")
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:  # QLoRA's: the constants of blocks are quantised once more, products are computed in `dtype`
        wanted = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": wanted, "device_map": {"": torch.device(device)}}


def keep_as_loaded(model: torch.nn.Module) -> None:
    """On CPUs that know bfloat16, bitsandbytes packs nf4 anew where it is first evaluated: rounded, and without gradients."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def held_bytes(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], quantization: str) -> int:
    """What these tensors of a model of shapes take once its frozen linear layers, the head aside, are packed as `loading` asks."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    packed = {
        id(module.weight)
        for module in model.modules()
        if quantization != "none" and isinstance(module, torch.nn.Linear) and module is not head and not module.weight.requires_grad
    }
    return sum(_packed(quantization, t) if id(t) in packed else t.numel() * t.element_size() for t in tensors.values())


def _packed(quantization: str, weight: torch.Tensor) -> int:
    """int8: a scale for each row. nf4: one for each block of 64, itself written in 8 bits by blocks of 256, with two tables."""
    num = weight.numel()
    if quantization == "int8":
        return num + 4 * len(weight)
    blocks = -(-num // 64)
    return -(-num // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def num_weights(parameter: torch.nn.Parameter) -> int:
    """Weights of a parameter, of which two may share a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel()) if packed is not None else parameter.numel()
