"""Links between machines: a TCP connection each, found through an address in the job's store.

Not gloo's process groups of two, which these were once: when a connection breaks, gloo (of torch 2.13) forgets the sends and
receives that are under way, so that who waits for them waits for ever; and each of its pieces waits until the other side has posted
a receive, which between distant machines is a round trip. This module must never know messages or clients.
"""

import secrets
import socket
import struct
import weakref
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from fedmpi.errors import PeerLost

CALL_S = 5.0  # for a connection to one of the server's addresses
PATIENCE_S = 10.0  # for what a caller says of itself
LEFT = "the other side has closed the link"
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

    def read(self, *parts: memoryview) -> None:
        """Fill all parts."""
        try:
            for part in parts:
                fill(self._socket, part)
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


def fill(part_of: socket.socket, part: memoryview) -> None:
    """Read as many bytes as the part has."""
    while part:
        if not (got := part_of.recv_into(part)):
            raise ConnectionError(LEFT)
        part = part[got:]


def shut(*connections: socket.socket) -> None:
    """Nothing goes through any more; who waits wakes up. They are closed when nobody has them any more."""
    for one in connections:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


class Listener:
    """The server's side of the meeting. Clients may come in any order, and before they are asked for."""

    def __init__(self, host: str) -> None:
        """On every interface, or on that of one address."""
        both = not host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN, dualstack_ipv6=both)
        self.port: int = self._socket.getsockname()[1]
        self.secret = secrets.token_hex(16)  # strangers do not know it; it is no protection on a network that is read along
        self._wires: dict[tuple[int, int], SocketWire] = {}
        weakref.finalize(self, self._socket.close)

    def link(self, client: int, generation: int, within_s: float) -> SocketWire:
        """The link of this client, which has called."""
        ends = monotonic() + within_s
        while (client, generation) not in self._wires:
            self._socket.settimeout(max(0.01, ends - monotonic()))
            try:
                connection = self._socket.accept()[0]
            except TimeoutError:
                raise PeerLost(f"rank {client} did not come back to its link within {within_s:g} s") from None
            with suppress(OSError):  # a stranger
                self._admit(connection)
        return self._wires.pop((client, generation))

    def _admit(self, connection: socket.socket) -> None:
        said = memoryview(bytearray(_HELLO.size))
        connection.settimeout(PATIENCE_S)
        fill(connection, said)
        secret, client, generation = _HELLO.unpack(said)
        if not secrets.compare_digest(secret, self.secret.encode()):
            raise PermissionError("somebody speaks there who is not of this job")
        self._wires[client, generation] = SocketWire(connection)


def call(hosts: Sequence[str], port: int, secret: str, client: int, generation: int) -> SocketWire:
    """A client's end of a new link, to the first of the server's addresses at which somebody answers."""
    failed: list[str] = []
    for host in dict.fromkeys(hosts):
        try:
            connection = socket.create_connection((host, port), CALL_S)
            connection.sendall(_HELLO.pack(secret.encode(), client, generation))
            return SocketWire(connection)
        except OSError as error:
            failed.append(f"{host} port {port}: {error.strerror or error}")
    raise ConnectionError("; ".join(failed))
