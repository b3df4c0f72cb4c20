"""Coding: tensors under a codec chain, a message at a time, and what a chain has to remember from one message to the next.

A message is cut into chunks of `CHUNK` values, each coded apart; its bytes are those of the chunks, each behind its length. The
size of a chunk is part of what the bytes mean, so it is the same in every placement. What is decoded is the truth for both sides:
the sender gets it back and goes on from it.

`delta` is taken up against the round's broadcast, which both sides hold, and down against the broadcast before, of which the
server knows who holds it: whoever does not gets the values as they are. What `ef` feeds back belongs to the sender: the server's
is part of its state, a client's of the state that the client owns. Either counts only if the round does.

This module must never know links, or what the tensors are.
"""

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import xxhash

from fedmpi.codecs import Chain
from fedmpi.codecs.coder import Coder
from fedmpi.errors import ProtocolError, TrainingError
from fedmpi.manifest import Manifest, Packed, manifest_of, unpack
from fedmpi.round import Round, Verdict
from fedmpi.seeding import seed_for
from fedmpi.tensors import Tensors

CHUNK = 1 << 18
OWNED = "codec/"  # before the names of a client's residuals, in the state that it owns
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Coded:
    """A message: its bytes, what they are decoded to, what was lost by that, and the state that they follow."""

    manifest: Manifest
    body: bytearray
    tensors: Tensors
    lost: Tensors = field(default_factory=dict)
    against: int = 0


def encode(chain: Chain, tensors: Tensors, seed: int, before: Tensors, lost: Tensors) -> Coded:
    """The message of these tensors: against `before` where the chain says delta, with what was `lost` where it says ef."""
    manifest, coder = manifest_of(tensors), Coder(chain)
    _only_float32(manifest, chain)
    values = _flat(tensors, manifest).clone()
    origin = _of(before, manifest) if chain.delta else None
    if origin is not None:
        values -= origin
    if chain.feedback:
        values += _of(lost, manifest)
    body, decoded = bytearray(), torch.empty_like(values)
    for number, (part, into) in enumerate(zip(torch.split(values, CHUNK), torch.split(decoded, CHUNK), strict=True)):
        data = coder.encode(part, seed_for(seed, number))
        body += _LENGTH.pack(len(data)) + data
        into.copy_(coder.decode(data, len(part)))
    residual = unpack((values - decoded).view(torch.uint8), manifest) if chain.feedback else {}
    if origin is not None:
        decoded += origin
    against = fingerprint(before) if chain.delta else 0
    return Coded(manifest, body, unpack(decoded.view(torch.uint8), manifest), residual, against)


def decode(chain: Chain, body: memoryview, manifest: Manifest, before: Tensors, against: int) -> Tensors:
    """What a message says; a ProtocolError where it is not a message of this chain, or follows another state than `before`."""
    coder = Coder(chain)
    _only_float32(manifest, chain)
    if chain.delta and against != (held := fingerprint(before)):
        raise ProtocolError(f"a difference from the state {against:016x} cannot be used: {held:016x} is held here")
    values = torch.empty(manifest.num_bytes // 4)
    for part, data in zip(torch.split(values, CHUNK), _chunks(body, -(-len(values) // CHUNK)), strict=True):
        part.copy_(coder.decode(data, len(part)))
    if chain.delta:
        values += _of(before, manifest)
    return unpack(values.view(torch.uint8), manifest)


def most_bytes(chain: Chain, manifest: Manifest) -> int:
    """The longest message of these tensors."""
    whole, rest = divmod(manifest.num_bytes // 4, CHUNK)
    coder = Coder(chain)
    return whole * (coder.most_bytes(CHUNK) + _LENGTH.size) + coder.most_bytes(rest) + _LENGTH.size


def fingerprint(tensors: Tensors) -> int:
    """64 bits that differ when names, shapes or any value do."""
    manifest = manifest_of(tensors)
    return xxhash.xxh3_64_intdigest(Packed(tensors, manifest)[:], seed=manifest.hash)


def _chunks(body: memoryview, num: int) -> Iterator[memoryview]:
    start = 0
    for number in range(num):
        if len(body) - start < _LENGTH.size:
            raise ProtocolError(f"a coded message ends before chunk {number} of {num}")
        (length,) = _LENGTH.unpack(body[start : start + _LENGTH.size])
        start += _LENGTH.size + length
        if start > len(body):
            raise ProtocolError(f"chunk {number} of {num} claims {length} bytes, {len(body) - start + length} are left")
        yield body[start - length : start]
    if start != len(body):
        raise ProtocolError(f"{len(body) - start} bytes follow the last chunk of a coded message")


def _flat(tensors: Tensors, manifest: Manifest) -> torch.Tensor:
    return Packed(tensors, manifest).buffer(0, manifest.num_bytes).view(torch.float32)


def _of(known: Tensors, manifest: Manifest) -> torch.Tensor:
    """The values that are known of a manifest's tensors; zero where none are, or of another shape."""
    found = {}
    for spec, _ in manifest.places:
        there = known.get(spec.name)
        found[spec.name] = there if there is not None and tuple(there.shape) == spec.shape else torch.zeros(spec.shape)
    return _flat(found, manifest)


def _only_float32(manifest: Manifest, chain: Chain) -> None:
    odd = next((spec for spec, _ in manifest.places if spec.dtype != "float32"), None)
    if odd is not None:
        raise TrainingError(f"a codec takes float32 values, {odd.name} is {odd.dtype}: give codec raw")


@dataclass
class Downlink:
    """The server's side of broadcasts: codes each once, and knows what it goes on from and who can read it."""

    chain: Chain
    before: Tensors = field(default_factory=dict)  # the last broadcast that counted, where the chain says delta
    lost: Tensors = field(default_factory=dict)
    _made: Coded | None = None
    _round: int = -1
    _holds: dict[int, int] = field(default_factory=dict)  # by holder: which broadcast it had last

    def encode(self, tensors: Tensors, rnd: Round) -> Coded:
        """The round's broadcast."""
        self._made = encode(self.chain, tensors, seed_for(rnd.seed, "broadcast"), self.before, self.lost)
        self._round = rnd.index
        return self._made

    def readers(self, holders: Collection[int]) -> set[int]:
        """Those of the holders that can read the message; from now on all of them hold what it says."""
        assert self._made is not None
        if not self.chain.delta:
            return set(holders)
        able = {holder for holder in holders if self._holds.get(holder) == self._made.against}
        self._holds.update(dict.fromkeys(holders, fingerprint(self._made.tensors)))
        return able

    def settle(self, rnd: Round) -> None:
        """A round that counted is gone on from; one that did not is as if it had not been."""
        if rnd.verdict is Verdict.COUNTED and self._made is not None:
            self.before, self.lost = self._after(self._made)
        self._made = None

    def saved(self, round_index: int) -> Tensors:
        """What a run needs to go on after this round."""
        now = self._made is not None and round_index == self._round
        before, lost = self._after(self._made) if now and self._made is not None else (self.before, self.lost)
        return {f"before/{name}": t for name, t in before.items()} | {f"lost/{name}": t for name, t in lost.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `saved` gave."""
        for part, into in (("before/", self.before), ("lost/", self.lost)):
            into.update({name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)})

    def _after(self, made: Coded) -> tuple[Tensors, Tensors]:
        return (made.tensors if self.chain.delta else {}), made.lost
