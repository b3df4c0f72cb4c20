"""torch.compile for the repeated layers of a model, while it trains. It must never know batches, optimisers or ranks.

Compiled code adds up in another order, and which code is made depends on the lengths that came first: results agree with those
of the model as it is written to rounding, not byte for byte.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fedmpi.errors import ConfigError
from fedmpi.training import Config

COMPILERS = ("c++", "g++", "clang++")


def check() -> None:
    """Refuse at once what would fail in every turn: on CPUs and GPUs alike, part of what is made is C++."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "c++", *COMPILERS))):
        raise ConfigError(
            f"train.compile needs a C++ compiler, none of {', '.join(COMPILERS)} is here: install one, or leave it out"
        )


@contextmanager
def compiled(model: Any, config: Config) -> Iterator[None]:
    """For a while the layers run as compiled code, one for all of them and for every length; evaluation does not."""
    if not config.compile:
        yield
        return
    import torch

    from fedmpi.models.backbone import decoder_layers

    layers: list[torch.nn.Module] = list(decoder_layers(model))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # what shows again is that of its class


def as_written(config: Config) -> AbstractContextManager[None]:
    """Whoever looks into the layers wants them to run as they are written."""
    if not config.compile:
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
