"""The roll: on the server, which ranks are gone, and which clients still owe an answer to a round that went on without them.

A client that was asked answers once, however late. Until then it is not asked again, and what it says then is dropped; so nothing
on the wire needs to be matched to attempts. It knows links and placement; never what is trained, or how rounds are judged.
"""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any

from fedmpi.errors import Aborted, FedmpiError, LinkError, ProtocolError
from fedmpi.federation.post import Post, content
from fedmpi.federation.updates import Failure
from fedmpi.ledger import Ledger
from fedmpi.messages import Kind
from fedmpi.round import Placement, Round
from fedmpi.transports.inbox import Message

LOOK_S = 0.02  # between two looks at whether somebody is back
Readmit = Callable[[int, Message], bool]
_TENSORS = (Kind.UPDATE, Kind.CODED)


@dataclass
class Roll:
    """Kept by the server alone."""

    placement: Placement
    post: Post
    ledger: Ledger
    goes_on: bool = False  # without ranks that are gone; else the first of them ends the run
    readmit: Readmit | None = None  # what is told to a rank that was gone and greets again; whether it is back by that
    gone: dict[int, str] = field(default_factory=dict)  # by rank: why
    owed: dict[int, Failure] = field(default_factory=dict)  # by client that has not answered: why that was not waited for
    _late: Counter[int] = field(default_factory=Counter)  # by client, bytes of an answer of which the end has not come
    _coming: set[int] = field(default_factory=set)  # ranks that have a new link and have not greeted
    _events: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, readmit: Readmit) -> None:
        """From the first round on: what happened before ends the run in any case."""
        self.readmit = readmit
        if self.goes_on:
            self.post.transport.tolerant = True
            self.post.on_lost = self.look

    def look(self) -> None:
        """Note the links that broke."""
        if not self.goes_on:
            return
        for rank, error in self.post.transport.failures.items():
            if rank not in self.gone:
                self.gone[rank] = str(error)
                clients = self.placement.hosted_by(rank)
                print(f"fedmpi: rank {rank} is lost, the run goes on without clients {list(clients)}: {error}", flush=True)
                self._events.append({"event": "rank_lost", "rank": rank, "clients": list(clients), "message": str(error)})

    def note(self, **event: Any) -> None:
        """Something else that belongs into the record."""
        self._events.append(event)

    def told(self) -> list[dict[str, Any]]:
        """What happened since this was asked last, for the record."""
        events, self._events = self._events, []
        return events

    @property
    def here(self) -> list[int]:
        """The ranks that are spoken to."""
        return [rank for rank in self.post.transport.peers if rank not in self.gone]

    @property
    def behind(self) -> set[int]:
        """The ranks whose answers are still to come, of those that are here."""
        return {self.placement.leader_of[client] for client in self.owed} - self.gone.keys()

    def why_not(self, client: int) -> Failure | None:
        """Why this client cannot be asked, or cannot answer any more."""
        seat = self.placement.seat_of(self.placement.leader_of[client])
        lost = next((rank for rank in seat if rank in self.gone), None)
        if lost is not None:
            return Failure(client, "PeerLost", f"rank {lost} is gone: {self.gone[lost]}")
        return self.owed.get(client)

    def _open_door(self) -> None:
        """Ranks that were started again get a link, and when they have greeted, they are back."""
        for rank in self.post.transport.asking():
            with suppress(LinkError), self.post.apart():
                self.post.transport.reopen(rank)
                self.post.forget(rank)
                self._coming.add(rank)
        self._coming -= self.post.transport.failures.keys()
        for rank in [rank for rank in sorted(self._coming) if self.post.transport.holds({rank})]:
            try:
                assert self.readmit is not None
                if not self.readmit(rank, self.post.receive({rank}, "greeting a rank that is back")):
                    continue
            except FedmpiError as error:
                print(f"fedmpi: rank {rank} cannot come back: {error}", flush=True)
                self.post.transport.drop(rank, str(error))
                self._coming.discard(rank)
                continue
            self._coming.discard(rank)
            del self.gone[rank]
            print(f"fedmpi: rank {rank} is back, with clients {list(self.placement.hosted_by(rank))}", flush=True)
            self._events.append({"event": "rank_back", "rank": rank, "clients": list(self.placement.hosted_by(rank))})

    def absent(self) -> dict[int, Failure]:
        """The clients that cannot be asked now."""
        self.look()
        if self.gone and self.goes_on:
            self._open_door()
        self._take_late()
        found = {client: self.why_not(client) for client in range(len(self.placement.leader_of))}
        absent = {client: failure for client, failure in found.items() if failure is not None}
        return absent | {
            c: Failure(c, "Late", f"an earlier round is still unanswered ({failure})") for c, failure in self.owed.items()
        }

    def _take_late(self) -> None:
        """The late answers that are here; who is gone owes none any more."""
        self.look()
        for client in [client for client in self.owed if self.placement.leader_of[client] in self.gone]:
            del self.owed[client]
            self._late.pop(client, None)
        while (behind := self.behind) and self.post.transport.holds(behind):
            message = self.receive(behind, "taking late answers")
            if message is not None:
                self.drop(message)

    @property
    def leaders(self) -> list[int]:
        """The ranks that can be asked something between two rounds."""
        seats = {leader: self.placement.seat_of(leader) for leader in self.placement.leaders}
        return [leader for leader, seat in seats.items() if leader not in self.behind and not self.gone.keys() & set(seat)]

    def assemble(self, least: int) -> dict[int, Failure]:
        """The clients that cannot be asked in the next round, once enough others can be or nobody came back for too long."""
        deadline, num_clients = monotonic() + self.post.transport.timeout_s, len(self.placement.leader_of)
        while num_clients - len(absent := self.absent()) < least and monotonic() < deadline:
            with self.post.apart():
                sleep(LOOK_S)
        return absent

    def close(self) -> None:
        """After the last round: wait for late answers as long as for anything, then let go of who gave none.

        Nobody comes back any more: the last header is out, and whoever came now would wait for one for ever.
        """
        deadline = monotonic() + self.post.transport.timeout_s
        self._take_late()
        while self.behind and monotonic() < deadline:
            with self.post.apart():
                sleep(LOOK_S)
            self._take_late()
        for rank in sorted(self.behind):
            clients = [client for client in self.owed if self.placement.leader_of[client] == rank]
            self.post.transport.drop(
                rank, f"the run has ended without rank {rank}, which is stuck in the turn of client {clients[0]}"
            )
            self.gone[rank] = "it was stuck when the run ended"

    def receive(self, peers: Collection[int], phase: str) -> Message | None:
        """The next message of any of these; None where one of them was lost instead, and the run goes on."""
        try:
            return self.post.receive(peers, phase)
        except LinkError as error:
            self.look()
            if isinstance(error, Aborted) or not self.gone.keys() & set(peers):
                raise
            return None

    def stuck(self, rnd: Round, message: Message, missing: Collection[int]) -> None:
        """A rank says that it cannot go on: whoever of the round is missing there is not waited for."""
        header, why = message.header, content(message).decode(errors="replace")
        if header.round != rnd.index or header.client not in missing:  # it could, after all
            return
        leader = self.placement.leader_of[header.client]
        for client in sorted(missing):
            if self.placement.leader_of[client] == leader:
                itself = why if client == header.client else f"rank {leader} is stuck in the turn of client {header.client}"
                self.owed[client] = Failure(client, "Stuck", itself)
        print(f"fedmpi: rank {message.peer} is stuck in round {rnd.index} in the turn of client {header.client}: {why}", flush=True)

    def close_round(self, rnd: Round, late: Collection[int]) -> None:
        """Enough have answered: these are not waited for."""
        for client in late:
            self.owed[client] = Failure(client, "Late", f"round {rnd.index} was closed before its update came")

    def is_late(self, message: Message) -> bool:
        """Whether this answers a round that went on without it."""
        client = message.header.client
        return client in self.owed and self.placement.leader_of[client] == message.peer

    def drop(self, message: Message) -> None:
        """Take a late answer, or a part of one, off its link. With its last part the client can be asked again."""
        header = message.header
        if not self.is_late(message):
            raise ProtocolError(f"rank {message.peer} sent {header.kind.name} of client {header.client}, which owes no answer")
        self._late[header.client] += 0 if message.payload is None or header.kind not in _TENSORS else message.payload.numel()
        message.release()
        if message.last and header.kind in _TENSORS:
            self.ledger.late_bytes += self._late.pop(header.client)
        if message.last and header.kind not in (Kind.STUCK, Kind.CODED):  # the one is no news, and the other has a seal to come
            del self.owed[header.client]
