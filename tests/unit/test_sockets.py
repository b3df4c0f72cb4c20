"""Connections between machines: every byte in order, whoever waits wakes up when the other side goes, strangers are sent away."""

import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from fedmpi.errors import LinkError, PeerLost
from fedmpi.messages import CHUNK_BYTES, FRAME_BYTES, HEADER_BYTES, STREAM, Header, Kind
from fedmpi.transports import sockets
from fedmpi.transports.link import Link
from fedmpi.transports.outgoing import Outgoing, Traffic
from fedmpi.transports.sockets import Listener, SocketWire, call

LARGE = 32 << 20


@contextmanager
def calling(listener: Listener, hosts: list[str], client: int, generation: int) -> Iterator["Future[SocketWire]"]:
    """A client that calls, and waits until it is answered."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit(call, hosts, listener.port, listener.secret, client, generation, 10.0)


@pytest.fixture
def pair() -> Iterator[tuple[SocketWire, SocketWire]]:
    """The server's end and a client's."""
    listener = Listener()
    with calling(listener, ["127.0.0.1"], 1, 1) as called:
        ours = listener.link(1, 1, 5)
        theirs = called.result()
    yield ours, theirs
    ours.close(), theirs.close()


def test_parts_of_all_sizes_arrive_in_order_however_they_are_cut(pair: tuple[SocketWire, SocketWire]) -> None:
    ours, theirs = pair
    sent = [bytes([number]) * size for number, size in enumerate((1, 0, 64, LARGE, 3))]
    writing = threading.Thread(target=ours.write, args=[memoryview(part) for part in sent])
    writing.start()
    got = bytearray(sum(map(len, sent)))
    heard: list[int] = []
    theirs.read(memoryview(got)[:7], memoryview(got)[7:], heard=heard.append)
    assert len(heard) > len(sent) and sum(heard) == len(got), "who reads a long part is told of its pieces"
    writing.join(10)
    assert bytes(got) == b"".join(sent)


@pytest.mark.parametrize(
    ("flags", "sent", "said"),
    [
        (0, 1.5, "after 6291456 of 12582912 bytes of its UPDATE"),
        (STREAM, 1.5, "after 6291456 coded bytes of its UPDATE"),
        (0, 0.0, "after 0 of 12582912 bytes of its UPDATE"),
    ],
)
def test_a_link_that_breaks_says_how_much_of_a_message_had_come(
    pair: tuple[SocketWire, SocketWire], flags: int, sent: float, said: str
) -> None:
    """So many chunks of three are sent, with what goes before them."""
    lost: list[LinkError] = []
    over = threading.Event()
    hub: Any = SimpleNamespace(limit_bytes=1 << 30, in_chunks=frozenset(), spoil=print)
    hub.take = hub.arrived = lambda *_: None
    hub.lost = lambda link, error: (lost.append(error), over.set())
    link = Link(1, pair[0], hub, Traffic(), Traffic(), 60.0)
    parts = Outgoing(Header(Kind.UPDATE, flags=flags), memoryview(bytes(3 * CHUNK_BYTES)), CHUNK_BYTES).parts()
    stream = b"".join(map(bytes, (part for piece in parts for part in piece)))
    before = HEADER_BYTES + math.ceil(sent) * FRAME_BYTES
    link.start()
    pair[1].write(memoryview(bytearray(stream[: before + int(sent * CHUNK_BYTES)])))
    pair[1].close()
    assert over.wait(10)
    link.close()
    assert said in str(lost[0])


@pytest.mark.parametrize("closes", [0, 1], ids=["this side", "the other side"])
def test_who_is_in_the_middle_of_a_piece_wakes_up_when_a_side_closes(pair: tuple[SocketWire, SocketWire], closes: int) -> None:
    """Both a sender whose bytes nobody takes and a receiver of whose piece half has come, who then closes this side as links do."""
    ours, theirs = pair
    theirs.write(memoryview(bytes(10)))
    failed: list[str] = []

    def waits(act: str, part: memoryview) -> None:
        try:
            ours.write(part) if act == "write" else ours.read(part, heard=int)
        except ConnectionError:
            failed.append(act)
            ours.close()

    acts = [("write", memoryview(bytes(LARGE))), ("read", memoryview(bytearray(20)))]
    threads = [threading.Thread(target=waits, args=one) for one in acts]
    for thread in threads:
        thread.start()
    threads[0].join(0.2)
    pair[closes].close()
    for thread in threads:
        thread.join(10)
    assert sorted(failed) == ["read", "write"]


def test_clients_may_call_in_any_order_and_strangers_keep_nobody_waiting() -> None:
    """One says something else, one says nothing, one leaves at once, one never comes to an end."""
    listener = Listener()
    strangers = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(4)]
    strangers[0].sendall(b"x" * 64)
    strangers[2].close()
    over = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not over.wait(0.05):
                strangers[3].send(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    began = time.monotonic()
    with calling(listener, ["no-such-host.invalid", "127.0.0.1"], 2, 3) as two, calling(listener, ["127.0.0.1"], 1, 3) as one:
        for client, called in ((1, one), (2, two)):
            listener.link(client, 3, 10).write(memoryview(bytes([client])))
            said = bytearray(1)
            called.result().read(memoryview(said), heard=int)
            assert said[0] == client
    assert time.monotonic() - began < sockets.PATIENCE_S + 5
    over.set()
    dripping.join()
    for stranger in strangers:
        stranger.close()
    with pytest.raises(PeerLost, match="rank 1 did not come back to its link within 0.1 s"):
        listener.link(1, 4, 0.1)


def test_a_link_that_was_made_in_vain_is_closed_when_a_newer_one_is_there() -> None:
    listener = Listener()
    with calling(listener, ["127.0.0.1"], 2, 1) as old, calling(listener, ["127.0.0.1"], 2, 2) as new:
        while len(listener._wires) < 2:
            listener._listen(0.1)
        listener.link(2, 2, 5)
    new.result()
    with pytest.raises(ConnectionError):
        old.result().read(memoryview(bytearray(1)), heard=int)
    assert not listener._wires


def test_where_nobody_answers_every_address_is_named_when_time_is_over() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"127.0.0.1 port {port}: Connection refused"):
            call(["127.0.0.1", "127.0.0.1"], port, "x" * 32, 1, 1, 0.5)
