"""In which numbers a model is trained, and what its backward pass keeps in memory. It must never know batches or optimisers."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fedmpi.errors import TrainingError
from fedmpi.training import Config

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HALF = (torch.float16, torch.bfloat16)


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in half the bytes; nothing for fp32 and half, where tensors already have the wanted type."""
    dtype = _AUTOCAST.get(config.precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


@contextmanager
def prepared(model: torch.nn.Module, trained: list[torch.nn.Parameter], config: Config) -> Iterator[None]:
    """The model as the configuration trains these parameters of it, and afterwards as it was, the trained values aside.

    It stays in training mode: a switch costs as much as a small step, and evaluation sets its own mode.
    """
    if not _trains(model):
        model.train()
    before = [p.dtype for p in trained]
    if config.precision == "half":
        _cast(trained, [_half_type(model)] * len(trained))
    try:
        if config.checkpointing:
            _checkpoint(model, True)
        yield
    finally:
        if config.checkpointing:
            _checkpoint(model, False)
        _cast(trained, before)


def _trains(module: torch.nn.Module) -> bool:
    """Whether all of it is in training mode: an adapter may wrap a model that is not. torch's own walk takes thrice as long."""
    return module.training and all(_trains(child) for child in module._modules.values() if child is not None)


def _checkpoint(model: Any, wanted: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the successors of these names are younger than our oldest transformers
        if wanted:  # reentrant, it would need gradients of the embeddings, and the frozen part in front would compute them
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def _cast(parameters: list[torch.nn.Parameter], dtypes: list[torch.dtype]) -> None:
    """In place, so that names, hooks and wrappers keep their parameters."""
    for parameter, dtype in zip(parameters, dtypes, strict=True):
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None


def _half_type(model: torch.nn.Module) -> torch.dtype:
    """That of the base: pure half is a model of one type throughout."""
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    dtype: torch.dtype = next(frozen, None) or model.config.dtype  # type: ignore[assignment]
    if dtype not in _HALF:
        raise TrainingError(
            f"train.precision half trains in the base's own type, which is {dtype}: give model.dtype float16 or bfloat16"
        )
    return dtype
