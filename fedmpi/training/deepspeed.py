"""DeepSpeed ZeRO inside a client's own world, on GPUs (NCCL) as on CPUs (gloo). It must never know more than one turn.

A turn begins and ends with a whole model on every rank, as with the other engines: what ZeRO does to modules and
parameters is undone, so that the next client can take its turn and that what is sent is never a rank's part.
"""

import copy
import gc
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from fedmpi.errors import TrainingError
from fedmpi.training import Config, inner, zero
from fedmpi.training.engine import Engine, keeps_gradients
from fedmpi.training.hooks import Hook


@dataclass(frozen=True)
class Zero(Engine):
    """DeepSpeed's engine in place of the backward pass and the step. Clipping is part of its step."""

    model: Any  # DeepSpeed's own engine
    modules: "tuple[_Module, ...]" = ()
    parameters: "tuple[_Parameter, ...]" = ()
    whole: dict[torch.nn.Parameter, torch.Tensor] = field(default_factory=dict)
    sets_local_rank: bool = False

    def admit(self, hooks: Sequence[Hook]) -> None:
        """Refuse hooks that add to gradients."""
        keeps_gradients("deepspeed", hooks)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this rank's part; they are summed over the ranks on the way or in the step."""
        self.model.backward(loss, scale_wrt_gas=False)

    def ready(self) -> None:
        """Nothing was scaled."""

    def clip(self, most: float | None) -> torch.Tensor:
        """Not known before the step; a gradient that is not finite shows in the next loss, or in the weights."""
        return torch.zeros((), device=self.parameters[0].parameter.device)

    def step(self) -> None:
        """Move the weights."""
        self.model.step()

    def clear(self) -> None:
        """No gradient is left."""
        self.model.optimizer.zero_grad()

    def gather(self) -> None:
        """Fetch from the other ranks what of the trained values lies with them."""
        import deepspeed

        trained = [p for p in self.model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters([p for p in trained if hasattr(p, "ds_id")]):
            self.whole.update({p: p.detach().clone() for p in trained})

    def close(self) -> None:
        """Leave an ordinary model behind; after a failure, without what only the other ranks know of the trained values."""
        self.model.destroy()
        for module in self.modules:
            module.restore()
        for parameter in self.parameters:
            parameter.restore(self.whole.get(parameter.parameter))
        if self.sets_local_rank:
            del os.environ["LOCAL_RANK"]
        gc.collect()  # its engine is a knot of references that holds process groups and buffers


@dataclass(frozen=True)
class _Module:
    """A module as it was: DeepSpeed exchanges its dictionary of parameters, and leaves hooks that hold the whole engine."""

    module: torch.nn.Module
    attributes: dict[str, Any]

    @staticmethod
    def of(module: torch.nn.Module) -> "_Module":
        return _Module(module, {key: copy.copy(value) if key.endswith("_hooks") else value for key, value in vars(module).items()})

    def restore(self) -> None:
        vars(self.module).clear()
        vars(self.module).update(self.attributes)


@dataclass(frozen=True)
class _Parameter:
    """A parameter as it was: ZeRO-3 takes its values away, and all stages hang attributes of theirs on it."""

    parameter: torch.nn.Parameter
    values: torch.Tensor  # frozen ones wait on the CPU: the point of ZeRO-3 is that no GPU holds them all
    attributes: frozenset[str]

    @staticmethod
    def of(parameter: torch.nn.Parameter) -> "_Parameter":
        return _Parameter(parameter, parameter.detach().cpu(), frozenset(vars(parameter)))

    def restore(self, trained: torch.Tensor | None) -> None:
        device = self.parameter.device
        for name in set(vars(self.parameter)) - self.attributes:
            delattr(self.parameter, name)
        self.parameter.data = (self.values if trained is None else trained).to(device)
        self.parameter.grad = None


def start(config: Config, plain: Engine, device: torch.device) -> Engine:
    """DeepSpeed's engine over the client's world, with the recipe's own optimiser inside."""
    modules = tuple(_Module.of(module) for module in plain.model.modules())
    parameters = tuple(_Parameter.of(parameter) for parameter in plain.model.parameters())
    sets_local_rank = _set_local_rank(device)
    import deepspeed

    if (kind := deepspeed.accelerator.get_accelerator().device_name()) != device.type:
        raise TrainingError(f"DeepSpeed works on {kind} here, this rank on {device}: export DS_ACCELERATOR={device.type}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # For inference only; it would take a compiler and a minute, and two clients of one machine would share its memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A client may be one rank of a larger job, which ZeRO-3 takes for a mistake.
    deepspeed.runtime.zero.partition_parameters._contradicting_single_rank_pg_error = lambda *_, **__: None
    wrapped: Any = deepspeed.initialize(
        args=SimpleNamespace(device_rank=device.index or 0),
        model=plain.model,
        optimizer=plain.optimizer,
        config=zero.settings(config, dist.get_world_size()),
        dist_init_required=False if deepspeed.comm.is_initialized() else None,
    )[0]
    return Zero(
        wrapped, plain.optimizer, plain.scaler, dist.get_rank(), dist.get_world_size(),
        modules=modules, parameters=parameters, sets_local_rank=sets_local_rank,
    )  # fmt: skip


def _forget() -> None:
    """Let go of the groups and modules that DeepSpeed itself keeps: the others would wait for a rank that holds them."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    parameter_offload.FWD_MODULE_STACK.clear()
    groups._release_process_group_references()


inner.ON_LEAVING.append(_forget)


def _set_local_rank(device: torch.device) -> bool:
    """DeepSpeed reads it even in the midst of a turn. What a launcher has set stays; gives whether it had to be set."""
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(device.index or 0)))
    if device.type == "cuda" and local_rank != str(device.index):
        raise TrainingError(
            f"train.engine deepspeed uses the GPU of the rank's number on its node, {local_rank}, but this rank has {device}: "
            "start at most one rank for each GPU of a node, and leave --device auto"
        )
    if "LOCAL_RANK" in os.environ:
        return False
    os.environ["LOCAL_RANK"] = local_rank
    return True
