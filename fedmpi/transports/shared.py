"""Links between ranks of one machine: a socket for each direction, through which memory is lent rather than copied.

The server listens under a name that only processes in its network namespace can reach; a client that does not find it is on another
machine, or as good as that, and is linked otherwise. Nothing of a link has a place in the file system, and the kernel closes the
sockets of a process that dies, so that its peer knows at once.

A long piece stays where it is: the reader is given the file behind that memory (see `tensors.room`), copies its part out of it and
says so. Nothing is mapped, so a peer can neither change what was read nor cut memory short under our feet, and it costs a server
nothing to have many clients. This module must never know messages or clients.
"""

import array
import os
import secrets
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from fedmpi.errors import PeerLost
from fedmpi.tensors import lent, room
from fedmpi.transports.sockets import LEFT, fill, shut

LENT_BYTES = 64 << 10  # shorter pieces go through the socket: to lend takes two wake-ups
MOST_LENT = 2  # pieces at a time: one is copied while the next is made ready
PATIENCE_S, CALLER_S = 10.0, 1.0  # for a client that has said that it called, and for what a caller says of itself
DONE = b"."

_PLACE, _HELLO, _OWNER = struct.Struct("<QQ"), struct.Struct("<iI"), struct.Struct("3i")


class SharedWire:
    """Two sockets, one for each direction."""

    def __init__(self, outgoing: socket.socket, incoming: socket.socket) -> None:
        self._out, self._in = outgoing, incoming
        self._lent: deque[memoryview] = deque()  # what the other side has not said that it has copied
        for one in (outgoing, incoming):
            weakref.finalize(self, one.close)

    def write(self, *parts: memoryview) -> None:
        """Send all parts. Those that are lent are held until they were copied, so that the next are made ready meanwhile."""
        try:
            short: list[memoryview] = []
            for part in parts:
                if len(part) < LENT_BYTES:
                    short.append(part)
                    continue
                self._out.sendall(b"".join(short))
                short = []
                self._lend(part)
            self._out.sendall(b"".join(short))
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None

    def flush(self) -> None:
        """Wait until nothing is lent any more."""
        try:
            while self._lent:
                self._given_back()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Fill all parts."""
        try:
            for part in parts:
                if len(part) < LENT_BYTES:
                    fill(self._in, part, heard)
                else:
                    self._borrow(part)
                    heard(len(part))
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None

    def close(self) -> None:
        """Wake everyone who waits on either socket, on both sides."""
        shut(self._out, self._in)

    def _lend(self, part: memoryview) -> None:
        """Have the other side copy from where the bytes lie, or from a copy of them, where they lie in memory of another kind."""
        place = lent(part)
        if place is None:
            copied = room(len(part), torch.uint8, to_lend=True)
            np.copyto(copied.numpy(), np.frombuffer(part, np.uint8))
            place = lent(part := copied.numpy().data)
        if place is None:
            raise ConnectionError("no memory can be lent here: too many files are open (ulimit -n)")
        while len(self._lent) >= MOST_LENT:
            self._given_back()
        file, start = place
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))]
        self._out.sendmsg([_PLACE.pack(start, len(part))], rights)
        self._lent.append(part)

    def _given_back(self) -> None:
        if not self._out.recv(1):
            raise ConnectionError(LEFT)
        self._lent.popleft()

    def _borrow(self, part: memoryview) -> None:
        said, files, *_ = socket.recv_fds(self._in, _PLACE.size, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if len(said) < _PLACE.size or not files:
                raise ConnectionError(LEFT)
            start, num = _PLACE.unpack(said)
            if num != len(part):
                raise ConnectionError(f"the other side lends {num} bytes, expected {len(part)}")
            while part:
                if not (got := os.preadv(files[0], [part], start)):
                    raise ConnectionError(f"{len(part)} bytes fewer were lent than was said")
                part, start = part[got:], start + got
        finally:
            for file in files:
                os.close(file)
        with suppress(OSError):  # it has left; what it lent is here
            self._in.send(DONE)


class Listener:
    """The server's side of the meeting. Clients may come in any order, and before they are asked for."""

    def __init__(self) -> None:
        self.name = f"fedmpi-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen(socket.SOMAXCONN)
        self._socket.settimeout(PATIENCE_S)
        self._wires: dict[tuple[int, int], SharedWire] = {}
        weakref.finalize(self, self._socket.close)

    def link(self, client: int, generation: int) -> SharedWire:
        """The link of this client, which has called."""
        try:
            while (client, generation) not in self._wires:
                connection = self._socket.accept()[0]
                with suppress(OSError):  # a stranger
                    self._admit(connection)
        except OSError as error:
            raise PeerLost(f"rank {client}: its link on this machine could not be made: {error}") from None
        return self._wires.pop((client, generation))

    def _admit(self, incoming: socket.socket) -> None:
        """Take the two sockets of a caller of our own user."""
        incoming.settimeout(CALLER_S)
        _, owner, _ = _OWNER.unpack(incoming.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _OWNER.size))
        said, files, *_ = socket.recv_fds(incoming, _HELLO.size, 1, socket.MSG_CMSG_CLOEXEC)
        if owner != os.getuid() or len(said) != _HELLO.size or not files:
            raise PermissionError(f"a process of user {owner} speaks there, expected user {os.getuid()}")
        incoming.settimeout(None)
        client, generation = _HELLO.unpack(said)
        self._wires[client, generation] = SharedWire(socket.socket(fileno=files[0]), incoming)


def call(name: str, client: int, generation: int) -> SharedWire | None:
    """A client's end of a new link; None where the server cannot be reached this way."""
    outgoing = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        outgoing.connect(f"\0{name}")
    except OSError:
        outgoing.close()
        return None
    incoming, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(outgoing, [_HELLO.pack(client, generation)], [theirs.fileno()])
    return SharedWire(outgoing, incoming)
