"""What every transport must do, as programs that all ranks run: the server's lines and the clients' lines side by side.

Cases of `GENTLE` share one transport and leave it whole; `leaves` comes last on it. The others need one of their own.
A case raises on the rank where something is wrong; what it returns is told to the test.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from types import SimpleNamespace, TracebackType

import torch

from fedmpi.errors import Aborted, LinkError, PeerLost, PeerSilent, ProtocolError
from fedmpi.federation.post import Post
from fedmpi.messages import Header, Kind
from fedmpi.transports.base import Message, Transport
from fedmpi.transports.link import NUM_CHUNKS
from fedmpi.transports.outgoing import Outgoing, Traffic
from fedmpi.transports.together import BROADCAST_BYTES

CHUNK_BYTES = 5000  # the artificial limit: what holds past it holds past 2 GiB, where the real limit is
TIMEOUT_S = 4.0


class raises(SimpleNamespace):
    """As pytest.raises; importing pytest in each of many ranks takes longer than the cases do."""

    def __init__(self, kind: type[BaseException], match: str = "") -> None:
        super().__init__(kind=kind, match=match, value=None)

    def __enter__(self) -> "raises":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        assert kind is not None, f"{self.kind.__name__} was not raised"
        self.value = error
        assert not issubclass(kind, self.kind) or re.search(self.match, str(error)), f"{self.match!r} not in {error}"
        return issubclass(kind, self.kind)


def pattern(num_bytes: int, seed: int) -> bytes:
    """Bytes of which no two chunks are alike."""
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).numpy().tobytes()


def content(message: Message) -> bytes:
    """The payload, and its buffer given back."""
    data = b"" if message.payload is None else message.payload.numpy().tobytes()
    message.release()
    return data


def update(t: Transport, number: int = 0, data: bytes = b"") -> None:
    """A client's message to the server."""
    t.send(0, Header(Kind.UPDATE, number, t.rank), memoryview(data))


def meet(t: Transport) -> None:
    """Nobody goes on before all are here."""
    if t.rank:
        t.send(0, Header(Kind.HELLO))
        assert t.receive([0], "meet").header.kind == Kind.WELCOME
    else:
        for peer in t.peers:
            assert t.receive([peer], "meet").header.kind == Kind.HELLO
        assert t.send_all(t.peers, Header(Kind.WELCOME))() == {}


def order(t: Transport) -> None:
    """First in, first out per link, both ways, large and small mixed."""
    sizes = [(number * 3701) % 23_000 for number in range(40)]
    if t.rank:
        for number, size in enumerate(sizes):
            update(t, number, pattern(size, number))
        for number in range(40):
            assert t.receive([0], "order").header.round == number
        return
    seen = dict.fromkeys(t.peers, 0)
    for _ in range(40 * len(t.peers)):
        message = t.receive(None, "order")
        number = seen[message.peer]
        assert (message.header.round, message.header.client) == (number, message.peer)
        assert content(message) == pattern(sizes[number], number)
        seen[message.peer] += 1
    for number in range(40):
        t.send_all(t.peers, Header(Kind.BROADCAST, number), memoryview(pattern(number * 997, number)))()


def sizes(t: Transport) -> None:
    """From nothing over the edges of a chunk to hundreds of chunks; the counters on both sides agree."""
    lengths = [0, 1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 65_536, 65_537, 3_000_001]
    before = t.sent[t.peers[0]].payload_bytes, t.received[t.peers[0]].payload_bytes
    for number in lengths:
        data = pattern(number, number)
        if t.rank == 0:
            assert t.send_all(t.peers, Header(Kind.BROADCAST, 3, manifest=2**64 - 1), memoryview(data))() == {}
            assert all(content(t.receive([peer], "sizes")) == data for peer in t.peers)
        else:
            message = t.receive([0], "sizes")
            assert (message.header.length, message.header.manifest) == (number, 2**64 - 1)
            update(t, 3, content(message))
    after = t.sent[t.peers[0]].payload_bytes, t.received[t.peers[0]].payload_bytes
    assert after == (before[0] + sum(lengths), before[1] + sum(lengths))


def counters(t: Transport) -> None:
    """What one side sent is what the other received, to the byte, header bytes included."""
    if t.rank:
        update(t, 0, f"{numbers(t.sent[0])} {numbers(t.received[0])}".encode())
        t.receive([0], "counters")
        return
    for peer in t.peers:
        message = t.receive([peer], "counters")
        last = Traffic()
        last.count(message.header, message.header.length)
        up = [all_ - one for all_, one in zip(numbers(t.received[peer]), numbers(last), strict=True)]
        assert content(message).decode() == f"{up} {numbers(t.sent[peer])}"
    t.send_all(t.peers, Header(Kind.ROUND))()


