"""Out of memory in a step: what it looks like, and a micro-batch in smaller parts. It must never know whose step it is."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fedmpi.data.batching import Batch

WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, and of torch on a CPU


def ran_out(error: BaseException) -> bool:
    """Whether this is an error of memory, on a GPU or not."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in WORDS)


def parts(batch: Batch, num: int) -> Iterator[Batch]:
    """Neighbouring rows of a micro-batch in `num` parts, or as many as it has rows; a sum over tokens is that of the parts."""
    rows = len(batch.input_ids)
    size = -(-rows // num)
    for start in range(0, rows, size):
        place = slice(start, start + size)
        width = int(batch.attention_mask[place].any(0).nonzero().max()) + 1
        cut = {key: getattr(batch, key)[place, :width] for key in ("input_ids", "attention_mask", "labels")}
        positions = None if batch.position_ids is None else batch.position_ids[place, :width]
        yield replace(batch, **cut, position_ids=positions, ids=batch.ids[place])
