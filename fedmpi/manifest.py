"""Manifests: what tensors a message carries, agreed on once, by hash; and the one buffer that they lie in.

Both sides derive from the manifest where each tensor's bytes lie (`places`), so that a message is those bytes and nothing else. A
sender puts them together only where a slice is asked for (`Packed`); a receiver takes flat elements from the bytes of any slice
(`Manifest.cut`), or named views of the whole (`unpack`).

A manifest from outside is not believed before it was checked: every malformed one is a ProtocolError that says what was expected
and what was found. Nothing is ever pickled. This module must never know links, or what the tensors mean.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
import xxhash

from fedmpi.errors import ProtocolError
from fedmpi.tensors import Tensors, room

MAX_BYTES = 1 << 46  # of all tensors together
MAX_JSON_BYTES = 16 << 20
MAX_DIMENSIONS = 8

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}


@dataclass(frozen=True)
class Spec:
    """One tensor: its name, shape and element type."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes that the elements take."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Group:
    """Tensors that are weighted and encoded together."""

    name: str
    tensors: tuple[Spec, ...]


@dataclass(frozen=True)
class Manifest:
    """All tensors of a message, agreed on once, by hash; both sides derive from it where each lies in the buffer."""

    groups: tuple[Group, ...] = field(default=())

    @cached_property
    def hash(self) -> int:
        """64 bits that differ when any name, shape, dtype or group does."""
        return xxhash.xxh3_64_intdigest(self.to_json())

    @cached_property
    def num_bytes(self) -> int:
        """Length of the packed buffer: exactly the elements, no padding."""
        return sum(spec.num_bytes for group in self.groups for spec in group.tensors)

    @cached_property
    def places(self) -> tuple[tuple[Spec, slice], ...]:
        """Each tensor and its bytes. Wide elements come first, so each begins on a multiple of its element size."""
        specs = [spec for group in self.groups for spec in group.tensors]
        specs.sort(key=lambda spec: -_DTYPES[spec.dtype].itemsize)  # stable: else the manifest's order
        ends = [0]
        for spec in specs:
            ends.append(ends[-1] + spec.num_bytes)
        return tuple((spec, slice(start, end)) for spec, start, end in zip(specs, ends, ends[1:], strict=False))

    @cached_property
    def runs(self) -> tuple[tuple[torch.dtype, slice, int], ...]:
        """Neighbours of one dtype: their bytes, and how many elements come before them."""
        found: list[tuple[torch.dtype, slice, int]] = []
        before = 0
        for dtype, run in groupby(self.places, key=lambda place: place[0].dtype):
            places = [place for _, place in run]
            found.append((_DTYPES[dtype], slice(places[0].start, places[-1].stop), before))
            before += (places[-1].stop - places[0].start) // _DTYPES[dtype].itemsize
        return tuple(found)

    @cached_property
    def spans(self) -> tuple[tuple[str, slice], ...]:
        """The bytes of each group, where all elements are of one dtype."""
        ends = [0]
        for group in self.groups:
            ends.append(ends[-1] + sum(spec.num_bytes for spec in group.tensors))
        return tuple((group.name, slice(start, end)) for group, start, end in zip(self.groups, ends, ends[1:], strict=False))

    @cached_property
    def like(self) -> Tensors:
        """Names, shapes and dtypes in the order of the places, on the meta device."""
        return {spec.name: torch.empty(spec.shape, dtype=_DTYPES[spec.dtype], device="meta") for spec, _ in self.places}

    def cut(self, chunk: torch.Tensor, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements whose bytes, from `start` on, are in `chunk`: flat by dtype, each with how many come before it."""
        for dtype, place, before in self.runs:
            low, high = max(start, place.start), min(start + chunk.numel(), place.stop)
            if low < high:
                if (low - place.start) % dtype.itemsize or (high - low) % dtype.itemsize:
                    raise ProtocolError(f"expected chunks of whole elements, found bytes {low} to {high} of {dtype} values")
                yield before + (low - place.start) // dtype.itemsize, chunk[low - start : high - start].view(dtype)

    def to_json(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes."""
        tree = [[group.name, [[s.name, list(s.shape), s.dtype] for s in group.tensors]] for group in self.groups]
        return json.dumps(tree, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes | str) -> "Manifest":
        """The manifest in `data`, every part of it checked."""
        if len(data) > MAX_JSON_BYTES:
            raise ProtocolError(f"a manifest has at most {MAX_JSON_BYTES} bytes, found {len(data)}")
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"expected a manifest in JSON, found {data[:40]!r}: {error}") from None
        return _checked(Manifest(tuple(_group(item) for item in _list(tree, "the whole"))))


def _list(value: object, what: str, length: int | None = None) -> list[object]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        of = "" if length is None else f" of {length}"
        raise ProtocolError(f"manifest: expected a list{of} for {what}, found {str(value)[:60]!r}")
    return value


def _name(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"manifest: expected a string for the name of {what}, found {str(value)[:60]!r}")
    return value


def _group(item: object) -> Group:
    name, tensors = _list(item, "a group", 2)
    return Group(_name(name, "a group"), tuple(_spec(tensor) for tensor in _list(tensors, "the tensors of a group")))


