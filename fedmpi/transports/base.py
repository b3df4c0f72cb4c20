"""What a transport is, once for all of them: ordered messages to and from peers, each wait with a deadline by progress.

An opener (`torch_dist`, `mpi`, `in_process`) hands over one wire per peer; all the rest is here, in `link` and in
`inbox`. This module must never know MPI, torch.distributed, clients, models, or what a payload means.
"""

import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

from fedmpi.errors import Aborted, LinkError, PeerLost, ended
from fedmpi.messages import CHUNK_BYTES, Header, Kind, Payload
from fedmpi.transports.inbox import Inbox, Message
from fedmpi.transports.link import Link, Wire
from fedmpi.transports.outgoing import Outgoing, Traffic, is_small
from fedmpi.transports.together import Body, Together
from fedmpi.transports.watchdog import Watchdog

Failures = dict[int, LinkError]  # by peer
GRACE_S = 3.0  # how long the others are given to take note of an abort


class Transport:
    """Links of one rank to its peers: the server has one to each client leader, a client one to the server."""

    def __init__(
        self,
        rank: int,
        size: int,
        wires: Mapping[int, Wire],
        reconnect: Callable[[int], Wire],
        *,
        timeout_s: float,
        chunk_bytes: int = CHUNK_BYTES,
        turn: AbstractContextManager[object] | None = None,
        last_resort: Callable[[], None] | None = None,
        asks: Callable[[int], bool] | None = None,
        gather_all: Callable[[int], Body] | None = None,
    ) -> None:
        self.rank, self.size, self.peers, self.timeout_s = rank, size, tuple(sorted(wires)), timeout_s
        self.limit_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # more could not be held anyway
        self.in_chunks: frozenset[Kind] = frozenset()  # of these kinds, large payloads are received chunk by chunk
        self.tolerant = False  # a peer that ends with an error ends its link, and not the job
        self.turn = nullcontext() if turn is None else turn
        self.sent, self.received = ({peer: Traffic() for peer in self.peers} for _ in range(2))
        self.past: list[Traffic] = []  # of links that were made anew since
        self.failures: dict[int, LinkError] = {}
        self._chunk_bytes, self._reconnect, self._last_resort, self._asks = chunk_bytes, reconnect, last_resort, asks
        self._gather_all, self._num_gathered = gather_all, 0
        self._period_s = min(1.0, timeout_s / 4)
        self._state = threading.Condition()
        self._inbox = Inbox(self._state)
        self._aborted: str | None = None
        self._stop = self._closing = False
        self._over = threading.Event()
        self._round = -1
        self._senders = ThreadPoolExecutor(max(1, len(self.peers)), f"send-{rank}")
        self._links = {peer: self._over_wire(peer, wire) for peer, wire in wires.items()}
        for link in self._links.values():
            link.start()
        Watchdog(lambda: list(self._links.values()), self.lost, self._over, timeout_s, self._period_s)

    def _over_wire(self, peer: int, wire: Wire) -> Link:
        return Link(peer, wire, self, self.sent[peer], self.received[peer], self._period_s)

    # what the program calls

    def send(self, peer: int, header: Header, payload: Payload | None = None, note: bytes = b"") -> None:
        """Send one message; returns when the payload may be overwritten."""
        self._deliver(peer, Outgoing(header, payload, self._chunk_bytes, note))

    def send_all(
        self,
        peers: Collection[int],
        header: Header,
        payload: Payload | None = None,
        note: bytes = b"",
        behind: bool = False,
        then: Callable[[int], Failures] | None = None,
    ) -> Callable[[], Failures]:
        """Begin to send one message to several peers at once; a slow or lost one holds up nobody.

        What is given back waits until all of it has left, and gives failures; nothing else may be sent to these peers before that.
        `behind` other work even one peer is served by a thread of its own; `then` follows for each peer that has got all.
        """
        message = Outgoing(header, payload, self._chunk_bytes, note)
        if is_small(message.header) or (len(peers) == 1 and not behind):  # other threads would cost more than the wait
            tried = [self._try(peer, message, then) for peer in peers]
            ends: Callable[[], list[Failures]] = lambda: tried  # noqa: E731
        else:
            sending = [self._senders.submit(self._try, peer, message, then) for peer in peers]
            ends = lambda: [one.result() for one in sending]  # noqa: E731

        def left() -> Failures:
            failed = {peer: error for failures in ends() for peer, error in failures.items()}
            self.check(header.kind.name)
            return failed

        return left

    def receive(self, peers: Collection[int] | None = None, phase: str = "receive") -> Message:
        """The next message, or part of one, in arrival order, of any of these peers (default: all). Waits while all of them live.

        The parts of one message come in their order, those of several peers in turn. A link that breaks inside a message raises.
        """
        wanted = frozenset(self.peers if peers is None else peers)
        if not wanted:
            raise LinkError(f"{phase}: rank {self.rank} of {self.size} has nobody to receive from")
        message = self._inbox.next(wanted, lambda: self._nothing_from(wanted, phase))
        self.check(phase)
        self._round = max(self._round, message.header.round)
        return message

    def holds(self, peers: Collection[int]) -> bool:
        """Whether a message of any of these peers is there, so that `receive` would not wait."""
        return self._inbox.holds(frozenset(peers))

    def drop(self, peer: int, why: str) -> None:
        """Give up a link, and tell the peer why: it ends with this text."""
        link = self._links[peer]
        if not link.closed and not link.ended:
            link.post(Kind.ABORT, why)
            with self._state:
                self._state.wait_for(lambda: link.ended or link.closed, GRACE_S)
        self.failures.setdefault(peer, PeerLost(why))
        self.lost(link, self.failures[peer])

    def check(self, phase: str = "check") -> None:
        """Raise Aborted if any rank has ended the job; cheap enough for every training step."""
        if self._aborted is not None:
            raise Aborted(self._aborted)
        if self._over.is_set():
            raise LinkError(f"{phase}: rank {self.rank} uses its transport after it was closed")

    def want_stop(self) -> None:
        """Tell the others soon that this rank was asked to stop. Safe in a signal handler."""
        self._stop = True
        for link in self._links.values():
            link.post(Kind.STOP_WANTED)

    def stop_wanted(self) -> bool:
        """Whether any rank was asked to stop, as far as it is known here."""
        return self._stop

    def together(self) -> Together:
        """A collective of all ranks, which all of them ask for at the same place; each has a generation of its own."""
        if self._gather_all is None:
            raise LinkError(f"rank {self.rank} of {self.size} has nobody to be in a collective with")
        self._num_gathered += 1
        return Together(self, self._gather_all(self._num_gathered))

    def alive(self, phase: str) -> None:
        """Raise where the job or any of the links has come to an end."""
        with self._state:
            self._nothing_from(frozenset(self.peers), phase)

    @property
    def can_return(self) -> bool:
        """Whether a rank that was lost can have a new link."""
        return self._asks is not None

    def asking(self) -> list[int]:
        """The lost peers that ask for a new link: `reopen` gives it."""
        return [peer for peer in self.failures if self._asks is not None and self._asks(peer)]

    def reopen(self, peer: int) -> None:
        """Make the link anew, on both sides; nothing that was on the old one can be seen on the new one."""
        old = self._links[peer]
        with self._state:
            old.closed = True
            self._state.notify_all()
        old.close()
        old.join(GRACE_S)
        self._inbox.drop(peer)
        try:
            wire = self._reconnect(peer)
        except LinkError as error:
            self.failures[peer] = error
            raise
        with self._state:
            self.failures.pop(peer, None)
            self.past += [self.sent[peer], self.received[peer]]
            self.sent[peer], self.received[peer] = Traffic(), Traffic()
            self._links[peer] = self._over_wire(peer, wire)
        self._links[peer].start()

    def abort(self, error: BaseException) -> None:
        """End the job on every rank: all waits there raise Aborted with this error's text. Returns within a grace."""
        self._spread(ended(self.rank, error), None)
        clean = self._wait_for_ends(min(GRACE_S, self.timeout_s))
        self._shut()
        if self._last_resort is not None and not clean:
            self._last_resort()

    def close(self) -> None:
        """Leave in good order: wait until every peer that lives has said goodbye too."""
        with self._state:
            if self._closing:
                return
            self._closing = True
            self._state.notify_all()
        for link in self._links.values():
            link.post(Kind.BYE)
        self._wait_for_ends(None)
        self._shut()
        if self._aborted is not None:
            raise Aborted(self._aborted)

    def __enter__(self) -> "Transport":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abort(error)

    # what the links call, each from threads of its own

    def take(self, link: Link, num_bytes: int, num_buffers: int) -> torch.Tensor | None:
        """One of so many buffers for a large payload, or None when nobody will want it."""
        unwanted = lambda: link.closed or self._closing or self._aborted is not None  # noqa: E731
        return self._inbox.take(link.peer, num_bytes, num_buffers, unwanted)

    def spoil(self, link: Link) -> None:
        """The payload on its way will not come."""
        self._inbox.spoil(link.peer)

    def arrived(self, link: Link, header: Header, payload: torch.Tensor | None, note: bytes, place: slice) -> None:
        """Sort a message, or a part of one: control is dealt with at once, the rest goes to the inbox."""
        if header.kind == Kind.HEARTBEAT:
            return
        with self._state:
            if header.kind == Kind.STOP_WANTED:
                if not self._stop:  # the server hears it from one client and tells the others
                    self.want_stop()
            elif header.kind == Kind.ABORT:
                text = (b"" if payload is None else payload.numpy().tobytes()).decode(errors="replace")
                if self.tolerant:
                    self.failures.setdefault(link.peer, PeerLost(text))
                    link.post(Kind.BYE)
                else:
                    self._spread(text, link)
            elif header.kind != Kind.BYE and not link.closed:
                self._inbox.put(Message(link.peer, header, payload, note, place.start, place.stop))
            self._state.notify_all()

    def lost(self, link: Link, error: LinkError) -> None:
        """Take note of the first thing that went wrong on a link, and wake everyone who waits for it."""
        with self._state:
            if link.closed or link.ended:
                return
            link.closed = True
            self.failures[link.peer] = error
            self._state.notify_all()
        link.close()

    # inside

    def _try(self, peer: int, message: Outgoing, then: Callable[[int], Failures] | None) -> Failures:
        try:
            self._deliver(peer, message)
        except LinkError as error:
            return {peer: error}
        return {} if then is None else then(peer)

    def _deliver(self, peer: int, message: Outgoing) -> None:
        phase = message.header.kind.name
        self.check(phase)
        self._round = max(self._round, message.header.round)
        link = self._links[peer]
        if peer in self.failures:
            raise self._failure(peer, phase)
        try:
            link.send(message)
        except ConnectionError as error:
            self.lost(link, PeerLost(f"rank {peer} is gone: {error}; its own output says why"))
            self.check(phase)
            raise self._failure(peer, phase) from None

    def _failure(self, peer: int, phase: str) -> LinkError:
        error = self.failures.get(peer) or PeerLost(f"rank {peer} has left in good order, though more was expected")
        return type(error)(f"{phase}, round {self._round}: {error}")

    def _nothing_from(self, wanted: frozenset[int], phase: str) -> None:
        """Called under the lock when no message of these peers is there: raise if that cannot or must not change."""
        self.check(phase)
        for peer in sorted(wanted):
            if peer in self.failures or self._links[peer].ended:
                raise self._failure(peer, phase)

    def _spread(self, text: str, origin: Link | None) -> None:
        """Remember the first abort, tell everyone who does not know yet, and thank the one who told us."""
        with self._state:
            if self._aborted is not None:
                return
            self._aborted = text
            for link in self._links.values():
                link.post(*((Kind.BYE,) if link is origin else (Kind.ABORT, text)))
            self._state.notify_all()

    def _wait_for_ends(self, timeout_s: float | None) -> bool:
        """Wait until every link has ended or failed; whether all of them ended in good order."""
        with self._state:
            links = self._links.values()
            self._state.wait_for(lambda: all(link.ended or link.closed for link in links), timeout_s)
            return all(link.ended for link in links)

    def _shut(self) -> None:
        self._over.set()
        for link in self._links.values():
            link.close()
        for link in self._links.values():
            link.join(GRACE_S)
        self._senders.shutdown(wait=False)
