"""One link to one peer: messages framed over a wire, a thread that receives them, and a pulse that shows we are alive.

A wire moves bytes and nothing else, so everything that is the same on all transports lives here and in `base`; `outgoing` says in
which pieces a message is written.

Chunks may be handed on one by one, so that what is done with them goes on beside receiving and nobody holds a whole payload.
Both sides know every length in advance, since a frame and its chunk are read at once. In a stream chunks have lengths of their
own, so the frame is read first; what it claims is bounded by what the chunk stands for.

This module must never know which transport it serves, nor what a payload means.
"""

import queue
import threading
from collections.abc import Callable
from time import monotonic
from typing import Protocol

import torch

from fedmpi.errors import LinkError, PeerLost, ProtocolError
from fedmpi.messages import FRAME_BYTES, HEADER_BYTES, STREAM, Header, Kind, check_frame, chunks, frame_length
from fedmpi.transports.outgoing import CONTROL, NOTE, SMALL_BYTES, Outgoing, Traffic, is_small

NUM_BUFFERS = 2  # for whole payloads: one is filled while the other is used
NUM_CHUNKS = 8  # for payloads that are handed on chunk by chunk: a server's memory does not grow with its clients
LAST_WORDS = frozenset({Kind.BYE, Kind.ABORT})
MAX_ABORT_BYTES = 4096


