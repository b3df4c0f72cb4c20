"""Every layer stays and each is thinner: attention in factors, a feed-forward with fewer channels; the idea of GradOT (Yao et al.,
arXiv 2507.04455) and FedPFT (Peng et al., arXiv 2404.11536), with the outputs on public text as what is to be kept.

An attention matrix W becomes the two factors that keep W x best, for the x of public text. Of the feed-forward those channels
stay that give most of its output, and the matrix after them is fitted anew, by least squares, to give what all of them gave.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from fedmpi.data import Batch
from fedmpi.errors import ModelError
from fedmpi.models.logits import supervised_logits
from fedmpi.offsite import Config
from fedmpi.offsite.assembly import assemble, copied, find_layers
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.modules import NUMBER, LowRank
from fedmpi.offsite.structure import linears, matrix, narrow, replace, widths
from fedmpi.offsite.teacher import watching

RIDGE = 1e-4  # of the mean square of the inputs: directions that the public text does not show stay bounded
Moments = Mapping[str, torch.Tensor]  # sum of x x' over tokens, by the module that x goes into


@dataclass(frozen=True)
class Parts:
    """The matrices of a layer by name: those of attention, and of a feed-forward those that lead into its channels and out."""

    attention: tuple[str, ...]
    into: tuple[str, ...]
    out: str
    scaled: tuple[str, ...]  # norms of the channels


def build(model: Any, layout: Layout, public: Sequence[Batch], config: Config) -> Emulator:
    """All layers between the adapters, each with the share of its matrices that the drop rate leaves."""
    share = 1 - Fraction(str(config.drop_rate))
    layers = find_layers(model)[1]
    stand_ins = {}
    for number in layout.inner:
        parts = find_parts(layers[number], layout, number)
        looked_at = [*parts.attention, parts.out, *(name.rpartition(".")[0] for name in parts.scaled)]
        moments = measure(assemble(model, range(number + 1)), looked_at, public) if public else {}
        stand_ins[number] = thinner(copied(layers[number]), parts, share, moments)
    layout = layout.keeping(layout.inner)
    return Emulator(assemble(model, layout.order, stand_ins), layout)


def find_parts(layer: torch.nn.Module, layout: Layout, number: int) -> Parts:
    """By structure: attention is what knows its place among the layers; the rest leads into channels and out of them again."""
    numbered = [name for name, module in layer.named_modules() if name and any(hasattr(module, key) for key in NUMBER)]
    found = {name: widths(module) for name, module in linears(layer)}
    attention = tuple(name for name in found if any(name.startswith(f"{prefix}.") for prefix in numbered))
    rest = {name: found[name] for name in found if name not in attention}
    for out, (channels, width) in reversed(rest.items()):
        into = tuple(name for name, (given, gave) in rest.items() if name != out and given == width and gave % channels == 0)
        if into and attention:
            scaled = tuple(
                name for name, p in layer.named_parameters() if p.ndim == 1 and len(p) == channels and _norm(name, found)
            )
            return Parts(attention, into, out, scaled)
    raise ModelError(
        f"no feed-forward is found in {layout.path}.{number}: looked for a linear module out of channels and others into them, "
        f"beside attention; it has {', '.join(found) or 'no linear modules'}; take another offsite.builder"
    )


@torch.no_grad()
def measure(model: Any, names: Sequence[str], public: Sequence[Batch]) -> Moments:
    """What goes into these modules of the last layer on public text, padding apart."""
    layer = find_layers(model)[1][-1]
    moments: dict[str, torch.Tensor] = {}
    for batch in public:
        real = batch.attention_mask.bool().to(model.device)

        def see(index: int, given: torch.Tensor, gave: torch.Tensor, real: torch.Tensor = real) -> None:
            x = given.reshape(*real.shape, -1)[real].float()
            moments[names[index]] = moments.get(names[index], 0) + x.T @ x

        with watching([layer.get_submodule(name) for name in names], see):
            supervised_logits(model, batch, model.device)
    return moments


def thinner(layer: torch.nn.Module, parts: Parts, share: Fraction, moments: Moments) -> torch.nn.Module:
    """The layer with this share of its matrices; without moments, of the right shape and no sense."""
    for name in parts.attention:
        replace(layer, name, in_factors(layer.get_submodule(name), share, moments.get(name)))
    after: Any = layer.get_submodule(parts.out)
    num_channels = widths(after)[0]
    fewer = max(1, int(share * num_channels))
    moment = moments.get(parts.out)
    weight = matrix(after).float()
    kept = torch.arange(fewer) if moment is None else _strongest(weight, moment, fewer)
    for name in parts.into:
        into: Any = layer.get_submodule(name)
        rows = torch.cat([kept + start for start in range(0, widths(into)[1], num_channels)]).to(into.weight.device)
        _put(layer, name, matrix(into)[rows], into)
        if into.bias is not None:
            narrow(layer, f"{name}.bias", into.bias.detach()[rows].clone())
    for name in parts.scaled:
        scale = _spread(moments.get(name.rpartition(".")[0]), kept)
        narrow(layer, name, layer.get_parameter(name).detach()[kept.to(weight.device)] * scale)
    fitted = weight[:, kept.to(weight.device)] if moment is None else _fitted(weight, moment, kept)
    _put(layer, parts.out, fitted.to(after.weight.dtype), after)
    return layer


def in_factors(module: Any, share: Fraction, moment: torch.Tensor | None) -> LowRank:
    """The best factors of so many weights: W S in singular vectors, S S' being the moment of the inputs."""
    inputs, outputs = widths(module)
    rank = max(1, int(share * inputs * outputs / (inputs + outputs)))
    with torch.device(module.weight.device):
        thin = LowRank(inputs, outputs, rank, module.bias is not None).to(module.weight.dtype)
    if module.bias is not None:
        thin.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
    if moment is not None:
        root = torch.linalg.cholesky(_ridged(moment.double()))
        left, values, right = torch.linalg.svd(matrix(module).double() @ root, full_matrices=False)
        thin.weight.copy_(left[:, :rank] * values[:rank])
        thin.down.copy_(torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False))
    return thin


def _strongest(weight: torch.Tensor, moment: torch.Tensor, count: int) -> torch.Tensor:
    """The channels whose part of the output is largest, in their order."""
    strength = moment.diagonal() * weight.square().sum(0)
    return strength.argsort(descending=True, stable=True)[:count].sort().values.cpu()


def _spread(moment: torch.Tensor | None, kept: torch.Tensor) -> float:
    """A norm divides by the root mean square of its channels, which is larger where the strong ones are left: undo that."""
    if moment is None:
        return 1.0
    squares = moment.diagonal()
    return float((squares[kept.to(squares.device)].mean() / squares.mean()).sqrt())


def _fitted(weight: torch.Tensor, moment: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What makes of the kept channels the nearest to what the weight makes of all: W M[:, k] M[k, k]^-1."""
    moment, kept = moment.double(), kept.to(weight.device)
    cross = weight.double() @ moment[:, kept]
    fitted: torch.Tensor = torch.linalg.solve(_ridged(moment[kept][:, kept]), cross.T).T
    return fitted.float()


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    size = RIDGE * moment.diagonal().mean()
    return moment + size.clamp_min(1e-12) * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def _put(layer: torch.nn.Module, name: str, weight: torch.Tensor, module: Any) -> None:
    """A matrix of (outputs, inputs) as the module keeps it, in memory of its own."""
    narrow(layer, f"{name}.weight", (weight.T if hasattr(module, "nf") else weight).contiguous().clone())


def _norm(name: str, linear: Mapping[str, Any]) -> bool:
    return name.rpartition(".")[0] not in linear
