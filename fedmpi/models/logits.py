"""The logits that a loss needs and no others: those that predict a supervised token. Training and evaluation use it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from fedmpi.models.virtual import rows_in_front

IGNORED = -100


def supervised_logits(model: torch.nn.Module, batch: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (one row per supervised token, in reading order) and the tokens that they should predict.

    A position counts when its next token is supervised. Places are found on the CPU, where batches are made, so that a
    GPU is not waited for; the head runs only on the columns that some row of the batch needs. Virtual tokens shift them.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]
    if not len(columns):
        columns = torch.zeros(1, dtype=torch.long)
    targets = targets[:, columns]
    places = (targets != IGNORED).flatten().nonzero()[:, 0]
    # Where samples share a row, their positions say so; a mask beside them would be taken for the whole truth.
    names = ("input_ids", "attention_mask" if batch.position_ids is None else "position_ids")
    inputs = {key: getattr(batch, key).to(device) for key in names}
    columns = columns + rows_in_front(model)
    if _takes_columns(type(_innermost(model)).forward):
        logits = model(**inputs, use_cache=False, logits_to_keep=columns.to(device)).logits
    else:
        logits = model(**inputs, use_cache=False).logits[:, columns.to(device)]
    return logits.flatten(0, 1).index_select(0, places.to(device)), targets.flatten()[places].to(device)


def _innermost(model: Any) -> Any:
    """The transformers model inside a PEFT or a distributed wrapper."""
    while hasattr(model, "module") or hasattr(model, "get_base_model"):
        model = model.module if hasattr(model, "module") else model.get_base_model()
    return model


@functools.cache
def _takes_columns(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
