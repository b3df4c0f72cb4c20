"""Named tensors: what an adapter is once it has left its model. Pure functions; they know nothing of models, clients or links."""

import hashlib
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
HUGE_BYTES = 32 << 20  # glibc's malloc keeps less than that for the next use


def zeros(num: int, dtype: torch.dtype) -> torch.Tensor:
    """So many zeros. Memory that the allocator would take from the system anew each time comes in huge pages, where there are any:
    to touch pages of the usual size for the first time costs more than most of what is done with them."""
    if num * dtype.itemsize < HUGE_BYTES:
        return torch.zeros(num, dtype=dtype)
    memory = mmap.mmap(-1, num * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes that the tensors' elements take."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors as a group of this name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """The tensors of a group, by their own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same_names(left: Mapping[str, object], right: Mapping[str, object]) -> None:
    """Raise a KeyError that lists what is missing and what is surplus."""
    missing, surplus = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    if missing or surplus:
        raise KeyError(f"tensor names differ: missing {missing[:5]}, surplus {surplus[:5]}")


def save_file(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the mode that any other new file gets (safetensors makes it readable by its owner alone)."""
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
