"""What an emulator saves and what it gives away, counted on the emulator itself and not on what was asked for."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedmpi.models.backbone import decoder_layers
from fedmpi.offsite.assembly import assemble
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.modules import Quantized

TOKENS = 16  # of the text on which operations are counted


@dataclass(frozen=True)
class Account:
    """The emulator beside the layers that it stands for; bytes are those held, and those that go over a link once.

    `disclosed` is the share of the original model's weights that a client can read, embeddings, norms, head and adapter included:
    those that stand somewhere in what it holds as they are, and those in few bits.
    """

    parameters: int
    original_parameters: int
    held_bytes: int
    original_bytes: int
    flops_per_token: float
    original_flops_per_token: float
    disclosed: float

    def shares(self) -> dict[str, float]:
        """What is left of each quantity."""
        told = asdict(self)
        return {name: told[name] / told[f"original_{name}"] for name in ("parameters", "flops_per_token")} | {
            "bytes": self.held_bytes / self.original_bytes,
            "disclosed": self.disclosed,
        }


def account(model: Any, emulator: Emulator) -> Account:
    """Count; `model` is the bare original."""
    layers, ours = decoder_layers(model), decoder_layers(emulator.model)
    layout = emulator.layout
    small = [ours[place] for place, number in enumerate(layout.order) if number in layout.inner]
    large = [layers[number] for number in layout.inner]
    rest = flops(assemble(model, layout.adapter))
    size = sum(parameter.numel() for parameter in model.parameters())
    hidden = sum(parameter.numel() for layer in large for parameter in layer.parameters())
    seen = sum(readable(layers[number], ours[layout.order.index(number)]) for number in dict.fromkeys(layout.emulator))
    return Account(
        parameters=sum(parameter.numel() for layer in small for parameter in layer.parameters()) + _codes(small),
        original_parameters=hidden,
        held_bytes=sum(map(_bytes, small)),
        original_bytes=sum(map(_bytes, large)),
        flops_per_token=flops(emulator.model) - rest,
        original_flops_per_token=flops(model) - rest,
        disclosed=(size - hidden + seen) / size,
    )


@torch.no_grad()
def flops(model: Any) -> float:
    """Operations of a pass per token as torch counts them, two for a multiplication and addition."""
    text = torch.zeros(1, TOKENS, dtype=torch.long, device=model.device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False)
    return float(counter.get_total_flops()) / TOKENS


def readable(original: torch.nn.Module, layer: torch.nn.Module) -> int:
    """Weights of a layer that can be read off what stands in its place."""
    theirs = dict(original.named_parameters())
    codes = sum(module.out_features * module.in_features for module in layer.modules() if isinstance(module, Quantized))
    return codes + sum(_equal(theirs[name], ours) for name, ours in layer.named_parameters() if name in theirs)


def _equal(theirs: torch.Tensor, ours: torch.Tensor) -> int:
    """Elements in the same place, or whole rows or columns in any."""
    if theirs.shape == ours.shape:
        return int((theirs == ours).sum())
    if theirs.ndim == 1 or (theirs.shape[0] != ours.shape[0] and theirs.shape[1] != ours.shape[1]):
        return len(set(theirs.tolist()) & set(ours.tolist())) if theirs.ndim == 1 else 0
    if theirs.shape[1] != ours.shape[1]:
        theirs, ours = theirs.T, ours.T
    known = {row.numpy().tobytes() for row in theirs.detach().contiguous().cpu().float()}
    return sum(row.numpy().tobytes() in known for row in ours.detach().contiguous().cpu().float()) * ours.shape[1]


def _bytes(layer: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*layer.parameters(), *layer.buffers()])


def _codes(layers: list[torch.nn.Module]) -> int:
    found = (module for layer in layers for module in layer.modules() if isinstance(module, Quantized))
    return sum(module.out_features * module.in_features for module in found)
