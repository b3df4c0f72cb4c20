"""Named tensors: what an adapter is once it has left its model. Pure functions; they know nothing of models, clients or links."""

import fcntl
import hashlib
import mmap
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
LARGE_BYTES = 1 << 20
F_SEAL_FUTURE_WRITE = 0x10  # fcntl names it from Python 3.13 on
KEPT_S = 60.0  # after that, idle memory goes back to the system when memory of another size is asked for


def room(num: int, dtype: torch.dtype, to_lend: bool = False) -> torch.Tensor:
    """Memory for so many elements, with whatever was in it before.

    Large memory that nobody holds any more is used again, and lies in huge pages where there are any: to touch pages that are new
    to the process costs more than most of what is done with them, and malloc gives large ones back to the system after each use.
    What other processes of this machine are to read can be lent to them, where the system has such memory.
    """
    size, now = num * dtype.itemsize, time.monotonic()
    if size < (LARGE_BYTES if not to_lend else 1):
        return torch.empty(num, dtype=dtype)
    with _lock:
        idle = [one for one in _rooms if one.num_holders() == _IDLE]
        fitting = [one for one in idle if size <= len(one.memory) <= 2 * size and (one.file >= 0) == to_lend]
        found = min(fitting, key=lambda one: len(one.memory), default=None)
        if found is None:
            for one in idle:
                if now - one.used > KEPT_S:
                    _rooms.remove(one)
                    one.close()
            _rooms.append(found := _new(size, to_lend))
        found.used = now
        return torch.frombuffer(found.memory, dtype=dtype, count=num)


def lent(memory: memoryview) -> tuple[int, int] | None:
    """The file behind memory that can be lent, and where in it these bytes are."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    with _lock:
        for one in _rooms:
            if one.file >= 0 and 0 <= address - one.address <= len(one.memory) - len(memory):
                return one.file, address - one.address
    return None


def _new(size: int, to_lend: bool) -> "_Room":
    if to_lend:
        with suppress(OSError):  # as many files are open as may be; then it is memory like any other
            return _lendable(size)
    return _Room(_huge(size))


def _huge(size: int, file: int = -1) -> mmap.mmap:
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if file < 0 else mmap.MAP_SHARED
    memory = mmap.mmap(file, size, flags=kind)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _lendable(size: int) -> "_Room":
    """Sealed, so that nobody else can change it, or cut it short."""
    file = os.memfd_create("fedmpi", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(file, size)
        memory = _huge(size, file)
    except OSError:
        os.close(file)
        raise
    with suppress(OSError):  # before Linux 5.1
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    return _Room(memory, file=file, address=np.frombuffer(memory, np.uint8).ctypes.data)


@dataclass(eq=False)
class _Room:
    """A piece of memory. Whatever lies in it, a tensor, a view of one, or a message under way, holds a reference to it."""

    memory: mmap.mmap
    used: float = 0.0
    file: int = -1
    address: int = 0

    def num_holders(self) -> int:
        """This object and the call count too."""
        return sys.getrefcount(self.memory)

    def close(self) -> None:
        """Nobody holds it."""
        if self.file >= 0:
            os.close(self.file)


_rooms: list[_Room] = []
_lock = threading.Lock()
_IDLE = _Room(_huge(1)).num_holders()


@torch.no_grad()
def copies(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Their values: CPU, fp32, contiguous, side by side in memory, ready to be sent from where they are."""
    sizes = [tensor.numel() for tensor in tensors.values()]
    values = room(sum(sizes), torch.float32, to_lend=4 * sum(sizes) >= LARGE_BYTES)
    made = {name: part.view(tensors[name].shape) for name, part in zip(tensors, torch.split_with_sizes(values, sizes), strict=True)}
    for name, tensor in tensors.items():
        made[name].copy_(tensor)
    return made


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
