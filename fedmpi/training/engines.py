"""Engines: who computes a client's steps, one rank or all ranks of its inner world. The loop above is the same for all.

Every rank of a client draws the same batches and keeps its share, so that counts of tokens need no communication and
K ranks with batch b give the step of one rank with batch K * b.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fedmpi.data.batching import Batch
from fedmpi.errors import TrainingError
from fedmpi.models.logits import IGNORED


@dataclass(frozen=True)
class Engine:
    """A model to call forward, and this rank's place among those that train it."""

    model: torch.nn.Module
    rank: int = 0
    size: int = 1
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext

    def share(self, batch: Batch) -> Batch:
        """This rank's rows; a rank left without any gets one that supervises nothing, since collectives need all."""
        if self.size == 1:
            return batch
        rows = slice(self.rank, None, self.size)
        if self.rank < len(batch.input_ids):
            labels = batch.labels[rows]
        else:
            rows, labels = slice(0, 1), torch.full_like(batch.labels[:1], IGNORED)
        width = int(batch.attention_mask[rows].any(0).nonzero().max()) + 1
        parts = ("input_ids", "attention_mask", *(() if batch.position_ids is None else ("position_ids",)))
        cut = {key: getattr(batch, key)[rows, :width] for key in parts}
        return replace(batch, **cut, labels=labels[:, :width], ids=batch.ids[rows])

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def close(self) -> None:
        """Let go of the process group now: while anything holds it, the other members do not see that this one left."""
        if isinstance(self.model, DistributedDataParallel):
            del self.model.reducer, self.model.logger, self.model.process_group


def start(name: str, model: torch.nn.Module, device: torch.device) -> Engine:
    """The engine of that name around a model whose weights are equal on all its ranks."""
    if name == "plain":
        return Engine(model)
    if not dist.is_initialized():
        raise TrainingError("train.engine ddp needs a client with ranks of its own: ask for ranks_per_client or groups")
    if dist.get_world_size() == 1:
        return Engine(model)
    # The base is the same file on every rank and the adapter came by the leader: sending both again would cost a model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the successor of broadcast_buffers is younger than our oldest torch
        wrapped = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, init_sync=False, broadcast_buffers=False
        )
    return Engine(wrapped, dist.get_rank(), dist.get_world_size(), wrapped.no_sync)