class Wire(Protocol):
    """An ordered pipe of bytes to one peer. Broken or closed, it raises ConnectionError in all who wait on it."""

    def write(self, *parts: memoryview) -> None:
        """Send all bytes of the parts, each as a piece that the other side reads in the same size."""

    def flush(self) -> None:
        """Return when all that was written may be overwritten."""

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Fill the parts, none of which is empty; `heard` is called with the number of bytes when some have come."""

    def close(self) -> None:
        """Break the wire and wake everyone who is blocked on it, on both sides. May be called twice."""


class Hub(Protocol):
    """What a link needs of the transport that it belongs to."""

    limit_bytes: int
    in_chunks: frozenset[Kind]  # of these kinds, large payloads are handed on chunk by chunk

    def take(self, link: "Link", num_bytes: int, num_buffers: int) -> torch.Tensor | None:
        """One of so many buffers, when one may be had; None when the link is going down and the bytes are to be thrown away."""

    def spoil(self, link: "Link") -> None:
        """The payload that a buffer was taken for will not come."""

    def arrived(self, link: "Link", header: Header, payload: torch.Tensor | None, note: bytes, place: slice) -> None:
        """A message of whatever kind came; or the chunk of its payload that stands at this place."""

    def lost(self, link: "Link", error: LinkError) -> None:
        """The link is of no use any more."""


class Link:
    """Sending, receiving and staying alive over one wire."""

    def __init__(self, peer: int, wire: Wire, hub: Hub, sent: Traffic, received: Traffic, period_s: float) -> None:
        self.peer, self.sent, self.received = peer, sent, received
        self.heard = self.spoke = monotonic()
        self.listening = True  # False while we wait for a buffer: silence is then ours, not the peer's
        self.ended = False  # the peer has said its last words
        self.closed = False
        self._awaited, self._there, self._framing, self._got = "", 0, 0, 0  # of a large message: see `coming`
        self._wire, self._hub, self._period_s = wire, hub, period_s
        self._writing = threading.Lock()
        self._orders: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive, name=f"receive-{peer}", daemon=True)
        self._pulse = threading.Thread(target=self._beat, name=f"pulse-{peer}", daemon=True)

    @property
    def may_be_late(self) -> bool:
        """Whether silence would be the peer's fault."""
        return self.listening and not self.closed and not self.ended

    @property
    def coming(self) -> str:
        """How much of a large message is there already, while it comes."""
        return self._awaited and f"{self._there + max(0, self._got - self._framing)} {self._awaited}"

    def start(self) -> None:
        """Begin to listen and to beat; apart from the constructor, so that the hub knows the link first."""
        self._receiver.start()
        self._pulse.start()

    def send(self, message: Outgoing) -> None:
        """Write one message; bytes of others wait. ConnectionError when the wire is broken."""
        with self._writing:
            self._write(message)

    def post(self, kind: Kind, text: str = "") -> None:
        """Have the pulse send a control message soon. Never blocks and is safe in a signal handler."""
        payload = memoryview(text.encode()[:MAX_ABORT_BYTES]) if text else None
        self._orders.put(Outgoing(Header(kind), payload, SMALL_BYTES))

    def close(self) -> None:
        """Break the wire; both threads end by themselves."""
        self.closed = True
        self._wire.close()
        self._orders.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of a closed link, so that none is inside the wire's library when the program ends."""
        for thread in (self._receiver, self._pulse):
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _write(self, message: Outgoing) -> None:
        for parts in message.parts():
            self._wire.write(*parts)
            self.spoke = monotonic()
        self._wire.flush()
        self.sent.count(message.header, message.payload_bytes)

    def _beat(self) -> None:
        """Send what was posted, and a heartbeat whenever the link was quiet for a period."""
        heartbeat = Outgoing(Header(Kind.HEARTBEAT), None, SMALL_BYTES)
        try:
            while not self.closed:
                try:
                    order = self._orders.get(timeout=self._period_s)
                except queue.Empty:
                    self._beat_once(heartbeat)
                    continue
                if order is None:
                    return
                self.send(order)
                if order.header.kind in LAST_WORDS:
                    return
        except ConnectionError as error:
            self._hub.lost(self, PeerLost(f"rank {self.peer} is gone: {error}; its own output says why"))

    def _beat_once(self, heartbeat: Outgoing) -> None:
        """A link that is being written to is not quiet, and its lock is not waited for."""
        if monotonic() - self.spoke >= self._period_s and self._writing.acquire(blocking=False):
            try:
                self._write(heartbeat)
            finally:
                self._writing.release()

    def _receive(self) -> None:
        """Receive until the peer's last words, or until the wire breaks."""
        error: LinkError = PeerLost(f"the thread that receives from rank {self.peer} ended by a fault of this program")
        try:
            while not self.ended:
                self._receive_one()
        except ConnectionError as broken:
            after = f" after {self.coming}" if self.coming else ""
            error = PeerLost(f"rank {self.peer} is gone{after}: {broken}; its own output says why")
        except ProtocolError as wrong:
            error = ProtocolError(f"rank {self.peer} broke the protocol: {wrong}")
        finally:
            if not self.ended:
                self._hub.lost(self, error)

    def _receive_one(self) -> None:
        head = memoryview(bytearray(HEADER_BYTES))
        self._read(head)
        header = Header.unpack(head)
        limit = MAX_ABORT_BYTES if header.kind in CONTROL else self._hub.limit_bytes
        if header.length > limit:
            raise ProtocolError(f"{header.kind.name} claims {header.length} bytes, at most {limit} are accepted here")
        if is_small(header):
            note, payload = self._small(header) if header.note + header.length else (b"", None)
            self._hand_on(header, payload, note, slice(0, header.length))
        elif header.flags & STREAM:
            self._stream(header, self._note(header) if header.note else b"")
        else:
            self._large(header, self._note(header) if header.note else b"")

    def _hand_on(
        self, header: Header, payload: torch.Tensor | None, note: bytes, place: slice, payload_bytes: int | None = None
    ) -> None:
        """Whoever wakes up by a message finds it counted, and the link ended if these were the last words."""
        if place.stop == header.length:
            self.received.count(header, header.length if payload_bytes is None else payload_bytes)
            self.ended = header.kind in LAST_WORDS
        self._hub.arrived(self, header, payload, note, place)

    def _stream(self, header: Header, note: bytes) -> None:
        """Read chunks that have lengths of their own, and hand on each when it is there."""
        total = 0
        for index, place in enumerate(chunks(header.length, header.chunk_bytes)):
            framing = memoryview(bytearray(FRAME_BYTES))
            self._read(framing)
            length = frame_length(framing, place.stop - place.start)
            self._await(f"coded bytes of its {header.kind.name}", total)
            total += length
            # held by no name here, as below
            self._hand_on(header, self._coded(framing, length, index), b"" if index else note, place, total)
        self._awaited = ""

    def _coded(self, framing: memoryview, length: int, index: int) -> torch.Tensor | None:
        buffer = self._taken(length, NUM_CHUNKS)
        try:
            space = torch.empty(length, dtype=torch.uint8) if buffer is None else buffer
            chunk = space.numpy().data
            if length:
                self._read(chunk)
            check_frame(framing, chunk, index)
        except (ConnectionError, ProtocolError):
            self._hub.spoil(self)
            raise
        return buffer

    def _large(self, header: Header, note: bytes) -> None:
        """Read the payload, and hand it on: as a whole, or each chunk when it is there."""
        places = list(chunks(header.length, header.chunk_bytes))
        if header.kind in self._hub.in_chunks:
            for index, place in enumerate(places):
                room = min(header.chunk_bytes, header.length)
                # held by no name here: its memory is used again while this thread waits for the next permit
                self._hand_on(header, self._filled(header, [(index, place)], room, NUM_CHUNKS), b"" if index else note, place)
        else:
            payload = self._filled(header, list(enumerate(places)), header.length, NUM_BUFFERS)
            self._hand_on(header, payload, note, slice(0, header.length))

    def _read(self, *parts: memoryview) -> None:
        self._wire.read(*parts, heard=self._hears)

    def _hears(self, num_bytes: int) -> None:
        self.heard = monotonic()
        self._got += num_bytes

    def _await(self, what: str, there: int, framing: int = 0) -> None:
        """More of a message is read next: so many bytes of it are there, and so many come first that are none of it."""
        self._awaited, self._there, self._framing, self._got = what, there, framing, 0

    def _small(self, header: Header) -> tuple[bytes, torch.Tensor | None]:
        data = memoryview(bytearray(FRAME_BYTES + header.note + header.length))
        self._read(data)
        check_frame(data[:FRAME_BYTES], data[FRAME_BYTES:], 0)
        start = FRAME_BYTES + header.note
        payload = torch.frombuffer(data, dtype=torch.uint8, offset=start) if header.length else None
        return bytes(data[FRAME_BYTES:start]), payload

    def _note(self, header: Header) -> bytes:
        data = memoryview(bytearray(FRAME_BYTES + header.note))
        self._read(data)
        check_frame(data[:FRAME_BYTES], data[FRAME_BYTES:], NOTE)
        return bytes(data[FRAME_BYTES:])

    def _filled(self, header: Header, places: list[tuple[int, slice]], room: int, num_buffers: int) -> torch.Tensor | None:
        """The chunks of these places in one of so many buffers of that size; None where nobody wants them any more."""
        buffer = self._taken(room, num_buffers)
        try:
            self._fill(header, places, buffer)
        except (ConnectionError, ProtocolError):
            self._hub.spoil(self)
            raise
        return None if buffer is None else buffer[: places[-1][1].stop - places[0][1].start]

    def _taken(self, num_bytes: int, num_buffers: int) -> torch.Tensor | None:
        """A buffer of the transport's; silence while we wait for it is ours."""
        self.listening = False
        buffer = self._hub.take(self, num_bytes, num_buffers)
        self.heard, self.listening = monotonic(), True
        return buffer

    def _fill(self, header: Header, places: list[tuple[int, slice]], buffer: torch.Tensor | None) -> None:
        """Read the chunks into the buffer, or, without one, over each other: the sender must be able to finish."""
        space = torch.empty(min(header.chunk_bytes, header.length), dtype=torch.uint8) if buffer is None else buffer
        view, framing = space.numpy().data, memoryview(bytearray(FRAME_BYTES))
        for index, place in places:
            start = 0 if buffer is None else place.start - places[0][1].start
            chunk = view[start : start + place.stop - place.start]
            self._await(f"of {header.length} bytes of its {header.kind.name}", place.start, FRAME_BYTES)
            self._read(framing, chunk)
            check_frame(framing, chunk, index)
        self._awaited = ""
