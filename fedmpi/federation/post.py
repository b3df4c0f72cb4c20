"""The post: JSON and named tensors as messages over a transport; tensors go as one payload under a manifest that both sides know.

What a receiver does with tensors decides how it takes them: `tensors` and `keep` want a whole message, `pieces` a part of one
as well. It knows links and messages; never rounds' meaning, clients' work or what is trained.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from fedmpi.codecs import Chains
from fedmpi.errors import LinkError, ProtocolError
from fedmpi.federation.coding import CHUNK_BYTES, Decoding, Encoding
from fedmpi.federation.known import Known
from fedmpi.manifest import Manifest, Packed, manifest_of, unpack
from fedmpi.messages import STREAM, Header, Kind, Payload
from fedmpi.tensors import Tensors, room
from fedmpi.transports.base import Transport
from fedmpi.transports.inbox import Message

MOST_JSON_BYTES = 1 << 20
NOBODY: Mapping[int, Collection[int]] = {}


class Post:
    """One rank's letters. A manifest is sent before its first use on a link and known by its hash from then on."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        transport.in_chunks = frozenset({Kind.UPDATE})  # until it is known that they are wanted whole
        self._manifests: dict[int, Manifest] = {}
        self._told: set[tuple[int, int]] = set()  # (peer, hash) that this rank has announced
        self._last: tuple[tuple[object, ...], Manifest] | None = None
        self.on_lost: Callable[[], None] | None = None  # told of a failed sending, which then is no error
        self._leaving: list[tuple[set[int], Callable[[], Mapping[int, LinkError]]]] = []  # behind what this rank does, and to whom

    def receive(self, peers: Collection[int], phase: str) -> Message:
        """The next message of any of these peers, manifests aside: those are learnt on the way."""
        while True:
            with self.apart():
                message = self.transport.receive(peers, phase)
            if message.header.kind is not Kind.MANIFEST:
                return message
            self._learn(message)

    def expect(self, peer: int, kind: Kind, round_index: int, phase: str) -> Message:
        """The next message of this peer, which must be of this kind and round."""
        return self.expected(self.receive({peer}, phase), kind, round_index)

    def expected(self, message: Message, kind: Kind, round_index: int) -> Message:
        """This message, which must be of this kind and round."""
        header = message.header
        if header.kind is not kind or header.round != round_index:
            raise ProtocolError(
                f"rank {message.peer} sent {header.kind.name} of round {header.round}, expected {kind.name} of round {round_index}"
            )
        return message

    def send_bytes(self, peers: Collection[int], kind: Kind, content: bytes, round_index: int = -1, client: int = -1) -> None:
        """The same bytes to each of these peers."""
        self._send(peers, Header(kind, round_index, client, len(content)), memoryview(content))

    def send_json(self, peer: int, kind: Kind, value: Mapping[str, Any], round_index: int = -1, client: int = -1) -> None:
        """One small object."""
        self.send_bytes((peer,), kind, json.dumps(value).encode(), round_index, client)

    def send_tensors(
        self,
        peers: Collection[int],
        kind: Kind,
        tensors: Tensors,
        round_index: int,
        client: int = -1,
        note: Mapping[str, Any] | None = None,
        behind: bool = False,
        told: Mapping[int, Collection[int]] | None = None,
    ) -> Tensors:
        """Tensors, and one small object before them, to each of these peers; gives back what they will decode.

        To one peer, chunks are put together on the way; for several, before it, lest each of them has its own. Where they may leave
        behind other work, they must not change until `all_left`. Once a peer has them, those it is `told` for hear an empty word.
        """
        manifest = self.manifest_of(tensors)
        for peer in peers:
            self._announce(peer, manifest)
        header = Header(kind, round_index, client, manifest.num_bytes, manifest.hash)
        said = b"" if note is None else json.dumps(note).encode()
        packed: Payload = Packed(tensors, manifest)
        self._send(peers, header, packed if len(peers) == 1 else packed[: len(packed)], said, behind, told or {})
        return tensors  # raw bytes are decoded to what they were

    def send_coded(
        self, peers: Collection[int], coded: Encoding, round_index: int, client: int = -1, note: Mapping[str, Any] | None = None
    ) -> None:
        """A message under codec chains, coded as it leaves, and one small object before it that also says what it follows."""
        for peer in peers:
            self._announce(peer, coded.manifest)
        header = Header(Kind.CODED, round_index, client, len(coded), coded.manifest.hash, STREAM if len(coded) else 0, CHUNK_BYTES)
        said = {**(note or {}), "against": coded.against}
        self._send(peers, header, coded, json.dumps(said).encode())

    def send_note(
        self, peers: Collection[int], kind: Kind, manifest: Manifest, round_index: int, client: int, note: Mapping[str, Any]
    ) -> None:
        """One small object about tensors of this manifest, which do not come with it."""
        for peer in peers:
            self._announce(peer, manifest)
        self._send(peers, Header(kind, round_index, client, 0, manifest.hash), memoryview(b""), json.dumps(note).encode())

    def promised(self, message: Message) -> Manifest:
        """The manifest of what a note is about."""
        return self._known(message)

    def decoding(self, message: Message, chains: Chains, before: Known) -> Decoding:
        """What the parts of a coded message, of which this is the first, are decoded by."""
        header, manifest = message.header, self.manifest(message)
        if header.length and (header.flags, header.chunk_bytes) != (STREAM, CHUNK_BYTES):
            raise ProtocolError(f"rank {message.peer} sent CODED in chunks of {header.chunk_bytes} bytes, expected {CHUNK_BYTES}")
        against = self.note(message).get("against")
        return Decoding(chains, manifest, before, against if isinstance(against, int) else 0)

    def decode(self, message: Message, chains: Chains, before: Known, phase: str) -> Tensors:
        """The tensors of a coded message of which this is the first part, in memory of their own. The others are awaited."""
        decoding = self.decoding(message, chains, before)
        values = room(decoding.manifest.num_bytes // 4, torch.float32)
        while True:
            values[message.first // 4 : message.stop // 4] = decoded(decoding, message)
            message.release()
            if message.last:
                return unpack(values.view(torch.uint8), decoding.manifest)
            message = self.receive({message.peer}, phase)

    def manifest_of(self, tensors: Tensors) -> Manifest:
        """That of the tensors sent last, where these are alike: making one takes longer than sending a small adapter."""
        layout = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if self._last is None or self._last[0] != layout:
            self._last = (layout, manifest_of(tensors))
        return self._last[1]

    def keep(self, message: Message) -> Tensors:
        """The tensors of a message, in memory that is the caller's from now on."""
        message.keep()
        return self.tensors(message)

    def tensors(self, message: Message) -> Tensors:
        """The tensors of a message, as views of its buffer: they live until the message is released."""
        body = message.payload if message.payload is not None else torch.empty(0, dtype=torch.uint8)
        return unpack(body, self.manifest(message))

    def pieces(self, message: Message) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements of a message, or of a part of one, as flat views of its buffer, each with how many come before it."""
        manifest = self.manifest(message)
        if message.payload is not None:
            yield from manifest.cut(message.payload, message.first)

    def manifest(self, message: Message) -> Manifest:
        """What the message says that it is sent under."""
        manifest, length = self._known(message), message.header.length
        if manifest.num_bytes != length:
            raise ProtocolError(f"rank {message.peer} sent {length} bytes, its manifest says {manifest.num_bytes}")
        return manifest

    def _known(self, message: Message) -> Manifest:
        header = message.header
        manifest = self._manifests.get(header.manifest)
        if manifest is None:
            raise ProtocolError(
                f"rank {message.peer} sent {header.kind.name} under manifest {header.manifest:x}, which it never announced"
            )
        return manifest

    def json(self, message: Message) -> dict[str, Any]:
        """The object that is a message."""
        return self._object(message, content(message))

    def note(self, message: Message) -> dict[str, Any]:
        """The object that came before the payload of a message."""
        return self._object(message, message.note)

    def _object(self, message: Message, said: bytes) -> dict[str, Any]:
        try:
            value = json.loads(said) if len(said) <= MOST_JSON_BYTES else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ProtocolError(
                f"rank {message.peer} sent {message.header.kind.name} without a JSON object of at most {MOST_JSON_BYTES} bytes"
            )
        return value

    def from_each(self, kind: Kind, phase: str, peers: Collection[int] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """One object of this kind from each of these peers (all of them without), as they come."""
        missing = set(self.transport.peers if peers is None else peers)
        while missing:
            message = self.receive(missing, phase)
            if message.header.kind is not kind:
                raise ProtocolError(f"rank {message.peer} sent {message.header.kind.name}, expected {kind.name}")
            missing.discard(message.peer)
            yield message.peer, self.json(message)

    def num_bytes(self) -> int:
        """All bytes that this rank has sent and received so far, heartbeats aside."""
        traffic = (*self.transport.sent.values(), *self.transport.received.values(), *self.transport.past)
        return sum(way.payload_bytes + way.header_bytes for way in traffic)

    def _send(
        self,
        peers: Collection[int],
        header: Header,
        payload: Payload,
        note: bytes = b"",
        behind: bool = False,
        told: Mapping[int, Collection[int]] = NOBODY,
    ) -> None:
        """Peers hear in the order in which they are spoken to."""
        reached = {*peers, *chain.from_iterable(told.values())}
        if any(reached & busy for busy, _ in self._leaving):
            self.all_left()
        word = Header(header.kind, header.round, header.client)
        tell = (lambda peer: self.transport.send_all(told.get(peer, ()), word)()) if any(told.values()) else None
        with self.apart():
            left = self.transport.send_all(peers, header, payload, note, behind, tell)
        if behind:
            self._leaving.append((reached, left))
        else:
            self._lost(left)

    def all_left(self) -> set[int]:
        """Return when nothing is under way any more; gives the peers that are known not to have got all."""
        lost: set[int] = set()
        while self._leaving:
            lost |= self._lost(self._leaving.pop(0)[1])
        return lost

    def _lost(self, left: Callable[[], Mapping[int, LinkError]]) -> set[int]:
        """Wait for the end of a message; the peers that it will not reach, where that is no error."""
        with self.apart():
            failed = left()
        for error in failed.values():
            if self.on_lost is None:
                raise error
            self.on_lost()
        return set(failed)

    def alarm(self, peer: int, kind: Kind, text: str, round_index: int, client: int) -> None:
        """A few words from any thread, while the one that the post belongs to may do whatever it does."""
        self.transport.send(peer, Header(kind, round_index, client), memoryview(text.encode()))

    def forget(self, peer: int) -> None:
        """Somebody new is at the other end: nothing was announced yet."""
        self._told = {(told, manifest) for told, manifest in self._told if told != peer}

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Step back while waiting: ranks that are threads of one process compute in turns (torch's generator is global)."""
        turn = self.transport.turn
        turn.__exit__(None, None, None)
        try:
            yield
        finally:
            turn.__enter__()

    def _announce(self, peer: int, manifest: Manifest) -> None:
        self._manifests[manifest.hash] = manifest
        if (peer, manifest.hash) in self._told:
            return
        said = manifest.to_json()
        self._send((peer,), Header(Kind.MANIFEST, -1, -1, len(said), manifest.hash), memoryview(said))
        self._told.add((peer, manifest.hash))

    def _learn(self, message: Message) -> None:
        manifest = Manifest.from_json(content(message))
        if manifest.hash != message.header.manifest:
            raise ProtocolError(f"rank {message.peer} announced manifest {message.header.manifest:x} and sent {manifest.hash:x}")
        self._manifests[manifest.hash] = manifest
        self._told.add((message.peer, manifest.hash))


def decoded(decoding: Decoding, message: Message) -> torch.Tensor:
    """The flat values of one part of a coded message."""
    if message.payload is None:
        return torch.empty(0)
    return decoding.values(slice(message.first, message.stop), message.payload.numpy().data)


def content(message: Message) -> bytes:
    """A message's payload as bytes of its own; its buffer is free again."""
    said = b"" if message.payload is None else message.payload.numpy().tobytes()
    message.release()
    return said
