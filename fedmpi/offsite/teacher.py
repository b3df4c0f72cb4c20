"""The full model as what an emulator imitates: hidden states where the emulator ends, and outputs. It is never trained here.

One pass gives both, without gradients. Where the adapter is at the model's end alone, what comes out of the layers before it never
changes: kept for a pool of texts, it saves every pass but that through the adapter.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedmpi.data import Batch, Example, collate
from fedmpi.errors import CheckpointError, DataError
from fedmpi.models.logits import IGNORED, supervised_logits
from fedmpi.offsite.assembly import assemble, find_layers
from fedmpi.offsite.layers import Layout
from fedmpi.seeding import seed_for


@dataclass(frozen=True)
class Views:
    """What a model makes of the supervised tokens of a batch, in reading order, in fp32: before the adapter's end, and at last."""

    hidden: torch.Tensor
    logits: torch.Tensor


def look(model: torch.nn.Module, place: int, batch: Batch, device: torch.device) -> Views:
    """One pass; `place` is the layer whose output counts."""
    with _output_of(model, place) as seen:
        logits, _ = supervised_logits(model, batch, device)
    return Views(_supervised(seen[0], batch), logits.float())


class Teacher:
    """The full model with the current adapter in it, asked anew for every batch."""

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        self.model = model.eval()
        self.place = layout.inner[-1]

    @torch.no_grad()
    def __call__(self, batch: Batch, device: torch.device) -> Views:
        """What the student should see."""
        return look(self.model, self.place, batch, device)


class PooledTeacher:
    """The full model with what its unchanging part makes of some texts; for a batch only the adapter is passed."""

    def __init__(self, model: torch.nn.Module, layout: Layout, kept: Mapping[str, torch.Tensor]) -> None:
        self.model = assemble(model, layout.adapter)
        self.kept = kept

    @torch.no_grad()
    def __call__(self, batch: Batch, device: torch.device) -> Views:
        """What the student should see."""
        rows = [self.kept[name] for name in batch.ids]
        hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        with _input_of_first(self.model, hidden):
            logits, _ = supervised_logits(self.model, batch, device)
        return Views(_supervised(hidden, batch), logits.float())


def pool(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """So many examples, chosen by the seed; all of them where there are no more."""
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed_for(seed, "pool")))
    return [examples[index] for index in chosen[:size].tolist()]


@torch.no_grad()
def keep(
    model: torch.nn.Module, layout: Layout, examples: Sequence[Example], batch_size: int, pad_id: int, folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """Hidden states of the layers before the adapter by example: one pass for each, in groups of a fixed order.

    They lie in a file without a name in `folder`, of which memory holds what there is room for.
    """
    lower = assemble(model, layout.inner)
    device = next(lower.parameters()).device
    kept: dict[str, torch.Tensor] = {}
    lengths = [len(example.input_ids) for example in examples]
    room: Iterator[torch.Tensor] = iter(())
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        batch = collate(group, pad_id)
        with _output_of(lower, -1) as seen:
            supervised_logits(lower, batch, device)
        if not start:
            room = iter(torch.split_with_sizes(on_disk((sum(lengths), seen[0].shape[-1]), seen[0].dtype, folder), lengths))
        for example, states in zip(group, seen[0], strict=True):
            kept[example.id] = next(room)
            kept[example.id].copy_(states[: len(example.input_ids)])
    if len(kept) != len(examples):
        raise DataError(
            f"offsite.align_pool: of {len(examples)} public examples {len(examples) - len(kept)} share their id with others"
        )
    return kept


def on_disk(shape: tuple[int, int], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """An empty tensor in a file that goes away with it."""
    size = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full says so now, and not by a signal later
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)
    except OSError as error:
        raise CheckpointError(
            f"offsite.align_pool: {size} bytes of hidden states could not be kept in {folder} ({error}): make room, or give fewer"
        ) from None


def _supervised(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The states of the positions whose next token is supervised."""
    places = (batch.labels[:, 1:] != IGNORED).flatten().nonzero()[:, 0]
    return hidden[:, :-1].flatten(0, 1).index_select(0, places.to(hidden.device)).float()


@contextmanager
def _output_of(model: torch.nn.Module, place: int) -> Iterator[list[torch.Tensor]]:
    """The hidden states that a layer gives while this lasts."""
    seen: list[torch.Tensor] = []
    with watching([find_layers(model)[1][place]], lambda index, given, gave: seen.append(gave)):
        yield seen


@contextmanager
def watching(modules: Iterable[torch.nn.Module], see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While this lasts, `see` is told the index of a module that is passed, what it was given, and what it gave."""

    def hook(index: int) -> Any:
        def tell(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(index, args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)

        return tell

    handles = [module.register_forward_hook(hook(index), with_kwargs=True) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _input_of_first(model: torch.nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """The first layer gets these states, whatever was embedded."""

    def put(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = find_layers(model)[1][0].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
