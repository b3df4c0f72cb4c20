"""Server optimisers: the move that a round's updates make, taken as a gradient. FedAvgM is Hsu et al., arXiv 1909.06335;
FedAdagrad, FedAdam and FedYogi are Reddi et al., arXiv 2003.00295, Algorithm 2. They know tensors; never clients or rounds.
"""

import torch

from fedmpi.aggregation import ServerConfig
from fedmpi.tensors import Tensors

FIRST, SECOND = "first/", "second/"  # moments, by the name of what they belong to


def step(name: str, config: ServerConfig, adapter: Tensors, target: Tensors, memory: Tensors) -> tuple[Tensors, Tensors]:
    """From the adapter as it was sent towards `target`; gives the next adapter and the moments. What did not move keeps its own."""
    if name == "none":
        return target, memory
    after, moments = dict(target), dict(memory)
    for key, was in adapter.items():
        if key not in target or torch.equal(target[key], was):
            continue
        move = target[key].double() - was.double()
        change, kept = _change(name, config, move, memory.get(FIRST + key), memory.get(SECOND + key))
        after[key] = (was.double() + change).to(was.dtype)
        moments |= {prefix + key: tensor.float() for prefix, tensor in kept.items()}
    return after, moments


def _change(
    name: str, config: ServerConfig, move: torch.Tensor, first: torch.Tensor | None, second: torch.Tensor | None
) -> tuple[torch.Tensor, Tensors]:
    """Algorithm 2, lines 9 to 15; FedAvgM is its line 9 with a plain sum."""
    mean = torch.zeros_like(move) if first is None else first.double()
    if name == "avgm":
        mean = config.momentum * mean + move
        return (config.lr or 1.0) * mean, {FIRST: mean}
    mean = config.momentum * mean + (1 - config.momentum) * move  # 9
    power = torch.full_like(move, config.tau**2) if second is None else second.double()
    square = move * move
    if name == "adagrad":
        power = power + square  # 11
    elif name == "yogi":
        power = power - (1 - config.beta2) * square * torch.sign(power - square)  # 12
    else:
        power = config.beta2 * power + (1 - config.beta2) * square  # 13
    return (config.lr or 0.01) * mean / (power.sqrt() + config.tau), {FIRST: mean, SECOND: power}  # 15