def numbers(traffic: Traffic) -> list[int]:
    """What must agree on both sides; control messages may be under way at any time."""
    return [traffic.messages, traffic.payload_bytes, traffic.header_bytes]


def arrival(t: Transport) -> None:
    """Messages are taken in the order they came in, not in the order of ranks; a client may send more than another."""
    if t.rank == 0:
        got = []
        for peer in reversed(t.peers):
            t.send(peer, Header(Kind.ROUND))
            while not any(message.peer == peer for message in t._inbox._messages):
                time.sleep(0.001)
        for _ in range(sum(t.peers)):
            got.append(t.receive(None, "arrival").peer)
        assert list(dict.fromkeys(got)) == list(reversed(t.peers))
        assert all(got.count(peer) == peer for peer in t.peers)
        t.send_all(t.peers, Header(Kind.ROUND))()
    else:
        t.receive([0], "arrival")
        for _ in range(t.rank):
            update(t)
        t.receive([0], "arrival")


def chosen(t: Transport) -> None:
    """Who waits for one peer gets its large message, though others' fill all the buffers."""
    if t.rank:
        for number in range(4):
            update(t, number, pattern(200_000, t.rank))
        return
    for _ in range(4):
        for peer in reversed(t.peers):
            message = t.receive([peer], "chosen")
            assert content(message) == pattern(200_000, peer)
    assert t._inbox._in_use == 0


def in_chunks(t: Transport) -> None:
    """A large message of the kinds asked for comes in parts, in their order, its note with the first; those of peers in turn.

    While nobody takes them the buffers are few, however many peers send; a small message comes whole.
    """
    size = 30 * CHUNK_BYTES + 17
    if t.rank:
        t.receive([0], "in_chunks")
        for number in range(2):
            t.send(0, Header(Kind.UPDATE, number, t.rank), memoryview(pattern(size, t.rank)), f"note {number}".encode())
            t.send(0, Header(Kind.UPDATE, number, t.rank), memoryview(pattern(100, number)), b"small")
        t.receive([0], "in_chunks")
        return
    t.in_chunks = frozenset({Kind.UPDATE})
    t.send_all(t.peers, Header(Kind.ROUND))()
    until(lambda: t._inbox._in_use == NUM_CHUNKS)
    whole: dict[int, bytes] = dict.fromkeys(t.peers, b"")
    for _ in range(2 * len(t.peers) * 32):
        message = t.receive(None, "in_chunks")
        assert message.first == len(whole[message.peer])
        assert message.note.strip() == (b"" if message.first else b"small" if message.last else b"note %d" % message.header.round)
        ends, whole[message.peer] = message.last, whole[message.peer] + content(message)
        if ends:
            data = pattern(*((100, message.header.round) if message.header.length == 100 else (size, message.peer)))
            assert whole[message.peer] == data
            whole[message.peer] = b""
    assert not any(whole.values()) and t._inbox._in_use == 0
    t.in_chunks = frozenset()
    t.send_all(t.peers, Header(Kind.ROUND))()


def busy(t: Transport) -> None:
    """Neither sleep nor work is silence, however much longer than the deadline it lasts."""
    if t.rank:
        end = time.monotonic() + 3 * t.timeout_s
        while time.monotonic() < end:
            if t.rank == 1:
                time.sleep(3 * t.timeout_s)
            else:
                torch.mm(torch.ones(200, 200), torch.ones(200, 200))
        update(t, 1)
    else:
        assert all(t.receive([peer], "busy").header.kind == Kind.UPDATE for peer in t.peers)


def disagreement(t: Transport) -> None:
    """A peer in another round, or with other tensors, is named with both numbers."""
    if t.rank:
        update(t, 7)
        return
    for peer in t.peers:
        message = t.receive([peer], "disagreement")
        with raises(ProtocolError, match=f"rank {peer} sent UPDATE of round 7, expected UPDATE of round 8"):
            Post(t).expected(message, Kind.UPDATE, 8)
    t.in_chunks = frozenset()  # a post wants updates in pieces; the cases that follow count whole messages


def stop(t: Transport) -> None:
    """A rank that was asked to stop tells the server, without a message that anybody has to receive."""
    if t.rank == 1:
        if hasattr(t, "_in_threads"):
            t.want_stop()
        else:
            old = signal.signal(signal.SIGUSR1, lambda *_: t.want_stop())
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, old)
        assert t.stop_wanted()
    elif t.rank == 0:
        until(t.stop_wanted)


