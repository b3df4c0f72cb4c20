"""FSDP2 inside a client's own world: weights, gradients and optimiser state in parts, on GPUs (NCCL) as on CPUs (gloo).

What is taken apart is a copy of the modules around the same values, so that there is nothing to undo: the model itself stays
an ordinary one, and gets the trained values when the turn is over. It must never know more than one turn.
"""

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # torch has no other name for it

from fedmpi.models.backbone import repeated_layers
from fedmpi.training import inner
from fedmpi.training.engine import Engine, keeps_gradients
from fedmpi.training.hooks import Hook

inner.ON_LEAVING.append(_clear_sharding_prop_cache)


@dataclass(frozen=True)
class Sharded(Engine):
    """The copy that computes, in parts, and the whole parameters, which wait on the CPU: no GPU holds them all.

    The optimiser moves this rank's parts as the plain tensors that they are. What DTensor remembers of operations of its own holds
    the client's world, and a member that leaves would look alive to the others.
    """

    whole: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)
    parts: Mapping[torch.nn.Parameter, torch.nn.Parameter] = field(default_factory=dict)  # as the optimiser has them

    def admit(self, hooks: Sequence[Hook]) -> None:
        """Refuse hooks that add to gradients."""
        keeps_gradients("fsdp", hooks)

    def ready(self) -> None:
        """Show the optimiser its part of the gradients."""
        for parameter, part in self.parts.items():
            part.grad = None if parameter.grad is None else _own(parameter.grad)

    def clip(self, most: float | None) -> torch.Tensor:
        """The norm of the gradient of all ranks."""
        parts = list(self.parts.values())
        if not most:
            return torch.zeros((), device=parts[0].device)
        own = torch.nn.utils.get_total_norm([part.grad for part in parts if part.grad is not None]).to(parts[0].device)
        norm = self.total(own.float().square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(parts, most, norm)
        return norm

    def clear(self) -> None:
        """No gradient is left."""
        for parameter, part in self.parts.items():
            parameter.grad = part.grad = None

    @torch.no_grad()
    def gather(self) -> None:
        """Fetch from the other ranks, layer by layer, what of the trained values lies with them."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                for name, parameter in self.model.named_parameters():
                    if parameter.requires_grad and not isinstance(parameter, DTensor):
                        self.whole[name].copy_(parameter)
                module.reshard()

    def close(self) -> None:
        """The whole model computes again."""
        device = next(iter(self.parts.values())).device
        for parameter in self.whole.values():
            parameter.data = parameter.data.to(device)
        gc.collect()  # the copy is a knot of references that holds the process group


def start(plain: Engine, device: torch.device) -> Engine:
    """The model in parts, layer by layer; what lies outside the layers is a part by itself."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where torch looks for the parameters of this rank
    whole = dict(plain.model.named_parameters())
    same = {id(p): torch.nn.Parameter(p.detach(), p.requires_grad) for p in whole.values()}
    model = copy.deepcopy(plain.model, same | {id(buffer): buffer for buffer in plain.model.buffers()})
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in repeated_layers(model) or ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = {parameter: torch.nn.Parameter(_own(parameter)) for parameter in model.parameters() if parameter.requires_grad}
    place = {whole[name]: parts[parameter] for name, parameter in model.named_parameters() if parameter in parts}
    for group in plain.optimizer.param_groups:
        group["params"] = [place[parameter] for parameter in group["params"]]
    for parameter in whole.values():
        parameter.data = parameter.data.cpu()
    rank, size = dist.get_rank(), dist.get_world_size()
    return Sharded(model, plain.optimizer, plain.scaler, rank, size, whole=whole, parts=parts)


@torch.no_grad()
def _own(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, in the same memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
