"""Whether a model keeps samples apart that share a row: tried out, since its code alone does not tell. It must never know data."""

import warnings
from typing import Any

import torch

from fedmpi.errors import ConfigError

LENGTHS = (9, 7, 8)


@torch.no_grad()
def require_packing(model: Any, name: str) -> None:
    """Refuse a model that gives a sample other logits when it follows on another one in its row."""
    model.eval()
    device = next(model.parameters()).device
    words = min(int(model.config.vocab_size), 1000)
    samples = [torch.arange(3, 3 + length, device=device)[None] * 7 % words for length in LENGTHS]
    places = [torch.arange(length, device=device)[None] for length in LENGTHS]
    try:
        with warnings.catch_warnings():  # peft warns of what the comparison below finds out
            warnings.simplefilter("ignore")
            together = model(input_ids=torch.cat(samples, 1), position_ids=torch.cat(places, 1), use_cache=False).logits
    except TypeError:  # it has no position_ids
        together = None
    apart = [model(input_ids=sample, use_cache=False).logits for sample in samples]
    if together is None or not _alike(together, torch.cat(apart, 1)):
        raise ConfigError(
            f"data.packing: {name} with this adapter and attention lets samples that share a row see one another: leave it out"
        )


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for rounding."""
    if one.shape != other.shape:
        return False
    noise = 1e-4 if other.dtype == torch.float32 else 5e-2
    return bool((one - other).abs().max() <= noise * other.abs().max())
