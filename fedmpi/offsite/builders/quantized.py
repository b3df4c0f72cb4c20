"""The layers that uniform dropping keeps, their matrices in whole numbers of few bits. It saves bytes, not operations."""

from collections.abc import Sequence
from typing import Any

import torch

from fedmpi.data import Batch
from fedmpi.offsite import Config
from fedmpi.offsite.assembly import assemble, copied, find_layers
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.modules import Quantized
from fedmpi.offsite.structure import linears, matrix, replace, widths


def build(model: Any, layout: Layout, public: Sequence[Batch], config: Config) -> Emulator:
    """Every linear module of the emulator's layers, rounded to the nearest."""
    layers = find_layers(model)[1]
    stand_ins = {number: copied(layers[number]) for number in layout.emulator}
    for layer in stand_ins.values():
        for name, module in list(linears(layer)):
            replace(layer, name, rounded(module, config.bits))
    return Emulator(assemble(model, layout.order, stand_ins), layout)


def rounded(module: Any, bits: int) -> Quantized:
    """A linear module in few bits; its bias stays as it is."""
    with torch.device(module.weight.device):
        few = Quantized(*widths(module), bits, module.bias is not None).to(module.weight.dtype)
    few.put(matrix(module))
    if module.bias is not None:
        few.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
    return few
