"""The post: JSON and named tensors as messages over a transport; tensors go as one buffer under a manifest that both sides know.

It knows links and messages; never rounds' meaning, clients' work or what is trained.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fedmpi import messages
from fedmpi.errors import ProtocolError
from fedmpi.messages import Header, Kind, Manifest
from fedmpi.tensors import Tensors
from fedmpi.transports.base import Transport
from fedmpi.transports.inbox import Message

MOST_JSON_BYTES = 1 << 20


class Post:
    """One rank's letters. A manifest is sent before its first use on a link and known by its hash from then on."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._manifests: dict[int, Manifest] = {}
        self._told: set[tuple[int, int]] = set()  # (peer, hash) that this rank has announced

    def receive(self, peers: Collection[int], phase: str) -> Message:
        """The next message of any of these peers, manifests aside: those are learnt on the way."""
        while True:
            with self._apart():
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

    def send_tensors(self, peers: Collection[int], kind: Kind, tensors: Tensors, round_index: int, client: int = -1) -> Tensors:
        """One contiguous buffer to each of these peers; gives back what they will decode."""
        manifest = messages.manifest_of(tensors)
        for peer in peers:
            self._announce(peer, manifest)
        body, decoded = _in_place(tensors, manifest), tensors
        if body is None:
            body = messages.pack(tensors, manifest)
            decoded = messages.unpack(body, manifest)
        header = Header(kind, round_index, client, manifest.num_bytes, manifest.hash)
        self._send(peers, header, body.numpy().data)
        return decoded

    def keep(self, message: Message) -> Tensors:
        """The tensors of a message in memory of their own."""
        if message.payload is not None:
            message.payload = message.payload.clone()
        return self.tensors(message)

    def tensors(self, message: Message) -> Tensors:
        """The tensors of a message, as views of its buffer: they live until the message is released."""
        header = message.header
        manifest = self._manifests.get(header.manifest)
        if manifest is None:
            raise ProtocolError(
                f"rank {message.peer} sent {header.kind.name} under manifest {header.manifest:x}, which it never announced"
            )
        if manifest.num_bytes != header.length:
            raise ProtocolError(f"rank {message.peer} sent {header.length} bytes, its manifest says {manifest.num_bytes}")
        body = message.payload if message.payload is not None else torch.empty(0, dtype=torch.uint8)
        return messages.unpack(body, manifest)

    def json(self, message: Message) -> dict[str, Any]:
        """The object of a message."""
        said = content(message)
        try:
            value = json.loads(said) if len(said) <= MOST_JSON_BYTES else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ProtocolError(
                f"rank {message.peer} sent {message.header.kind.name} that is no JSON object of at most {MOST_JSON_BYTES} bytes"
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
        traffic = (*self.transport.sent.values(), *self.transport.received.values())
        return sum(way.payload_bytes + way.header_bytes for way in traffic)

    def _send(self, peers: Collection[int], header: Header, payload: memoryview) -> None:
        if not peers:
            return
        with self._apart():
            for error in self.transport.send_all(peers, header, payload).values():
                raise error

    @contextmanager
    def _apart(self) -> Iterator[None]:
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


def _in_place(tensors: Tensors, manifest: Manifest) -> torch.Tensor | None:
    """The bytes of tensors that lie just as the manifest has them, as those of a mean do; None where they are to be packed."""
    if not manifest.num_bytes:
        return None
    first = tensors[manifest.places[0][0].name]
    storage = first.untyped_storage()
    for spec, place in manifest.places:
        tensor = tensors[spec.name]
        together = tensor.untyped_storage().data_ptr() == storage.data_ptr() and tensor.is_contiguous()
        if not together or tensor.is_cuda or (tensor.numel() and tensor.data_ptr() != first.data_ptr() + place.start):
            return None
    start = first.storage_offset() * first.element_size()
    return torch.empty(0, dtype=torch.uint8).set_(storage, start, (manifest.num_bytes,), (1,))


def content(message: Message) -> bytes:
    """A message's payload as bytes of its own; its buffer is free again."""
    said = b"" if message.payload is None else message.payload.numpy().tobytes()
    message.release()
    return said