def _spec(item: object) -> Spec:
    given, shape, dtype = _list(item, "a tensor", 3)
    name = _name(given, "a tensor")
    sizes = [size for size in _list(shape, f"the shape of {name[:60]!r}") if type(size) is int and size >= 0]
    if sizes != shape or len(sizes) > MAX_DIMENSIONS:
        raise ProtocolError(f"manifest: expected <= {MAX_DIMENSIONS} sizes for {name[:60]!r}, found {str(shape)[:60]}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError(f"manifest: expected a dtype of {', '.join(_DTYPES)} for {name[:60]!r}, found {dtype!r}")
    return Spec(name, tuple(sizes), dtype)


def _checked(manifest: Manifest) -> Manifest:
    """Names are unique over all groups, since tensors are found by name, and the whole is of a possible size."""
    names = [spec.name for group in manifest.groups for spec in group.tensors]
    for what, given in (("tensor", names), ("group", [group.name for group in manifest.groups])):
        if len(set(given)) != len(given):
            twice = next(name for index, name in enumerate(given) if name in given[:index])
            raise ProtocolError(f"manifest: expected each {what} name once, found {twice!r} twice")
    if manifest.num_bytes > MAX_BYTES:
        raise ProtocolError(f"manifest: expected at most {MAX_BYTES} bytes, found {manifest.num_bytes}")
    return manifest


def manifest_of(tensors: Mapping[str, torch.Tensor], group: str = "adapter") -> Manifest:
    """The manifest of named tensors in the order of their names: those of `control/...` are a group of it, others `group`."""
    groups: dict[str, list[Spec]] = {group: []}
    for name, tensor in sorted(tensors.items()):
        spec = Spec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if spec.dtype not in _DTYPES:
            raise ProtocolError(f"{spec.name!r} is {spec.dtype}; expected one of {', '.join(_DTYPES)}")
        own, slash, _ = name.partition("/")
        groups.setdefault(own if slash and own.isidentifier() else group, []).append(spec)
    return _checked(Manifest(tuple(Group(name, tuple(specs)) for name, specs in groups.items())))


class Packed:
    """The tensors' elements as the manifest has them, put together only where a slice is asked for; in place where they lie so."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
        specs = {spec.name: spec for spec, _ in manifest.places}
        if tensors.keys() != specs.keys():
            odd = sorted(tensors.keys() ^ specs.keys())
            raise ProtocolError(f"expected the manifest's {len(specs)} tensors, found {len(tensors)}; differing: {odd[:5]}")
        for name, tensor in tensors.items():
            if (tuple(tensor.shape), str(tensor.dtype)) != (specs[name].shape, f"torch.{specs[name].dtype}"):
                found = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ProtocolError(f"{name!r}: expected {specs[name].shape} {specs[name].dtype}, found {found}")
        self._tensors, self._manifest = tensors, manifest
        self._whole = _in_place(tensors, manifest)

    def __len__(self) -> int:
        return self._manifest.num_bytes

    def __getitem__(self, place: slice) -> memoryview:
        start, stop, _ = place.indices(len(self))
        view: memoryview = self.buffer(start, stop).numpy().data
        return view

    def buffer(self, start: int, stop: int) -> torch.Tensor:
        """The bytes of a slice, as a tensor."""
        if self._whole is not None:
            return self._whole[start:stop]
        made = room(stop - start, torch.uint8, to_lend=True)
        places = self._manifest.places
        for spec, there in places[bisect_right(places, start, key=lambda one: one[1].stop) :]:
            if there.start >= stop:
                break
            low, high = max(start, there.start), min(stop, there.stop)
            elements = self._tensors[spec.name].detach().reshape(-1).view(torch.uint8)
            made[low - start : high - start].copy_(elements[low - there.start : high - there.start])
        return made


def _in_place(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> torch.Tensor | None:
    """The bytes of tensors that lie just as the manifest has them, as those of a mean do; None where they are to be packed."""
    if not manifest.num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    first = tensors[manifest.places[0][0].name]
    storage = first.untyped_storage()
    for spec, place in manifest.places:
        tensor = tensors[spec.name]
        together = tensor.untyped_storage().data_ptr() == storage.data_ptr() and tensor.is_contiguous()
        if not together or tensor.is_cuda or (tensor.numel() and tensor.data_ptr() != first.data_ptr() + place.start):
            return None
    start = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (manifest.num_bytes,), (1,))


def unpack(buffer: torch.Tensor, manifest: Manifest) -> Tensors:
    """Named views into `buffer`; they live as long as it does."""
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() != manifest.num_bytes:
        found = f"{tuple(buffer.shape)} {buffer.dtype}"
        raise ProtocolError(f"expected a flat uint8 buffer of {manifest.num_bytes} bytes, found {found}")
    if buffer.data_ptr() % 8 or buffer.storage_offset() % 8:
        raise ProtocolError("expected a buffer that begins on a multiple of 8 bytes")
    views: Tensors = {}
    for dtype, run in groupby(manifest.places, key=lambda place: place[0].dtype):
        specs, places = zip(*run, strict=True)
        piece = buffer[places[0].start : places[-1].stop].view(_DTYPES[dtype])
        parts = torch.split_with_sizes(piece, [math.prod(spec.shape) for spec in specs])  # one call for many tensors
        views.update({spec.name: part.view(spec.shape) for spec, part in zip(specs, parts, strict=True)})
    return views
