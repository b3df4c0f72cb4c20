"""States that coded messages refer to: in memory while somebody works with them, in scratch space while they only have to last.

A server holds several adapters anyway while it adds updates up. The state that it would return to, should the round not count, need
not be one more: it is read chunk by chunk. This module must never know links, chains, or what the tensors are.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from weakref import finalize

import torch
import xxhash

from fedmpi.aggregation.scratch import Scratch
from fedmpi.manifest import Manifest, Packed, manifest_of, unpack
from fedmpi.messages import chunks
from fedmpi.tensors import Tensors, room

PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Known:
    """A state in memory."""

    tensors: Tensors = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> int:
        """64 bits that differ when names, shapes or any value do."""
        manifest = manifest_of(self.tensors)
        return xxhash.xxh3_64_intdigest(Packed(self.tensors, manifest)[:], seed=manifest.hash)

    def over(self, manifest: Manifest) -> "Packed | None":
        """The values that are known of a manifest's tensors; zero where none are, or of another shape; None where nothing is."""
        if not self.tensors:
            return None
        found = {}
        for spec, _ in manifest.places:
            there = self.tensors.get(spec.name)
            found[spec.name] = there if there is not None and tuple(there.shape) == spec.shape else torch.zeros(spec.shape)
        return Packed(found, manifest)


class Parked:
    """A state in scratch space, once all of it was put there."""

    def __init__(self, manifest: Manifest, scratch: Path | None, fingerprint: int = 0) -> None:
        self.fingerprint, self._manifest = fingerprint, manifest
        self._scratch = Scratch(scratch)
        self._scratch.claim(manifest.num_bytes)
        finalize(self, self._scratch.close)

    def put(self, place: slice, data: memoryview) -> None:
        """The bytes of a slice."""
        self._scratch.write(place.start, data, self._manifest.num_bytes)

    @property
    def tensors(self) -> Tensors:
        """All of it, in memory."""
        return unpack(self.buffer(0, self._manifest.num_bytes), self._manifest)

    def over(self, manifest: Manifest) -> "Packed | Parked | None":
        """As of a state in memory."""
        return self if manifest.hash == self._manifest.hash else Known(self.tensors).over(manifest)

    def buffer(self, start: int, stop: int) -> torch.Tensor:
        """The bytes of a slice, as a tensor."""
        found = room(stop - start, torch.uint8)
        self._scratch.read(start, found.numpy().data)
        return found


def parked(state: Known | Parked, scratch: Path | None, fingerprint: int = 0) -> Known | Parked:
    """The same out of memory, unless there is nothing of it."""
    if isinstance(state, Parked) or not state.tensors:
        return state
    manifest = manifest_of(state.tensors)
    packed, made = Packed(state.tensors, manifest), Parked(manifest, scratch, fingerprint)
    for place in chunks(manifest.num_bytes, PIECE_BYTES):
        made.put(place, packed[place])
    return made
