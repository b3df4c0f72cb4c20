"""Connections between machines: every byte in order, whoever waits wakes up when the other side goes, strangers are sent away."""

import socket
import threading
from collections.abc import Iterator

import pytest

from fedmpi.errors import PeerLost
from fedmpi.transports import sockets
from fedmpi.transports.sockets import Listener, SocketWire, call

LARGE = 32 << 20


@pytest.fixture
def pair() -> Iterator[tuple[SocketWire, SocketWire]]:
    """The server's end and a client's."""
    listener = Listener("127.0.0.1")
    theirs = call(["127.0.0.1"], listener.port, listener.secret, 1, 1)
    ours = listener.link(1, 1, 5)
    yield ours, theirs
    ours.close(), theirs.close()


def test_parts_of_all_sizes_arrive_in_order_however_they_are_cut(pair: tuple[SocketWire, SocketWire]) -> None:
    ours, theirs = pair
    sent = [bytes([number]) * size for number, size in enumerate((1, 0, 64, LARGE, 3))]
    writing = threading.Thread(target=ours.write, args=[memoryview(part) for part in sent])
    writing.start()
    got = bytearray(sum(map(len, sent)))
    theirs.read(memoryview(got)[:7], memoryview(got)[7:])
    writing.join(10)
    assert bytes(got) == b"".join(sent)


@pytest.mark.parametrize("closes", [0, 1], ids=["this side", "the other side"])
def test_who_is_in_the_middle_of_a_piece_wakes_up_when_a_side_closes(pair: tuple[SocketWire, SocketWire], closes: int) -> None:
    """Both a sender whose bytes nobody takes and a receiver of whose piece half has come, who then closes this side as links do."""
    ours, theirs = pair
    theirs.write(memoryview(bytes(10)))
    failed: list[str] = []

    def waits(act: str, part: memoryview) -> None:
        try:
            getattr(ours, act)(part)
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


def test_clients_may_call_in_any_order_and_strangers_do_not_count() -> None:
    listener = Listener("")
    stranger = socket.create_connection(("127.0.0.1", listener.port))
    stranger.sendall(b"x" * 64)
    silent = socket.create_connection(("127.0.0.1", listener.port))
    silent.close()
    wires = {client: call(["no-such-host.invalid", "127.0.0.1"], listener.port, listener.secret, client, 3) for client in (2, 1)}
    for client in (1, 2):
        listener.link(client, 3, 5).write(memoryview(bytes([client])))
        said = bytearray(1)
        wires[client].read(memoryview(said))
        assert said[0] == client
    stranger.close()
    with pytest.raises(PeerLost, match="rank 1 did not come back to its link within 0.1 s"):
        listener.link(1, 4, 0.1)


def test_where_nobody_answers_every_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "CALL_S", 0.5)
    listener = Listener("127.0.0.1")
    port = listener.port
    listener._socket.close()
    with pytest.raises(ConnectionError, match=f"127.0.0.1 port {port}: Connection refused"):
        call(["127.0.0.1", "127.0.0.1"], port, listener.secret, 1, 1)
