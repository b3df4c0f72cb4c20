"""Which engine a client has: one rank for itself, or all ranks of its inner world together. It must never know a step."""

import warnings
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from fedmpi.errors import TrainingError
from fedmpi.training import Config
from fedmpi.training.engine import Engine


def start(config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Engine:
    """The configured engine around a model whose weights are equal on all its ranks."""
    plain = Engine(model, optimizer, GradScaler(device.type, enabled=config.precision == "fp16"))
    if config.engine == "plain":
        return plain
    if not dist.is_initialized():
        raise TrainingError(
            f"train.engine {config.engine} needs a client with ranks of its own: ask for ranks_per_client or groups"
        )
    if config.engine == "deepspeed":
        from fedmpi.training import deepspeed

        return deepspeed.start(config, plain, device)
    if dist.get_world_size() == 1:
        return plain
    if config.engine == "fsdp":
        from fedmpi.training import fsdp

        return fsdp.start(plain, device)
    return _ddp(plain, device)


@dataclass(frozen=True)
class Replicated(Engine):
    """DDP: a whole model on every rank, gradients summed while they are computed."""

    def close(self) -> None:
        """Let go of the process group now: while anything holds it, the other members do not see that this one left."""
        del self.model.reducer, self.model.logger, self.model.process_group


def _ddp(plain: Engine, device: torch.device) -> Engine:
    # The base is the same file on every rank and the adapter came by the leader: sending both again would cost a model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the successor of broadcast_buffers is younger than our oldest torch
        wrapped = DistributedDataParallel(
            plain.model, device_ids=[device] if device.type == "cuda" else None, init_sync=False, broadcast_buffers=False
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    return Replicated(wrapped, plain.optimizer, plain.scaler, rank, size, quiet=wrapped.no_sync)
