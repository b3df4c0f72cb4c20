"""Named tensors: what an adapter is once it has left its model. Pure functions; they know nothing of models, clients or links."""

import hashlib
import mmap
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
LARGE_BYTES = 1 << 20
KEPT_S = 60.0  # after that, idle memory goes back to the system when memory of another size is asked for


def room(num: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for so many elements, with whatever was in it before.

    Large memory that nobody holds any more is used again, and lies in huge pages where there are any: to touch pages that are new
    to the process costs more than most of what is done with them, and malloc gives large ones back to the system after each use.
    """
    size, now = num * dtype.itemsize, time.monotonic()
    if size < LARGE_BYTES:
        return torch.empty(num, dtype=dtype)
    with _lock:
        idle = [one for one in _rooms if one.num_holders() == _IDLE]
        found = next((one for one in idle if size <= len(one.memory) <= 2 * size), None)
        if found is None:
            for one in idle:
                if now - one.used > KEPT_S:
                    _rooms.remove(one)
            _rooms.append(found := _Room(_huge(size)))
        found.used = now
        return torch.frombuffer(found.memory, dtype=dtype, count=num)


def _huge(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@dataclass(eq=False)
class _Room:
    """A piece of memory. Whatever lies in it, a tensor, a view of one, or a message under way, holds a reference to it."""

    memory: mmap.mmap
    used: float = 0.0

    def num_holders(self) -> int:
        """This object and the call count too."""
        return sys.getrefcount(self.memory)


_rooms: list[_Room] = []
_lock = threading.Lock()
_IDLE = _Room(_huge(1)).num_holders()


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
    path.touch()  # to ask for the umask would be to change it, under the other threads' feet
    mode = path.stat().st_mode
    places: dict[int, str] = {}  # what stands in one place under two names is written twice: a file knows no sharing
    first = {name: places.setdefault(tensor.data_ptr(), name) == name for name, tensor in tensors.items()}
    apart = {name: tensor.contiguous() if first[name] else tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(apart, path, metadata)
    path.chmod(mode)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes in the order of the names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