def until(happened: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for something that must happen soon."""
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.005)


def reopen(t: Transport) -> None:
    """A new generation carries on; what was on its way on the old one is never seen; other links do not notice."""
    last = t.peers[-1] if t.rank == 0 else t.size - 1
    if t.rank == last:
        update(t, 1, pattern(100_000, 1))
        update(t, 2)
        t.receive([0], "reopen")
        t.reopen(0)
        update(t, 3)
    elif t.rank == 0:
        until(lambda: [message.peer for message in t._inbox._messages].count(last) == 2)
        t.send(last, Header(Kind.ROUND))
        t.reopen(last)
        assert t.receive([last], "reopen").header.round == 3
        assert last not in t.failures


class Flipper:
    """A wire that damages one bit of each long piece."""

    def __init__(self, wire: object) -> None:
        self.wire = wire

    def write(self, *parts: memoryview) -> None:
        damaged = [bytearray(part) for part in parts]
        for part in damaged:
            part[len(part) // 2] ^= 4 if len(part) >= 1000 else 0
        self.wire.write(*map(memoryview, damaged))

    def __getattr__(self, name: str) -> object:
        return getattr(self.wire, name)


def refused(t: Transport, wrong: Callable[[], None], match: str) -> None:
    """Rank 1 does something wrong; the server says what, drops the link, and can be on good terms again."""
    if t.rank == 1:
        with raises(PeerLost):
            wrong()
            t.receive([0], "refused")
        t.reopen(0)
        update(t, 5)
    elif t.rank == 0:
        with raises(ProtocolError, match=match):
            t.receive([1], "refused")
        assert isinstance(t.failures[1], ProtocolError)
        with raises(ProtocolError, match=match):
            t.send(1, Header(Kind.ROUND))
        t.reopen(1)
        assert t.receive([1], "refused").header.round == 5


def flipped(t: Transport) -> None:
    """A damaged bit is found in a small and in a large payload."""
    for size in (2_000, 50_000):

        def wrong(size: int = size) -> None:
            link = t._links[0]
            link._wire = Flipper(link._wire)
            update(t, 4, pattern(size, 1))

        refused(t, wrong, "rank 1 broke the protocol: checksum of the chunk")


def lying(t: Transport) -> None:
    """A length that is too large, honest or not, is refused before memory is set aside."""

    def absurd() -> None:
        t._links[0]._wire.write(memoryview(bytearray(Header(Kind.UPDATE, length=1 << 40).pack())))

    def honest() -> None:
        update(t, 1, bytes(300_000))

    def garbage() -> None:
        t._links[0]._wire.write(memoryview(bytearray(b"GET / HTTP/1.1".ljust(64))))

    limit, t.limit_bytes = t.limit_bytes, 250_000
    meet(t)  # the limit holds before anybody sends
    refused(t, absurd, "UPDATE claims 1099511627776 bytes, at most 250000")
    refused(t, honest, "UPDATE claims 300000 bytes, at most 250000")
    refused(t, garbage, "b'GET '")
    t.limit_bytes = limit


def collectives(t: Transport) -> None:
    """One buffer to all and the sum of all, exactly, in more than one piece; counted on both sides; anew as often as asked for."""
    for seed, size in enumerate((BROADCAST_BYTES + 17, 100)):
        together = t.together()
        data = torch.frombuffer(bytearray(pattern(size, seed) if t.rank == 0 else bytes(size)), dtype=torch.uint8)
        sent, received = t.sent[t.peers[0]].payload_bytes, t.received[t.peers[0]].payload_bytes
        together.broadcast(data, "collectives")
        assert data.numpy().tobytes() == pattern(size, seed)
        values = [torch.full((number,), 2.0**52 / 4 - 10**t.rank, dtype=torch.float64) for number in (1, 70_001)]
        for begun in [together.add(one) for one in values]:
            together.wait(begun, "collectives")
        assert t.rank or all((one == 2.0**52 - sum(10**rank for rank in range(t.size))).all() for one in values)
        moved = t.sent[t.peers[0]].payload_bytes - sent, t.received[t.peers[0]].payload_bytes - received
        assert moved == ((8 * 70_002, size) if t.rank else (size, 8 * 70_002))
        together.close()


def dies_together(t: Transport) -> str:
    """Who dies before it enters a collective is named by rank 0, and nobody who is inside hangs."""
    with raises(LinkError) as caught, t:
        together = t.together()
        meet(t)
        if t.rank == 2:
            die(t)
            raise LinkError("a thread has only broken its wire")
        before = time.monotonic()
        try:
            together.wait(together.add(torch.zeros(9, dtype=torch.float64)), "adding up")
        finally:
            assert time.monotonic() - before < t.timeout_s / 2
    return str(caught.value)


GENTLE = (order, sizes, counters, arrival, chosen, in_chunks, busy, disagreement, stop, collectives, reopen, flipped, lying)


def dies(t: Transport) -> str | None:
    """A peer that dies is noticed at once, by name, and the others go on."""
    if t.rank == 2:
        t.receive([0], "go")
        die(t)
    elif t.rank == 0:
        t.send_all(t.peers, Header(Kind.ROUND, 6))()
        before = time.monotonic()
        with raises(PeerLost, match="gather, round 6: rank 2 is gone") as caught:
            t.receive([2], "gather")
        assert time.monotonic() - before < t.timeout_s / 2
        with raises(PeerLost, match="rank 2"):
            t.send(2, Header(Kind.ROUND, 7))
        assert list(t.send_all([1, 2], Header(Kind.ROUND, 7))()) == [2]
        assert t.receive([1], "gather").header.round == 1
        return str(caught.value)
    else:
        t.receive([0], "go")
        t.receive([0], "go")
        update(t, 1)
    return None


def breaks_off(t: Transport) -> str | None:
    """A peer that dies inside a message that comes in chunks: what has come can be taken, then it is named, and nothing hangs."""
    if t.rank == 2:
        t.receive([0], "go")
        link = t._links[0]
        message = Outgoing(Header(Kind.UPDATE, 6, 2), memoryview(pattern(40 * CHUNK_BYTES, 2)), CHUNK_BYTES)
        for _, parts in zip(range(3), message.parts(), strict=False):
            link._wire.write(*parts)
        t.receive([0], "go")
        die(t)
    elif t.rank == 0:
        t.in_chunks = frozenset({Kind.UPDATE})
        t.send_all(t.peers, Header(Kind.ROUND, 6))()
        parts = [t.receive([2], "gather") for _ in range(3)]
        assert [part.first for part in parts] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES] and not parts[-1].last
        t.send_all(t.peers, Header(Kind.ROUND, 6))()
        with raises(PeerLost, match="gather, round 6: rank 2 is gone after 15000 of 200000 bytes of its UPDATE") as caught:
            t.receive([2], "gather")
        assert t.receive([1], "gather").header.round == 1
        return str(caught.value)
    else:
        t.receive([0], "go")
        t.receive([0], "go")
        update(t, 1)
    return None


def die(t: Transport) -> None:
    """As SIGKILL does; a thread can only break its wire."""
    if hasattr(t, "_in_threads"):
        t._links[0].close()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def silent(t: Transport) -> None:
    """A peer that hangs as a whole is told from one that is busy: who receives and who sends wakes up."""
    if t.rank == 2:
        update(t, os.getpid())
        t.receive([0], "go")
        if hasattr(t, "_in_threads"):
            t._links[0]._writing.acquire()
        else:
            os.kill(os.getpid(), signal.SIGSTOP)
        with raises(PeerLost):
            t.receive([0], "after")
    elif t.rank == 0:
        pid = t.receive([2], "pid").header.round
        t.send(2, Header(Kind.ROUND, 6))
        big = memoryview(bytearray(200 << 20))
        with raises(PeerSilent, match="rank 2 gave no sign of life"):
            if hasattr(t, "_in_threads"):
                t.receive([2], "gather")
            else:
                t.send(2, Header(Kind.BROADCAST, 6), big)
        with raises(PeerSilent, match=r"gather, round \d+: rank 2 gave no sign of life for 4 s"):
            t.receive([1, 2], "gather")
        if pid != os.getpid():
            os.kill(pid, signal.SIGCONT)
        t.send(1, Header(Kind.ROUND, 6))
    else:
        t.receive([0], "gather")


def abort(t: Transport) -> str:
    """One rank's error ends every rank's wait, wherever it waits, with that error's text."""
    with raises(LinkError if t.rank != 1 else OSError) as caught, t:
        meet(t)
        if t.rank == 1:
            raise OSError("the disk is full\nat all")
        if t.rank == 2:
            t.receive([0], "idle")
        while True:  # the server is in receive, rank 3 finds out at its next message
            time.sleep(0.05)
            t.receive([2], "idle") if t.rank == 0 else update(t)
    assert t.rank == 1 or isinstance(caught.value, Aborted)
    return str(caught.value)


def leaves(t: Transport) -> str | None:
    """Who leaves in good order is told from who is lost; a use after the end is an error."""
    if t.rank == 0:
        with raises(PeerLost, match="gather, round \\d+: rank 1 has left in good order"):
            t.receive([1], "gather")
        t.send_all([2, 3], Header(Kind.ROUND))()
        return "rank 1 has left in good order"
    if t.rank > 1:
        t.receive([0], "last")
    t.close()
    with raises(LinkError, match="after it was closed"):
        t.send(0, Header(Kind.HELLO))
    return None


def welcome_back(t: Transport) -> None:
    """The rank that died (see `dies`) is a new process now; server and the others have stayed."""
    if t.rank == 0:
        t.send(2, Header(Kind.ROUND))
        with raises(PeerLost):
            t.receive([2], "gather")
        t.reopen(2)
        assert t.receive([2], "back").header.round == 9
        assert t.send_all(t.peers, Header(Kind.ROUND, 10))() == {}
        return
    if t.rank == 2:
        update(t, 9)
    assert t.receive([0], "go").header.round == 10
