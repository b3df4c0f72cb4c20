"""One link to one peer: messages framed over a wire, a thread that receives them, and a pulse that shows we are alive.

A wire moves bytes and nothing else, so everything that is the same on all transports lives here and in `base`. This
module must never know which transport it serves, nor what a payload means.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

import torch

from fedmpi.errors import LinkError, PeerLost, ProtocolError
from fedmpi.messages import FRAME_BYTES, HEADER_BYTES, Header, Kind, check_frame, chunks, frame

SMALL_BYTES = 64 << 10  # payloads up to this travel in one piece with their frame, and need no permit
CONTROL = frozenset({Kind.HEARTBEAT, Kind.STOP_WANTED, Kind.BYE, Kind.ABORT})
LAST_WORDS = frozenset({Kind.BYE, Kind.ABORT})
MAX_ABORT_BYTES = 4096


class Wire(Protocol):
    """An ordered pipe of bytes to one peer. Broken or closed, it raises ConnectionError in all who wait on it."""

    def write(self, *parts: memoryview) -> None:
        """Send all bytes of the parts, each as a piece that the other side reads in the same size."""

    def read(self, *parts: memoryview) -> None:
        """Fill the parts, none of which is empty."""

    def close(self) -> None:
        """Break the wire and wake everyone who is blocked on it, on both sides. May be called twice."""


@dataclass
class Traffic:
    """What went one way over the links to one peer: whole messages only, liveness and leave-taking apart."""

    messages: int = 0
    payload_bytes: int = 0
    header_bytes: int = 0
    control_bytes: int = 0

    def count(self, header: Header) -> None:
        """Add one message."""
        num_chunks = -(-header.length // header.chunk_bytes)
        if header.kind in CONTROL:
            self.control_bytes += HEADER_BYTES + num_chunks * FRAME_BYTES + header.length
        else:
            self.messages += 1
            self.payload_bytes += header.length
            self.header_bytes += HEADER_BYTES + num_chunks * FRAME_BYTES


class Outgoing:
    """A message to one or several peers. Each chunk is checksummed once, when the first of them comes to it."""

    def __init__(self, header: Header, payload: memoryview | None, chunk_bytes: int) -> None:
        self.payload = memoryview(b"") if payload is None else payload.cast("B")
        self.header = replace(header, length=len(self.payload), chunk_bytes=chunk_bytes)
        self._frames: list[bytes] = []
        self._lock = threading.Lock()

    def parts(self) -> Iterator[tuple[memoryview, ...]]:
        """The pieces, grouped by what is written at once."""
        head = _writable(self.header.pack())
        if not self.payload:
            yield (head,)
        elif is_small(self.header):
            yield head, _writable(self._frame(0, self.payload) + self.payload)
        else:
            for index, place in enumerate(chunks(len(self.payload), self.header.chunk_bytes)):
                framed = _writable(self._frame(index, self.payload[place])), self.payload[place]
                yield framed if index else (head, *framed)

    def _frame(self, index: int, chunk: memoryview) -> bytes:
        with self._lock:
            if index == len(self._frames):
                self._frames.append(frame(chunk, index))
            return self._frames[index]


def _writable(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def is_small(header: Header) -> bool:
    """Whether both sides treat the payload as one piece with its frame."""
    return header.length <= min(SMALL_BYTES, header.chunk_bytes)


class Hub(Protocol):
    """What a link needs of the transport that it belongs to."""

    limit_bytes: int

    def take(self, link: "Link", num_bytes: int) -> torch.Tensor | None:
        """A buffer, when one may be had; None when the link is going down and the bytes are to be thrown away."""

    def spoil(self, link: "Link") -> None:
        """The payload that a buffer was taken for will not come."""

    def arrived(self, link: "Link", header: Header, payload: torch.Tensor | None) -> None:
        """A whole message came, of whatever kind."""

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
        self.coming = ""  # what part of a message is there already
        self._wire, self._hub, self._period_s = wire, hub, period_s
        self._writing = threading.Lock()
        self._orders: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._receiver = threading.Thread(target=self._receive, name=f"receive-{peer}", daemon=True)
        self._pulse = threading.Thread(target=self._beat, name=f"pulse-{peer}", daemon=True)

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
        self.sent.count(message.header)

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
        payload = self._payload(header) if header.length else None
        self.received.count(header)
        self.ended = header.kind in LAST_WORDS
        self._hub.arrived(self, header, payload)

    def _read(self, *parts: memoryview) -> None:
        self._wire.read(*parts)
        self.heard = monotonic()

    def _payload(self, header: Header) -> torch.Tensor | None:
        if is_small(header):
            data = memoryview(bytearray(FRAME_BYTES + header.length))
            self._read(data)
            check_frame(data[:FRAME_BYTES], data[FRAME_BYTES:], 0)
            return torch.frombuffer(data, dtype=torch.uint8, offset=FRAME_BYTES)
        self.listening = False
        buffer = self._hub.take(self, header.length)
        self.heard, self.listening = monotonic(), True
        try:
            self._fill(header, buffer)
        except (ConnectionError, ProtocolError):
            self._hub.spoil(self)
            raise
        return None if buffer is None else buffer[: header.length]

    def _fill(self, header: Header, buffer: torch.Tensor | None) -> None:
        """Read the chunks into the buffer, or, without one, over each other: the sender must be able to finish."""
        space = torch.empty(min(header.chunk_bytes, header.length), dtype=torch.uint8) if buffer is None else buffer
        view, framing = space.numpy().data, memoryview(bytearray(FRAME_BYTES))
        for index, place in enumerate(chunks(header.length, header.chunk_bytes)):
            chunk = view[: place.stop - place.start] if buffer is None else view[place]
            self.coming = f"{place.start} of {header.length} bytes of its {header.kind.name}"
            self._read(framing, chunk)
            check_frame(framing, chunk, index)
        self.coming = ""
