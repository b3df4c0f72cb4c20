"""The spool: a round's updates in scratch space, for rules that need all of them at once.

They go in as they arrive and come out by client, so that no result can depend on the order of arrival. Of what lies here, a
reader holds one tensor (or a slice of one) of each client at a time: the memory of a rule is that of its widest module times
the clients of the round. It must never know what a rule does.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from fedmpi.aggregation.mean import Weighted
from fedmpi.tensors import Tensors

IN_MEMORY_BYTES = 8 << 20  # what a round of small updates takes before it goes to disk


class Sent(Weighted, Protocol):
    """An update, and whose it is."""

    @property
    def client(self) -> int: ...


U = TypeVar("U", bound=Sent)


class Spool:
    """The updates of one round. The file has no name, so that nothing stays behind, however the process ends."""

    def __init__(self, scratch: Path | None) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=str(scratch) if scratch else None)  # noqa: SIM115 - closed in __exit__
        self._places: dict[int, dict[str, tuple[int, torch.Size, torch.dtype]]] = {}
        self._weights: dict[int, int] = {}
        self._end = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def passing(self, updates: Iterable[U]) -> Iterator[U]:
        """The updates as they come, each kept on its way."""
        for update in updates:
            self._keep(update.client, update.tensors)
            self._weights[update.client] = update.weight
            yield update

    def taking(self, updates: Iterable[U], prefix: str) -> Iterator[U]:
        """The updates as they come, without a group of their tensors: that is kept here."""
        for update in updates:
            self._keep(update.client, {name: tensor for name, tensor in update.tensors.items() if name.startswith(prefix)})
            self._weights[update.client] = 1
            rest = {name: tensor for name, tensor in update.tensors.items() if not name.startswith(prefix)}
            yield replace(update, tensors=rest)  # type: ignore[type-var]

    def total(self, name: str) -> torch.Tensor:
        """The sum of one tensor over the clients, in their order."""
        return torch.stack([self.get(client, name) for client in self.shares]).sum(0)

    def fill(self, updates: Iterable[Sent]) -> None:
        """Keep all of them."""
        for _ in self.passing(updates):
            pass

    @property
    def shares(self) -> dict[int, float]:
        """Each client's share of the weight, clients in their order."""
        total = sum(self._weights.values())
        return {client: self._weights[client] / total for client in sorted(self._weights)}

    def names(self, client: int) -> set[str]:
        """What the client sent."""
        return set(self._places[client])

    def shape(self, client: int, name: str) -> torch.Size:
        """Of one tensor of one client."""
        return self._places[client][name][1]

    def get(self, client: int, name: str) -> torch.Tensor:
        """One tensor of one client, in float64."""
        start, shape, dtype = self._places[client][name]
        return self._read(start, shape.numel(), dtype).view(shape)

    def slice(self, client: int, name: str, start: int, stop: int) -> torch.Tensor:
        """Some elements of it, flat, in float64."""
        place, _, dtype = self._places[client][name]
        return self._read(place + start * dtype.itemsize, stop - start, dtype)

    def _keep(self, client: int, tensors: Tensors) -> None:
        places = {}
        self._file.seek(self._end)
        for name, tensor in tensors.items():
            places[name] = (self._end, tensor.shape, tensor.dtype)
            self._end += self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._places[client] = places

    def _read(self, start: int, num: int, dtype: torch.dtype) -> torch.Tensor:
        if not num:
            return torch.empty(0, dtype=torch.float64)
        self._file.seek(start)
        return torch.frombuffer(bytearray(self._file.read(num * dtype.itemsize)), dtype=dtype).double()
