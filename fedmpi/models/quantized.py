"""A frozen base in int8 or nf4 through bitsandbytes, on GPUs and on CPUs. It must never know what is trained on it."""

import importlib.util
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


def num_weights(parameter: torch.nn.Parameter) -> int:
    """Weights of a parameter, of which two may share a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel()) if packed is not None else parameter.numel()
