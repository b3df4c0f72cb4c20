"""The spool: a round's updates in scratch space, for rules that need all of them at once, and for what must be taken back.

They go in as they arrive, whole or in pieces, and come out by client, so that no result can depend on the order of arrival. An
update that turns out to be void when part of it was passed on is given once more, to be taken back. Of what lies here, a
reader holds one tensor (or a slice of one) of each client at a time: the memory of a rule is that of its widest module times
the clients of the round. It must never know what a rule does.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import torch

from fedmpi.aggregation.pieces import Piece, Void, Weighted
from fedmpi.aggregation.scratch import Scratch
from fedmpi.tensors import Tensors, num_bytes


class Sent(Weighted, Protocol):
    """An update, and whose it is."""

    @property
    def client(self) -> int: ...


HELD_BYTES = 20 << 20  # of pieces that may have to be taken back; what is more of them goes to scratch space
U = TypeVar("U", bound=Sent)
Places = dict[str, tuple[int, torch.Size, torch.dtype]]


class Spool:
    """The updates of one round."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = Scratch(scratch)
        self._places: dict[int, Places] = {}
        self._weights: dict[int, int] = {}
        self._end = 0
        self._idle: list[int] = []  # where taped updates were that are not needed any more
        self._held_bytes = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._scratch.close()

    def passing(self, updates: Iterable[U]) -> Iterator[U]:
        """The updates as they come, each kept on its way."""
        for update in updates:
            self._keep(update.client, update.tensors)
            self._weights[update.client] = update.weight
            yield update

    def taping(self, pieces: Iterable[Piece | Void], keep: bool) -> Iterator[Piece]:
        """Pieces as they come; those of a void update come once more, to be taken back. Whole updates stay here where asked for."""
        tapes: dict[int, _Tape] = {}
        for piece in pieces:
            if isinstance(piece, Void):
                if piece.update in tapes:
                    yield from self._backwards(tapes.pop(piece.update))
                continue
            if piece.added:  # its own rank has looked at what is in it: it cannot be void
                yield piece
                continue
            tape = tapes.get(piece.update) or tapes.setdefault(piece.update, _tape(piece))
            if keep:
                self._record(tape, piece)
            elif piece.values.numel() < tape.num_elements:  # one that is all of its update was seen whole before
                self._hold(tape, piece)
            yield piece
            if piece.first + piece.values.numel() == tape.num_elements:
                self._finish(tapes.pop(piece.update), keep)

    def _hold(self, tape: "_Tape", piece: Piece) -> None:
        """A piece that is only to be taken back, if at all, stays where it is: to write it costs more than to look at it."""
        size = piece.values.numel() * piece.values.element_size()
        if self._held_bytes + size > HELD_BYTES:
            self._record(tape, piece)
            return
        self._held_bytes += size
        tape.held.append((piece.first, piece.values))

    def _let_go(self, tape: "_Tape") -> None:
        self._held_bytes -= sum(values.numel() * values.element_size() for _, values in tape.held)
        if tape.start >= 0:
            self._idle.append(tape.start)

    def _record(self, tape: "_Tape", piece: Piece) -> None:
        if tape.start < 0:
            tape.start = self._idle.pop() if self._idle else self._end  # all that are taped are alike
            self._end = max(self._end, tape.start + tape.num_bytes)
        place = tape.start + sum(num * dtype.itemsize for _, num, dtype in tape.taken)
        self._scratch.write(place, _bytes(piece.values), self._end)
        tape.taken.append((piece.first, piece.values.numel(), piece.values.dtype))

    def _backwards(self, tape: "_Tape") -> Iterator[Piece]:
        place = tape.start
        for first, num, dtype in tape.taken:
            yield replace(tape.head, first=first, values=self._read(place, num, dtype), back=True)
            place += num * dtype.itemsize
        for first, values in tape.held:
            yield replace(tape.head, first=first, values=values, back=True)
        self._let_go(tape)

    def _finish(self, tape: "_Tape", keep: bool) -> None:
        if keep:
            self._places[tape.head.update] = _places(tape.head.like, tape.start)
            self._weights[tape.head.update] = tape.head.weight
        else:
            self._let_go(tape)

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
        self._places[client] = _places(tensors, self._end)
        for tensor in tensors.values():
            self._scratch.write(self._end, data := _bytes(tensor))
            self._end += len(data)

    def _read(self, start: int, num: int, dtype: torch.dtype) -> torch.Tensor:
        if not num:
            return torch.empty(0, dtype=torch.float64)
        found = torch.empty(num, dtype=dtype)
        self._scratch.read(start, found.view(torch.uint8).numpy().data)
        return found.double()


@dataclass
class _Tape:
    """What of one update has been passed on."""

    head: Piece  # the first piece, without its values
    num_elements: int  # of the whole update
    num_bytes: int
    start: int = -1  # in the file
    taken: list[tuple[int, int, torch.dtype]] = field(default_factory=list)  # first element, how many, of what
    held: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # first element, and those that are not in the file


def _tape(piece: Piece) -> _Tape:
    nothing, like = piece.values.new_empty(0), piece.like
    return _Tape(replace(piece, values=nothing, most=None), sum(tensor.numel() for tensor in like.values()), num_bytes(like))


def _places(tensors: Tensors, start: int) -> Places:
    """Where tensors lie that are one after the other."""
    places: Places = {}
    for name, tensor in tensors.items():
        places[name] = (start, tensor.shape, tensor.dtype)
        start += tensor.numel() * tensor.element_size()
    return places


def _bytes(tensor: torch.Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
