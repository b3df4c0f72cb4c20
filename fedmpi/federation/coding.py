"""Coding: tensors under codec chains, chunk by chunk, and what a chain has to remember from one message to the next.

A message is cut into chunks of `CHUNK` values; of each, the part of every tensor group is coded apart under that group's chain. A
chunk is encoded when its turn comes to be sent and decoded when it has come, so that all of it goes on at once and nobody holds a
whole coded message. The size of a chunk is part of what the bytes mean, so it is the same in every placement. What is decoded is
the truth for both sides: a sender that must know it gets it on the way. For several senders one thread encodes, since malloc keeps
what each thread has worked in.

`delta` is taken up against the round's broadcast, which both sides hold, and down against the broadcast before, of which the
server knows who holds it: whoever does not gets the values as they are. What `ef` feeds back belongs to the sender: the server's
is part of its state, a client's of the state that the client owns. Either counts only if the round does.

This module must never know links, or what the tensors are.
"""

import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fedmpi.codecs import Chain, Chains
from fedmpi.codecs.coder import Coder
from fedmpi.errors import ProtocolError, TrainingError
from fedmpi.federation.known import Known, Parked, parked
from fedmpi.manifest import Manifest, Packed, manifest_of, unpack
from fedmpi.messages import chunks
from fedmpi.round import Round, Verdict
from fedmpi.seeding import seed_for
from fedmpi.tensors import Tensors, part, prefixed, room

CHUNK = 1 << 18
CHUNK_BYTES = 4 * CHUNK
NUM_KEPT = 32  # coded chunks that wait for slower receivers; one that is slower still has them coded again, to the same bytes
OWNED = "codec/"  # before the names of a client's residuals, in the state that it owns
_LENGTH = struct.Struct("<I")
State = Known | Parked
NOTHING = Known()


