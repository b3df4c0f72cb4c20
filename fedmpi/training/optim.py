"""Optimisers, learning rates, and an optimiser's state as named tensors. Knows nothing of data or of the loop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedmpi.errors import TrainingError
from fedmpi.tensors import Tensors
from fedmpi.training import Config

# The squares of most gradients are 0 in float16. Divided by torch's own 1e-8, a step would be a thousand times as long as its rate.
EPS, EPS_FLOAT16 = 1e-8, 1e-4
_FOREIGN = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}  # in bitsandbytes


@dataclass(frozen=True)
class OptimState:
    """What an optimiser remembers: tensors named `PARAMETER.WHAT` on the CPU, and the steps it has taken."""

    tensors: Tensors
    step: int

    def pack(self) -> Tensors:
        """As tensors alone, the way a client's own state is kept."""
        return {**self.tensors, "step": torch.tensor(self.step)}

    @staticmethod
    def of(packed: Mapping[str, torch.Tensor]) -> "OptimState":
        """What `pack` gave."""
        return OptimState({name: tensor for name, tensor in packed.items() if name != "step"}, int(packed["step"]))


def build(parameters: Mapping[str, torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """The configured optimiser with nothing to remember. Fused: one call for all the small tensors of an adapter."""
    trained = list(parameters.values())
    if config.optimizer == "sgd":
        whole = trained[0].dtype is torch.float32  # torch 2.13 on a CPU forgets most of a fused step in 16 bits
        return torch.optim.SGD(trained, lr=config.lr, weight_decay=config.weight_decay, fused=whole)
    if config.optimizer in _FOREIGN:
        return _foreign(trained, config)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    eps = EPS_FLOAT16 if trained[0].dtype is torch.float16 else EPS
    return kind(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=eps, fused=True)


def _foreign(trained: list[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    device = trained[0].device.type
    if config.optimizer.startswith("paged") and device != "cuda":
        raise TrainingError(
            f"train.optimizer {config.optimizer} pages between GPU and CPU, this rank trains on {device}: leave paged out"
        )
    try:
        import bitsandbytes
    except ImportError:
        raise TrainingError(f"train.optimizer {config.optimizer} needs bitsandbytes: pip install 'fedmpi[quant]'") from None
    kind = getattr(bitsandbytes.optim, _FOREIGN[config.optimizer])
    made: torch.optim.Optimizer = kind(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
    return made


def rate(config: Config, index: int, num_steps: int) -> float:
    """The learning rate of step `index`, from 0, of `num_steps`: a rise to lr, then the schedule; never 0."""
    if index < config.warmup_steps:
        return config.lr * (index + 1) / config.warmup_steps
    progress = (index - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (1 - progress) if config.schedule == "linear" else config.lr


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use `lr` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def save(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], step: int) -> OptimState:
    """Copies of what the optimiser remembers; its own count of steps is `step`, kept once."""
    tensors = {
        f"{name}.{key}": value.detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key != "step" and isinstance(value, torch.Tensor)
    }
    return OptimState(tensors, step)


def restore(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: OptimState) -> None:
    """Let a new optimiser go on from `state`."""
    for full_name, tensor in state.tensors.items():
        name, _, key = full_name.rpartition(".")
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            found = "no such parameter" if parameter is None else f"its shape is {tuple(parameter.shape)}"
            raise TrainingError(f"kept optimiser state {full_name} {tuple(tensor.shape)} does not fit: {found}")
        memory = optimizer.state[parameter]
        memory[key] = tensor.to(parameter.device, copy=True)
        memory["step"] = torch.tensor(float(state.step), device=parameter.device)
