"""How a training begins and ends on every rank: greeting, welcome, farewell; and where the ranks of one client sit down together.

It knows placement, links and inner worlds; never rounds, or what is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmpi import training
from fedmpi.errors import LinkError, ProtocolError, WorldError
from fedmpi.federation.post import Post
from fedmpi.federation.roll import Roll
from fedmpi.messages import Kind
from fedmpi.round import SERVER, Placement
from fedmpi.transports.inbox import Message

About = Mapping[int, Mapping[str, Any]]


@dataclass
class Meeting:
    """One rank's part. `about` is on the server what clients told of themselves, `inner` this rank's place in a group."""

    placement: Placement
    rank: int
    post: Post | None
    near: str | None = None  # host:port of something that every rank can reach, where there is one
    device: str = "cpu"  # where this rank computes
    about: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    inner: training.InnerWorld | None = None
    _meet_at: dict[int, str | None] = field(default_factory=dict)  # on the server: where each leader's members meet
    _experiment: str = ""
    _sizes: dict[int, int] = field(default_factory=dict)
    _store: training.Host | None = None  # of this group's inner world, on its leader

    @property
    def seat(self) -> tuple[int, ...]:
        """The ranks that serve the same clients as this one, their leader first."""
        return self.placement.seat_of(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its seat."""
        return self.seat[0] == self.rank

    def greet(self, experiment: str, num_examples: Mapping[int, int], about: About) -> dict[int, int]:
        """Leaders say for which experiment they are here and how large their clients are; the server refuses a stranger."""
        self.about, self._experiment = dict(about), experiment
        if self.post is None:
            return dict(num_examples)
        if self.rank != SERVER:
            self._introduce(self.post, experiment, num_examples)
            return {}
        sizes: dict[int, int] = {}
        for peer, greeting in self.post.from_each(Kind.HELLO, "greeting the clients"):
            sizes.update(self._heard(peer, greeting, experiment))
        self._sizes = sizes
        return dict(sizes)

    def _introduce(self, post: Post, experiment: str, num_examples: Mapping[int, int]) -> None:
        if self.leads and self.placement.clustered:
            self._store = training.host(self.near)
        examples = {str(client): num for client, num in num_examples.items()} if self.leads else {}
        said = {"experiment": experiment, "examples": examples, "meet_at": self._store.address if self._store else None}
        known = {str(client): facts for client, facts in self.about.items()} if self.leads else {}
        post.send_json(SERVER, Kind.HELLO, {**said, "about": known})

    def _heard(self, peer: int, greeting: Mapping[str, Any], experiment: str) -> dict[int, int]:
        """What a rank's greeting says of its clients' sizes."""
        if greeting["experiment"] != experiment:
            raise WorldError(
                f"rank {peer} runs experiment {greeting['experiment']}, the server {experiment}: "
                "give all ranks equal settings and data"
            )
        sizes = self._declared(peer, greeting["examples"])
        self.about |= {int(client): facts for client, facts in greeting["about"].items() if int(client) in sizes}
        self._meet_at[peer] = greeting["meet_at"]
        return sizes

    def _declared(self, peer: int, examples: Mapping[str, Any]) -> dict[int, int]:
        hosted = set(self.placement.hosted_by(peer)) if self.placement.seat_of(peer)[0] == peer else set()
        sizes = {int(client): int(num) for client, num in examples.items()}
        if set(sizes) != hosted or any(not 0 < num < 1 << 31 for num in sizes.values()):
            raise ProtocolError(
                f"rank {peer} declares examples of clients {sizes}, expected clients {sorted(hosted)}, 1 or more each"
            )
        return sizes

    def welcome(self, owned: Mapping[int, str], limit_bytes: int) -> Mapping[int, str]:
        """The server says where the run stands; gives which client-owned state the last durable round names."""
        if self.post is None:
            return owned
        if self.rank == SERVER:
            self.post.transport.limit_bytes = limit_bytes
            for peer in self.post.transport.peers:
                self._let_in(peer, owned, self.post)
            return {}
        said = self.post.json(self.post.expect(SERVER, Kind.WELCOME, -1, "waiting for the server's welcome"))
        self.post.transport.limit_bytes = int(said["limit_bytes"])
        self._sit_down(said["meet_at"], self.post.transport.timeout_s)
        return {int(client): str(sha) for client, sha in said["owned"].items()}

    def _let_in(self, peer: int, owned: Mapping[int, str], post: Post) -> None:
        meet_at = self._meet_at[self.placement.seat_of(peer)[0]]
        said = {"owned": {str(client): sha for client, sha in owned.items()}, "limit_bytes": post.transport.limit_bytes}
        post.send_json(peer, Kind.WELCOME, {**said, "meet_at": meet_at})

    def readmit(self, peer: int, greeting: Mapping[str, Any], owned: Mapping[int, str], post: Post) -> None:
        """A rank that was gone greets as at the start; it is let in where it is what it was."""
        sizes = self._heard(peer, greeting, self._experiment)
        if other := [client for client, num in sizes.items() if num != self._sizes[client]]:
            raise WorldError(f"rank {peer} has other rows of clients {other} than it had: give it the same data")
        self._let_in(peer, owned, post)

    def _sit_down(self, meet_at: str | None, timeout_s: float) -> None:
        """Inside a group the world is the client: its members meet at their leader's store."""
        if meet_at is not None:
            place, role = self.seat.index(self.rank), f"ranks {self.seat[0]} to {self.seat[-1]}"
            self.inner = training.join(meet_at, place, len(self.seat), 0, timeout_s, role=role, device=self.device)

    def farewell(self, roll: Roll | None) -> None:
        """Each client rank tells what it received; on links without a fault that is what the server sent."""
        if self.post is None:
            return
        if self.inner is not None:
            self.inner.leave()
        transport = self.post.transport
        if self.rank != SERVER:
            counted = {"received": transport.received[SERVER].payload_bytes, "sent": transport.sent[SERVER].payload_bytes}
            self.post.send_json(SERVER, Kind.FAREWELL, counted)
            self.post.expect(SERVER, Kind.FAREWELL, -1, "waiting for the ledger to be closed").release()
            return
        assert roll is not None
        roll.close()
        for peer in list(roll.here):
            if (message := roll.receive({peer}, "closing the ledger")) is not None:
                self._settle_with(peer, self.post, self.post.expected(message, Kind.FAREWELL, -1))
        # nobody goes on before that, or the greeting of the next training would be counted in this one
        self.post.send_bytes(roll.here, Kind.FAREWELL, b"")

    @staticmethod
    def _settle_with(peer: int, post: Post, message: Message) -> None:
        ways = post.transport
        sent, received = ways.sent[peer].payload_bytes, ways.received[peer].payload_bytes - message.header.length
        theirs = post.json(message)
        if (theirs["received"], theirs["sent"]) != (sent, received):
            raise LinkError(
                f"ledger: the server sent {sent} payload bytes to rank {peer} and received {received}, "
                f"which received {theirs['received']} and sent {theirs['sent']}"
            )
