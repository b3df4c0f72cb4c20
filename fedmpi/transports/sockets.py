"""Links between machines: a TCP connection each, found through an address in the job's store.

Not gloo's process groups of two, which these were once: when a connection breaks, gloo (of torch 2.13) forgets the sends and
receives that are under way, so that who waits for them waits for ever; and each of its pieces waits until the other side has posted
a receive, which between distant machines is a round trip. This module must never know messages or clients.
"""

import secrets
import selectors
import socket
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep

from fedmpi.errors import PeerLost

CALL_S, PAUSE_S = 5.0, 0.2  # for a connection to one of the server's addresses, and before all are tried again
PATIENCE_S = 2.0  # for what a caller says of itself, once it is connected; meanwhile others are heard
LEFT = "the other side has closed the link"
HERE = b"."
_HELLO = struct.Struct("<32siI")


class SocketWire:
    """A connection: a stream, whose bytes need not be asked for before they are sent."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        weakref.finalize(self, connection.close)

    def write(self, *parts: memoryview) -> None:
        """Send all parts."""
        try:
            pour(self._socket, list(parts))
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None

    def flush(self) -> None:
        """Nothing to wait for: the system has a copy."""

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Fill all parts. Over a slow link a single one may take minutes."""
        try:
            for part in parts:
                fill(self._socket, part, heard)
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None

    def close(self) -> None:
        """Wake everyone who waits here, and who reads over there."""
        shut(self._socket)


def pour(into: socket.socket, parts: list[memoryview]) -> None:
    """Send all bytes of the parts."""
    while parts:
        sent = into.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def fill(connection: socket.socket, part: memoryview, heard: Callable[[int], None]) -> None:
    """Read as many bytes as the part has; `heard` is told how many came, whenever some did."""
    while part:
        if not (got := connection.recv_into(part)):
            raise ConnectionError(LEFT)
        heard(got)
        part = part[got:]


def shut(*connections: socket.socket) -> None:
    """Nothing goes through any more; who waits wakes up. They are closed when nobody has them any more."""
    for one in connections:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Listener:
    """The server's side of the meeting. Clients may come in any order, and before they are asked for.

    A stranger who finds the port is sent away. The secret tells who is one; it is no protection on a network that is read along.
    """

    def __init__(self) -> None:
        self._socket = _everywhere()
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.secret = secrets.token_hex(16)
        self._wires: dict[tuple[int, int], SocketWire] = {}
        self._watched = selectors.DefaultSelector()
        self._watched.register(self._socket, selectors.EVENT_READ)
        weakref.finalize(self, self._socket.close)

    def link(self, client: int, generation: int, within_s: float) -> SocketWire:
        """The link of this client, which has called or will."""
        ends = monotonic() + within_s
        while (client, generation) not in self._wires:
            if (left := ends - monotonic()) <= 0:
                raise PeerLost(f"rank {client} did not come back to its link within {within_s:g} s")
            self._listen(min(left, PATIENCE_S))
        for older in [key for key in self._wires if key[0] == client and key[1] < generation]:
            self._wires.pop(older).close()
        return self._wires.pop((client, generation))

    def _listen(self, seconds: float) -> None:
        """Hear whoever has something to say, a little each."""
        for key, _ in self._watched.select(seconds):
            if key.data is None:
                self._accept()
            else:
                self._hear(key.data)
        callers = [key.data for key in self._watched.get_map().values() if key.data is not None]
        for caller in [caller for caller in callers if caller.until < monotonic()]:
            self._dismiss(caller)

    def _accept(self) -> None:
        try:
            connection = self._socket.accept()[0]
        except (BlockingIOError, ConnectionError):  # it has left again
            return
        except OSError as error:
            raise PeerLost(f"no link can be accepted: {error.strerror or error}") from None
        connection.setblocking(False)
        self._watched.register(connection, selectors.EVENT_READ, Caller(connection, monotonic() + PATIENCE_S))

    def _hear(self, caller: "Caller") -> None:
        try:
            got = caller.connection.recv(_HELLO.size - len(caller.said))
        except BlockingIOError:
            return
        except OSError:
            got = b""
        caller.said += got
        if not got:
            self._dismiss(caller)
        elif len(caller.said) == _HELLO.size:
            secret, client, generation = _HELLO.unpack(caller.said)
            if not secrets.compare_digest(secret, self.secret.encode()):
                self._dismiss(caller)
                return
            self._watched.unregister(caller.connection)
            self._wires[client, generation] = SocketWire(caller.connection)
            with suppress(OSError):  # it has left; whoever uses the link will see
                caller.connection.send(HERE)

    def _dismiss(self, caller: "Caller") -> None:
        self._watched.unregister(caller.connection)
        caller.connection.close()


def _everywhere() -> socket.socket:
    """A server on every interface, by both protocols where the machine has both."""
    with suppress(OSError):  # it may know IPv6, and have switched it off
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=socket.SOMAXCONN, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=socket.SOMAXCONN)


@dataclass
class Caller:
    """Somebody who has not said yet who it is."""

    connection: socket.socket
    until: float
    said: bytes = b""


def call(hosts: Sequence[str], port: int, secret: str, client: int, generation: int, within_s: float) -> SocketWire:
    """A client's end of a new link, to the first of the server's addresses at which it answers."""
    ends = monotonic() + within_s
    while True:
        failed: list[str] = []
        for host in dict.fromkeys(hosts):
            try:
                return _call(host, port, _HELLO.pack(secret.encode(), client, generation), ends)
            except OSError as error:
                failed.append(f"{host} port {port}: {error.strerror or error}")
        if monotonic() + PAUSE_S > ends:
            raise ConnectionError("; ".join(failed))
        sleep(PAUSE_S)


def _call(host: str, port: int, hello: bytes, ends: float) -> SocketWire:
    connection = socket.create_connection((host, port), CALL_S)
    try:
        connection.sendall(hello)
        connection.settimeout(max(CALL_S, ends - monotonic()))  # the server answers when it comes to this link
        if connection.recv(1) != HERE:
            raise ConnectionError("somebody else answers")
    except OSError:
        connection.close()
        raise
    return SocketWire(connection)
