"""Memory lent between ranks of one machine: what the reader gets, what nobody else may do to it, and how a link ends."""

import array
import fcntl
import mmap
import os
import resource
import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from fedmpi.errors import PeerLost
from fedmpi.tensors import lent, room
from fedmpi.transports import shared
from fedmpi.transports.shared import SharedWire

NUM = 3 * shared.LENT_BYTES


@pytest.fixture
def ends() -> Iterator[tuple[SharedWire, SharedWire]]:
    """The server's and the client's end of a link."""
    listener = shared.Listener()
    client = shared.call(listener.name, 3, 1)
    assert client is not None
    server = listener.link(3, 1)
    yield server, client
    server.close()
    client.close()


def written(wire: SharedWire, *parts: memoryview) -> threading.Thread:
    thread = threading.Thread(target=wire.write, args=parts)
    thread.start()
    return thread


def test_pieces_of_all_lengths_arrive_in_both_directions(ends: tuple[SharedWire, SharedWire]) -> None:
    for here, there in (ends, ends[::-1]):
        parts = [os.urandom(num) for num in (1, shared.LENT_BYTES - 1, shared.LENT_BYTES, NUM, 64)]
        thread = written(here, *map(memoryview, parts))
        got = [bytearray(len(part)) for part in parts]
        there.read(*map(memoryview, got), heard=int)
        thread.join()
        assert got == parts


def test_a_part_of_lendable_memory_is_lent_where_it_lies(ends: tuple[SharedWire, SharedWire], monkeypatch) -> None:
    values = room(NUM, torch.uint8, to_lend=True)
    values.random_(0, 256)
    monkeypatch.setattr(shared, "room", None)  # nobody makes a copy
    part, got = values[100 : 100 + shared.LENT_BYTES], torch.empty(shared.LENT_BYTES, dtype=torch.uint8)
    thread = written(ends[0], part.numpy().data)
    ends[1].read(got.numpy().data, heard=int)
    thread.join()
    assert torch.equal(got, part)


def test_the_next_pieces_are_made_ready_while_one_is_copied_and_none_is_free_before(ends: tuple[SharedWire, SharedWire]) -> None:
    size = 7 * NUM + 64  # like nothing that other tests have left idle
    pieces = [room(size, torch.uint8, to_lend=True).random_(0, 256) for _ in range(shared.MOST_LENT)]
    addresses = {piece.data_ptr() for piece in pieces}
    wanted, got = [piece.clone() for piece in pieces], [torch.empty(size, dtype=torch.uint8) for _ in pieces]
    for piece in pieces:
        ends[0].write(piece.numpy().data)  # does not wait for anybody
    del piece, pieces
    assert room(size, torch.uint8, to_lend=True).data_ptr() not in addresses
    thread = threading.Thread(target=ends[0].flush)
    thread.start()
    ends[1].read(*(part.numpy().data for part in got), heard=int)
    thread.join()
    assert all(map(torch.equal, got, wanted))
    assert room(size, torch.uint8, to_lend=True).data_ptr() in addresses


def test_where_no_more_files_may_be_open_memory_is_there_and_is_not_lent() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    size = 11 * NUM + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        values = room(size, torch.uint8, to_lend=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert values.fill_(3).sum() == 3 * size and lent(values.numpy().data) is None


def test_nobody_else_can_change_lendable_memory_or_cut_it_short() -> None:
    values = room(NUM, torch.uint8, to_lend=True)
    found = lent(values.numpy().data)
    assert found is not None and lent(memoryview(bytes(NUM))) is None
    file = os.open(f"/proc/self/fd/{found[0]}", os.O_RDWR)
    try:
        for change in (lambda: os.ftruncate(file, 1), lambda: os.pwrite(file, b"x", 0), lambda: mmap.mmap(file, NUM)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(PermissionError):
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    finally:
        os.close(file)


def test_lendable_memory_is_used_again_and_never_for_what_is_not_lent() -> None:
    first = room(NUM << 4, torch.uint8, to_lend=True)
    address = first.data_ptr()
    assert room(NUM << 4, torch.uint8, to_lend=True).data_ptr() != address
    del first
    assert room(NUM << 4, torch.uint8).data_ptr() != address
    assert room(NUM << 4, torch.uint8, to_lend=True).data_ptr() == address


@pytest.mark.parametrize(("said", "num", "match"), [((0, NUM), NUM // 2, "fewer were lent"), ((0, 5), NUM, "lends 5 bytes")])
def test_who_lends_less_than_it_said_breaks_the_link(said: tuple[int, int], num: int, match: str) -> None:
    ours, theirs = socket.socketpair()
    file = os.memfd_create("less")
    os.ftruncate(file, num)
    theirs.sendmsg([shared._PLACE.pack(*said)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))])
    os.close(file)
    with pytest.raises(ConnectionError, match=match):
        SharedWire(ours, ours).read(memoryview(bytearray(NUM)), heard=int)
    theirs.close()


def test_a_peer_that_says_nothing_of_memory_breaks_the_link() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(bytes(shared._PLACE.size))
    with theirs, pytest.raises(ConnectionError, match="closed the link"):
        SharedWire(ours, ours).read(memoryview(bytearray(NUM)), heard=int)


@pytest.mark.parametrize(("do", "num"), [("read", 1), ("write", NUM)])
def test_closing_wakes_who_waits_on_either_side(ends: tuple[SharedWire, SharedWire], do: str, num: int) -> None:
    errors: list[ConnectionError] = []

    def wait(end: SharedWire) -> None:
        try:
            end.read(memoryview(bytearray(num)), heard=int) if do == "read" else end.write(memoryview(bytearray(num)))
            end.flush()
        except ConnectionError as error:
            errors.append(error)

    threads = [threading.Thread(target=wait, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    ends[0].close()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 2


def test_a_server_that_cannot_be_reached_is_not_waited_for() -> None:
    assert shared.call("fedmpi-nobody", 1, 1) is None


def test_a_client_that_said_it_called_and_did_not_is_named(monkeypatch) -> None:
    monkeypatch.setattr(shared, "PATIENCE_S", 0.05)
    listener = shared.Listener()
    with pytest.raises(PeerLost, match="rank 7: its link on this machine could not be made"):
        listener.link(7, 1)