@dataclass(frozen=True)
class Code:
    """How the values of one manifest's tensors are coded: which chain has which of them."""

    chains: Chains
    manifest: Manifest

    def __post_init__(self) -> None:
        """Refuse what no chain can take, and chains that nothing here is for."""
        odd = next((spec for spec, _ in self.manifest.places if spec.dtype != "float32"), None)
        if odd is not None:
            raise TrainingError(f"a codec takes float32 values, {odd.name} is {odd.dtype}: give codec raw")

    def runs(self, place: slice) -> Iterator[tuple[Chain, slice]]:
        """The parts of a chunk, given by bytes, that belong to one group each, as slices of its values."""
        for name, span in self.manifest.spans:
            low, high = max(place.start, span.start), min(place.stop, span.stop)
            if low < high:
                yield self.chains.of(name), slice((low - place.start) // 4, (high - place.start) // 4)

    def most_bytes(self, place: slice) -> int:
        """The most that a chunk can take."""
        runs = list(self.runs(place))
        return sum(Coder(chain).most_bytes(run.stop - run.start) for chain, run in runs) + _LENGTH.size * (len(runs) - 1)

    def encode(self, place: slice, values: torch.Tensor, seed: int) -> memoryview:
        """The bytes of a chunk's values; where it has parts of several groups, each but the last comes behind its length."""
        coded = [Coder(chain).encode(values[run], seed_for(seed, place.start // CHUNK_BYTES)) for chain, run in self.runs(place)]
        if len(coded) == 1:
            return coded[0]
        return memoryview(b"".join(b"".join((_LENGTH.pack(len(data)), data)) for data in coded[:-1]) + bytes(coded[-1]))

    def decode(self, place: slice, data: memoryview) -> torch.Tensor:
        """The values of a chunk; a ProtocolError where these are not the bytes of one."""
        runs = list(self.runs(place))
        found = []
        for chain, run in runs[:-1]:
            (length,) = _LENGTH.unpack(data[: _LENGTH.size]) if len(data) >= _LENGTH.size else (1 << 32,)
            if length > len(data) - _LENGTH.size:
                raise ProtocolError(f"a part of a coded chunk claims {length} bytes, {len(data)} are left")
            found.append(Coder(chain).decode(data[_LENGTH.size : _LENGTH.size + length], run.stop - run.start))
            data = data[_LENGTH.size + length :]
        chain, run = runs[-1]
        found.append(Coder(chain).decode(data, run.stop - run.start))
        return found[0] if len(found) == 1 else torch.cat(found)


class Encoding:
    """One message, as a payload: a chunk is encoded when somebody first comes to it. Several threads may send it at once."""

    def __init__(
        self,
        chains: Chains,
        tensors: Tensors,
        seed: int,
        before: State,
        lost: State = NOTHING,
        told: bool = False,
        maker: ThreadPoolExecutor | None = None,
        park: Callable[[Manifest], Parked] | None = None,
    ) -> None:
        """Against `before` where a chain says delta, with what was `lost` where it says ef; `told` keeps what will be decoded.

        Chunks are encoded by `maker`, else by who asks for them. What the message does not say is left in memory, unless `park`
        gives a place for it.
        """
        self.manifest = manifest_of(tensors)
        self.code = Code(chains, self.manifest)
        self.against = before.fingerprint if chains.delta else 0
        self.num_bytes = 0  # of what has been encoded
        self._seed, self._values = seed, Packed(tensors, self.manifest)
        self._origin = before.over(self.manifest) if chains.delta else None
        self._lost = lost.over(self.manifest) if chains.feedback else None
        self.parked = park(self.manifest) if chains.feedback and park is not None else None
        in_memory = chains.feedback and park is None
        self._residual = room(self.manifest.num_bytes // 4, torch.float32) if in_memory else None
        self._maker = maker
        self._decoded = room(self.manifest.num_bytes // 4, torch.float32, to_lend=True) if told else None  # also sent as it is
        self._places = list(chunks(self.manifest.num_bytes, CHUNK_BYTES))
        self._num_made, self._kept = 0, dict[int, memoryview]()
        self._lock = threading.Lock()
        for place in self._places:  # before the first byte has left
            meant = self._meant(place)
            for chain, run in self.code.runs(place):
                Coder(chain).require(meant[run])

    def __len__(self) -> int:
        return self.manifest.num_bytes

    def __getitem__(self, place: slice) -> memoryview:
        number = place.start // CHUNK_BYTES
        with self._lock:
            if number in self._kept:
                return self._kept[number]
            return self._make(number) if self._maker is None else self._maker.submit(self._make, number).result()

    def finished(self) -> "Encoding":
        """This, once every chunk has been encoded, whoever has asked for it."""
        while self._num_made < len(self._places):
            with self._lock:
                self._make(self._num_made)
        self._kept.clear()
        return self

    @property
    def tensors(self) -> Tensors:
        """What the message is decoded to, once it is finished; nothing where nobody asked to be told."""
        return {} if self._decoded is None else unpack(self._decoded.view(torch.uint8), self.manifest)

    @property
    def lost(self) -> Tensors:
        """What it does not say, where that is fed back."""
        if self._residual is None:
            return {} if self.parked is None else _fed_back(self.code.chains, self.parked.tensors)
        return _fed_back(self.code.chains, unpack(self._residual.view(torch.uint8), self.manifest))

    def _make(self, number: int) -> memoryview:
        place = self._places[number]
        meant = self._meant(place)
        data = self.code.encode(place, meant, self._seed)
        if number == self._num_made:
            self._note(place, meant, data)
            self._num_made, self.num_bytes = number + 1, self.num_bytes + len(data)
        self._kept[number] = data
        if len(self._kept) > NUM_KEPT:
            del self._kept[min(self._kept)]
        return data

    def _note(self, place: slice, meant: torch.Tensor, data: memoryview) -> None:
        """What this chunk will be decoded to, and what that lacks."""
        if self._residual is None and self.parked is None and self._decoded is None:
            return
        values, there = self.code.decode(place, data), slice(place.start // 4, place.stop // 4)
        if self._residual is not None:
            torch.sub(meant, values, out=self._residual[there])
        if self.parked is not None:
            self.parked.put(place, (meant - values).numpy().data.cast("B"))
        if self._decoded is not None:
            self._decoded[there] = _undone(self.code, place, values, self._origin)

    def _meant(self, place: slice) -> torch.Tensor:
        """The values of a chunk as its chains take them up: differences, with what was lost before."""
        values = _chunk(self._values, place)
        if self._origin is None and self._lost is None:
            return values
        meant = values.clone()
        for chain, run in self.code.runs(place):
            if chain.delta and self._origin is not None:
                meant[run] -= _chunk(self._origin, place)[run]
            if chain.feedback and self._lost is not None:
                meant[run] += _chunk(self._lost, place)[run]
        return meant


class Decoding:
    """What the chunks of one message say, given the state that it follows."""

    def __init__(self, chains: Chains, manifest: Manifest, before: State, against: int) -> None:
        if chains.delta and against != before.fingerprint:
            raise ProtocolError(
                f"a difference from the state {against:016x} cannot be used: {before.fingerprint:016x} is held here"
            )
        self.manifest = manifest
        self._code = Code(chains, manifest)
        self._origin = before.over(manifest) if chains.delta else None

    def values(self, place: slice, data: memoryview) -> torch.Tensor:
        """The flat values of the chunk at this place."""
        return _undone(self._code, place, self._code.decode(place, data), self._origin)


def _fed_back(chains: Chains, tensors: Tensors) -> Tensors:
    """Those of the tensors whose chain says ef."""
    groups = manifest_of(tensors).groups
    return {spec.name: tensors[spec.name] for group in groups if chains.of(group.name).feedback for spec in group.tensors}


def _undone(code: Code, place: slice, values: torch.Tensor, origin: Packed | Parked | None) -> torch.Tensor:
    if origin is not None:
        for chain, run in code.runs(place):
            if chain.delta:
                values[run] += _chunk(origin, place)[run]
    return values


def _chunk(packed: Packed | Parked, place: slice) -> torch.Tensor:
    return packed.buffer(place.start, place.stop).view(torch.float32)


@dataclass
class Downlink:
    """The server's side of broadcasts: codes each once, and knows what it goes on from and who can read it."""

    chains: Chains
    before: State = NOTHING  # the last broadcast that counted, where a chain says delta
    lost: State = NOTHING  # and what it could not say
    scratch: Path | None = None  # where both wait while the next broadcast is under way
    _maker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "encode"))
    _made: Encoding | None = None
    _round: int = -1
    _holds: dict[int, int] = field(default_factory=dict)  # by holder: which broadcast it had last

    def encode(self, tensors: Tensors, rnd: Round) -> Encoding:
        """The round's broadcast, ready to be sent. What it goes on from is needed once more only if the round does not count."""
        known = self.before.fingerprint if self.chains.delta else 0
        self.before, self.lost = parked(self.before, self.scratch, known), parked(self.lost, self.scratch)
        seed, park = seed_for(rnd.seed, "broadcast"), partial(Parked, scratch=self.scratch)
        self._made = Encoding(self.chains, tensors, seed, self.before, self.lost, True, self._maker, park)
        self._round = rnd.index
        return self._made

    def readers(self, holders: Collection[int]) -> set[int]:
        """Those of the holders that can read the message."""
        assert self._made is not None
        return {holder for holder in holders if not self.chains.delta or self._holds.get(holder) == self._made.against}

    def told(self, holders: Collection[int]) -> None:
        """From now on these hold what the message says."""
        if self.chains.delta and self._made is not None:
            self._holds.update(dict.fromkeys(holders, Known(self._made.tensors).fingerprint))

    def forget(self, holder: int) -> None:
        """A rank has joined anew: it holds nothing."""
        self._holds.pop(holder, None)

    def settle(self, rnd: Round) -> None:
        """A round that counted is gone on from; one that did not is as if it had not been."""
        if rnd.verdict is Verdict.COUNTED and self._made is not None:
            self.before, self.lost = self._after(self._made)
        self._made = None

    def saved(self, round_index: int) -> Tensors:
        """What a run needs to go on after this round."""
        now = self._made is not None and round_index == self._round
        before, lost = self._after(self._made) if now and self._made is not None else (self.before, self.lost)
        return prefixed("before/", before.tensors) | prefixed("lost/", _fed_back(self.chains, lost.tensors))

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `saved` gave."""
        self.before, self.lost = Known(part(tensors, "before/")), Known(part(tensors, "lost/"))

    def _after(self, made: Encoding) -> tuple[State, State]:
        return Known(made.tensors if self.chains.delta else {}), made.parked or NOTHING
