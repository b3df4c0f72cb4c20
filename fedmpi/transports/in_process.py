"""Ranks as threads of one process: bounded pipes in memory under the framing, heartbeats and deadlines of all others.

torch's generator and much else is global in a process, so ranks take `transport.turn` around anything that computes.
This module must never know a network.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedmpi.errors import PeerLost, WorldError
from fedmpi.messages import CHUNK_BYTES
from fedmpi.transports.base import Transport
from fedmpi.world import World

COPIED_BYTES = 64 << 10  # pieces up to this are copied and the writer goes on; longer ones wait for their reader
QUEUED_BYTES = 1 << 20


class Pipe:
    """One direction between two threads. The writer of a long piece waits until it was read, so nothing piles up."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._pieces: deque[memoryview] = deque()
        self._num_queued = 0
        self._closed = False

    def write(self, part: memoryview) -> None:
        """Hand over the bytes of one piece."""
        short = len(part) <= COPIED_BYTES
        with self._state:
            self._pieces.append(memoryview(bytes(part)) if short else part)
            self._num_queued += len(part)
            self._state.notify_all()
            self._state.wait_for(lambda: self._closed or self._num_queued <= (QUEUED_BYTES if short else 0))
            if self._closed:
                raise ConnectionError("the other thread has closed the pipe")

    def read(self, into: memoryview) -> None:
        """Fill `into` from as many pieces as it takes."""
        while into:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._pieces)
                if not self._pieces:
                    raise ConnectionError("the other thread has closed the pipe")
                piece = self._pieces[0]
            size = min(len(piece), len(into))
            into[:size] = piece[:size]
            into = into[size:]
            self._took(piece, size)

    def _took(self, piece: memoryview, size: int) -> None:
        with self._state:
            self._pieces.popleft()
            if size < len(piece):
                self._pieces.appendleft(piece[size:])
            self._num_queued -= size
            self._state.notify_all()

    def close(self) -> None:
        """Wake both sides for good. What was written whole can still be read."""
        with self._state:
            self._closed = True
            self._state.notify_all()


class PipeWire:
    """Two pipes, one each way."""

    def __init__(self, outgoing: Pipe, incoming: Pipe) -> None:
        self._outgoing, self._incoming = outgoing, incoming

    def write(self, *parts: memoryview) -> None:
        """Send the parts, one after the other."""
        for part in parts:
            self._outgoing.write(part)

    def flush(self) -> None:
        """Nothing to wait for: `write` has waited."""

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Fill the parts, one after the other."""
        for part in parts:
            self._incoming.read(part)
            heard(len(part))

    def close(self) -> None:
        """Break both directions."""
        self._outgoing.close()
        self._incoming.close()


class Exchange:
    """Where the two ends of each generation of a link find each other."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._state = threading.Condition()
        self._half_made: dict[int, tuple[bool, PipeWire]] = {}  # by client: did the server come first

    def pair(self) -> tuple[PipeWire, PipeWire]:
        """The two ends of a new link."""
        up, down = Pipe(), Pipe()
        return PipeWire(down, up), PipeWire(up, down)

    def asks(self, client: int) -> bool:
        """Whether this client waits for the server to come."""
        return self._half_made.get(client, (True, None))[0] is False

    def meet(self, client: int, is_server: bool) -> PipeWire:
        """This side's end of a new generation, once the other side has asked for it too."""
        with self._state:
            waiting = self._half_made.pop(client, None)
            if waiting is not None and waiting[0] != is_server:
                self._state.notify_all()
                return waiting[1]
            mine, theirs = self.pair()
            offer = self._half_made[client] = (is_server, theirs)
            if self._state.wait_for(lambda: self._half_made.get(client) is not offer, self._timeout_s):
                return mine
            del self._half_made[client]
            other = client if is_server else 0
            raise PeerLost(f"rank {other} did not come back to its link within {self._timeout_s:g} s")


class Table:
    """Where the threads of one process lay their buffers side by side; the last to come does what is asked for."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size, self._timeout_s = size, timeout_s
        self._state = threading.Condition()
        self._laid: dict[int, torch.Tensor] = {}
        self._closed = False

    def share(self, rank: int, data: torch.Tensor, do: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Wait for all; `do` is called with rank 0's buffer and each of the others'."""
        with self._state:
            laid = self._laid
            laid[rank] = data
            if len(laid) == self._size:
                for other in range(1, self._size):
                    do(laid[0], laid[other])
                self._laid = {}
                self._state.notify_all()
                return
            self._state.wait_for(lambda: self._laid is not laid or self._closed, self._timeout_s)
            if self._laid is laid:
                raise ConnectionError("a rank left the collective, or did not come to it")

    def close(self) -> None:
        """Wake everyone."""
        with self._state:
            self._closed = True
            self._state.notify_all()


@dataclass(frozen=True)
class Seat:
    """One thread's place at the table."""

    table: Table
    rank: int

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's bytes to all."""
        self.table.share(self.rank, data, lambda mine, other: other.copy_(mine))

    def add(self, data: torch.Tensor) -> None:
        """The sum of all to rank 0."""
        self.table.share(self.rank, data, lambda mine, other: mine.add_(other))

    def close(self) -> None:
        """Nobody can go on without this one."""
        self.table.close()


def open_all(size: int, *, timeout_s: float = 60.0, chunk_bytes: int = CHUNK_BYTES) -> list[Transport]:
    """The transports of all ranks, to be used by a thread each."""
    exchange, turn = Exchange(timeout_s), threading.RLock()
    pairs = {client: exchange.pair() for client in range(1, size)}
    tables: dict[int, Table] = {}  # by generation
    wires = [{client: pair[0] for client, pair in pairs.items()}, *({0: pair[1]} for pair in pairs.values())]

    def transport(rank: int) -> Transport:
        def reconnect(peer: int) -> PipeWire:
            return exchange.meet(rank or peer, rank == 0)

        def gather_all(generation: int) -> Seat:
            return Seat(tables.setdefault(generation, Table(size, timeout_s)), rank)

        return Transport(
            rank, size, wires[rank], reconnect, timeout_s=timeout_s, chunk_bytes=chunk_bytes, turn=turn,
            gather_all=gather_all, asks=exchange.asks,
        )  # fmt: skip

    return [transport(rank) for rank in range(size)]


def open(world: World, *, timeout_s: float) -> Transport:
    """The transport of a process that is the whole federation."""
    if world.size != 1:
        raise WorldError(f"--transport in_process is for one process, but there are {world.size}; use torch")
    return open_all(1, timeout_s=timeout_s)[0]
