"""Modules that take less room than what they stand for: linear maps in factors or in few bits, and a layer that is passed again.

The linear ones are torch's Linear to whoever asks, so that LoRA goes on them; they hold no matrix of full size and never form one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

# What modules call their place among the layers. Key-value caches are kept by it.
NUMBER = ("layer_idx", "layer_id", "layer_number")
GROUP = 32  # inputs that share a scale at four bits
ROWS = 1024  # outputs whose weights are unpacked at a time


class LowRank(torch.nn.Linear):
    """x -> weight (down x) + bias. It takes further factors in: a change of low rank is merged by growing the rank."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.down = _frozen(torch.empty(rank, in_features))
        self.weight = _frozen(torch.empty(out_features, rank))
        self.register_parameter("bias", _frozen(torch.empty(out_features)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two thin products."""
        return linear(linear(x, self.down), self.weight, self.bias)

    def absorb(self, down: torch.Tensor, up: torch.Tensor) -> None:
        """Add up @ down to what this computes."""
        self.down = _frozen(torch.cat([self.down, down.to(self.down)]))
        self.weight = _frozen(torch.cat([self.weight, up.to(self.weight)], 1))

    def extra_repr(self) -> str:
        """For print."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.down)}"


class Quantized(LowRank):
    """Whole numbers of 8 bits with a scale for each output, or of 4 with one for each GROUP of inputs; and what it has absorbed."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool, rank: int = 0) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self.bits = bits
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        groups = in_features // GROUP if bits == 4 and in_features % GROUP == 0 else 1
        packed = (in_features + 1) // 2 if bits == 4 else in_features
        self.register_buffer("codes", torch.empty(out_features, packed, dtype=torch.uint8 if bits == 4 else torch.int8))
        self.register_buffer("scales", torch.empty(out_features, groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The quantised product, its weights unpacked piece by piece, now and once more for the gradient."""
        product: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        product = product if self.bias is None else product + self.bias
        return product + linear(linear(x, self.down), self.weight) if len(self.down) else product

    @torch.no_grad()
    def put(self, weight: torch.Tensor) -> None:
        """Quantise a matrix: to the nearest, the largest of a group being exact."""
        most = 2 ** (self.bits - 1) - 1
        grouped = weight.float().reshape(self.out_features, self.scales.shape[1], -1)
        scales = (grouped.abs().amax(-1) / most).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (grouped / scales[..., None]).round().clamp(-most, most).to(torch.int8).reshape(self.out_features, -1)
        self.scales, self.codes = scales, _pack(codes) if self.bits == 4 else codes

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weights, some outputs at a time."""
        for start in range(0, self.out_features, ROWS):
            rows = slice(start, start + ROWS)
            codes, scales = self.codes[rows], self.scales[rows]
            codes = _unpack(codes, self.in_features) if self.bits == 4 else codes
            yield rows, (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(len(codes), -1).to(dtype)

    def extra_repr(self) -> str:
        """For print."""
        return f"{super().extra_repr()}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """x W' for the weights of a Quantized. Autograd by itself would keep every unpacked piece until the gradient is taken."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Quantized) -> torch.Tensor:
        ctx.module = module
        return torch.cat([linear(x, weight) for _, weight in module.pieces(x.dtype)], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.new_zeros(*gradient.shape[:-1], ctx.module.in_features)
        for rows, weight in ctx.module.pieces(gradient.dtype):
            total += gradient[..., rows] @ weight
        return total, None


class Again(torch.nn.Module):
    """A layer once more, in another place. Its parameters belong to the place where it stands first."""

    def __init__(self, layer: torch.nn.Module, place: int) -> None:
        super().__init__()
        self.place = place
        self._layer = (layer,)  # in a tuple, modules are nobody's children

    @property
    def source(self) -> torch.nn.Module:
        """The layer where it stands first."""
        return self._layer[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer does; its keys and values go to this place in a cache."""
        with _standing(self.source, self.place):
            return self.source(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for what they are."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)


def renumber(layer: torch.nn.Module, place: int) -> None:
    """Tell the modules of a layer their place."""
    for module in layer.modules():
        for name in NUMBER:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, place)


@contextmanager
def _standing(layer: torch.nn.Module, place: int) -> Iterator[None]:
    told = [(module, name, module.__dict__[name]) for module in layer.modules() for name in NUMBER if name in module.__dict__]
    renumber(layer, place)
    try:
        yield
    finally:
        for module, name, number in told:
            setattr(module, name, number)


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach(), requires_grad=False)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two numbers from -8 to 7 in a byte."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.int16) & 0xF
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    pairs = torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)[:, :count].to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)
