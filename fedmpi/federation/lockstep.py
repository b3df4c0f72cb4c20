"""Rounds, broadcast, gather: every rank makes the same calls in the same order.

Who leads is decided once, at construction: the rank that holds a Conductor is the server, and a process without links is server and
clients at once. This module must never know what is trained, or how.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fedmpi import training
from fedmpi.codecs import Chain
from fedmpi.errors import Aborted, FedmpiError, LinkError, ProtocolError, WorldError
from fedmpi.federation import scores
from fedmpi.federation.arrivals import Arrivals, Tally
from fedmpi.federation.coding import OWNED, Downlink, encode
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.ground import Ground, Levelling
from fedmpi.federation.owned import Owned
from fedmpi.federation.post import Post, content
from fedmpi.federation.updates import Failure, Outcome, Party, Update, Vault
from fedmpi.ledger import Ledger
from fedmpi.messages import Kind
from fedmpi.meter import Meter
from fedmpi.round import End, Placement, Round
from fedmpi.seeding import seed_everything, seed_for
from fedmpi.tensors import Tensors, num_bytes
from fedmpi.transports.inbox import Message

SERVER = 0
C = TypeVar("C", bound=Party)


@dataclass
class Federation:
    """One run's view of the world from one rank."""

    placement: Placement
    rank: int = SERVER
    post: Post | None = None  # None: this process is the whole world
    conductor: Conductor | None = None  # held by the server alone
    vault: Vault | None = None
    device: str = "cpu"  # where clients that live here compute
    near: str | None = None  # host:port of something that every rank can reach, where there is one
    ground: Ground | None = None  # what each process holds once and the server may change
    up: Chain = field(default_factory=Chain)  # what updates are coded by
    down: Chain = field(default_factory=Chain)  # and broadcasts
    answer: scores.Answer | None = None  # how clients that live here score what the server asks about, on rows of their own
    about: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # on the server: what clients told of themselves
    outcome: Outcome = field(default_factory=Outcome)
    ledger: Ledger = field(default_factory=Ledger)
    _now: Round | None = None
    _meet_at: dict[int, str | None] = field(default_factory=dict)  # on the server: where each leader's members meet
    _store: training.Host | None = None  # of this group's inner world, on its leader
    _inner: training.InnerWorld | None = None

    def __post_init__(self) -> None:
        self._owned = Owned(self.vault, self.leads)
        self.downlink = Downlink(self.down)
        self._sent: Tensors = {}  # the round's broadcast, where updates are differences from it
        self._held: Tensors = {}  # the last broadcast that came here, where broadcasts are differences
        self._levelling = Levelling(self.ground, self.placement) if self.ground is not None else None

    # ---- what an algorithm calls ----------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[Round]:
        """The rounds that the server announces. Reading a header settles the round before; the last header ends the loop."""
        while True:
            rnd = self._announce() if self.conductor is not None else self._follow()
            self._owned.settle(rnd)
            self.downlink.settle(rnd)
            self._now, self.outcome = rnd, Outcome()
            if rnd.end:
                return
            yield rnd

    def broadcast(self, tensors: Tensors | None) -> Tensors:
        """The server's tensors, as every receiver decodes them. A rank without a client in the cohort gets nothing."""
        rnd = self._now
        if rnd is None:
            raise RuntimeError("no round has begun: call this inside `for rnd in fed.rounds()`")
        if tensors is not None:
            sent = self._spread(rnd, tensors)
        elif self.post is None or not self._hosted_in(rnd):
            return {}
        else:
            sent = self._received(rnd, self.post)
        self._sent = sent if self.up.delta else {}
        return sent

    def _received(self, rnd: Round, post: Post) -> Tensors:
        """The round's broadcast on a client's rank; a leader passes it on to its members."""
        message = self._next(post, f"waiting for the broadcast of round {rnd.index}")
        received = None
        if message.header.kind is Kind.CODED:
            post.expected(message, Kind.CODED, rnd.index)
            received = post.decode(message, self.down, self._held)
        else:
            post.expected(message, Kind.BROADCAST, rnd.index)
            received = post.keep(message) if self.leads else None
        message.release()
        self._held = received if received is not None and self.down.delta else {}
        if self._inner is not None:
            return self._inner.share(received)
        assert received is not None
        return received

    def gather(
        self,
        rnd: Round,
        clients: Mapping[int, C],
        work: Callable[[C], Update],
        check: Callable[[Update], None] | None = None,
    ) -> Iterable[Update]:
        """Run `work` for each client of the cohort that lives here; on the server, give the updates of all in arrival order, once.

        The server's `check` sees each update before anybody else does: one that it raises a TrainingError at is a Failure. Without
        one, the exact mean takes the updates from the links in pieces; who iterates gets them whole.
        """
        outcomes = (self._attempt(rnd, clients[client], work) for client in self._hosted_in(rnd))
        if self.conductor is not None:
            tally = Tally(rnd, self.conductor, self.outcome, self.ledger, check)
            if self.post is None:
                return tally.judged(outcomes)
            arrivals = Arrivals(self.post, self.placement, tally, self.up, self._sent)
            return arrivals if check is None else iter(arrivals)
        assert self.post is not None
        for outcome in outcomes:  # now, not lazily: a client rank never reads what it gathered
            if self.leads:
                self._hand_in(rnd, outcome, self.post)
        return ()

    @property
    def seat(self) -> tuple[int, ...]:
        """The ranks that serve the same clients as this one, their leader first."""
        return self.placement.seat_of(self.rank)

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its seat."""
        return self.seat[0] == self.rank

    @property
    def end(self) -> End:
        """Why no round follows; NO while one does."""
        return self._now.end if self._now is not None else End.NO

    def measure(self, tensors: Tensors) -> scores.Figures:
        """The server asks between rounds: each client's figures of these tensors, on rows that do not leave their ranks."""
        assert self.answer is not None
        if self.post is None:
            return self.answer(tensors)
        self._level({leader: self.placement.hosted_by(leader)[0] for leader in self.placement.leaders}, -1)
        self.ledger.asked_bytes += num_bytes(tensors) * len(self.placement.leaders)
        return scores.ask(self.post, self.placement, tensors)

    # ---- before the first round and after the last ----------------------------------------------------------------------------

    def greet(
        self, experiment: str, num_examples: Mapping[int, int], about: Mapping[int, Mapping[str, Any]] | None = None
    ) -> dict[int, int]:
        """Leaders say for which experiment they are here and how large their clients are; the server refuses a stranger.

        What they tell about their clients besides is in `about` afterwards, on the server.
        """
        self.about = dict(about or {})
        if self.post is None:
            return dict(num_examples)
        if self.rank != SERVER:
            if self.leads and self.placement.clustered:
                self._store = training.host(self.near)
            examples = {str(client): num for client, num in num_examples.items()} if self.leads else {}
            said = {"experiment": experiment, "examples": examples, "meet_at": self._store.address if self._store else None}
            known = {str(client): facts for client, facts in self.about.items()} if self.leads else {}
            self.post.send_json(SERVER, Kind.HELLO, {**said, "about": known})
            return {}
        sizes: dict[int, int] = {}
        for peer, greeting in self.post.from_each(Kind.HELLO, "greeting the clients"):
            if greeting["experiment"] != experiment:
                raise WorldError(
                    f"rank {peer} runs experiment {greeting['experiment']}, the server {experiment}: "
                    "give all ranks equal settings and data"
                )
            sizes.update(self._declared(peer, greeting["examples"]))
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

    def welcome(self, owned: Mapping[int, str], limit_bytes: int) -> None:
        """The server says where the run stands; each rank takes up the client-owned state that the last durable round names."""
        if self.post is not None and self.rank == SERVER:
            self.post.transport.limit_bytes = limit_bytes
            said: dict[str, Any] = {
                "owned": {str(client): sha for client, sha in owned.items()},
                "limit_bytes": limit_bytes,
            }
            for peer in self.post.transport.peers:
                meet_at = self._meet_at[self.placement.seat_of(peer)[0]]
                self.post.send_json(peer, Kind.WELCOME, {**said, "meet_at": meet_at})
            return
        if self.post is not None:
            said = self.post.json(self.post.expect(SERVER, Kind.WELCOME, -1, "waiting for the server's welcome"))
            self.post.transport.limit_bytes = int(said["limit_bytes"])
            owned = {int(client): str(sha) for client, sha in said["owned"].items()}
            self._sit_down(said["meet_at"])
        self._owned.resume(owned, self.placement.hosted_by(self.rank))

    def _sit_down(self, meet_at: str | None) -> None:
        """Inside a group the world is the client: its members meet at their leader's store."""
        if meet_at is not None and self.post is not None:
            place, timeout_s = self.seat.index(self.rank), self.post.transport.timeout_s
            self._inner = training.join(
                meet_at, place, len(self.seat), 0, timeout_s, role=f"ranks {self.seat[0]} to {self.seat[-1]}"
            )

    def farewell(self) -> None:
        """Each client rank tells what it received; on links without a fault that is what the server sent."""
        if self.post is None:
            return
        transport = self.post.transport
        if self._inner is not None:
            self._inner.leave()
        if self.rank != SERVER:
            counted = {"received": transport.received[SERVER].payload_bytes, "sent": transport.sent[SERVER].payload_bytes}
            self.post.send_json(SERVER, Kind.FAREWELL, counted)
            self.post.expect(SERVER, Kind.FAREWELL, -1, "waiting for the ledger to be closed").release()
            return
        for peer in transport.peers:
            message = self.post.expect(peer, Kind.FAREWELL, -1, "closing the ledger")
            sent, received = transport.sent[peer].payload_bytes, transport.received[peer].payload_bytes - message.header.length
            theirs = self.post.json(message)
            if (theirs["received"], theirs["sent"]) != (sent, received):
                raise LinkError(
                    f"ledger: the server sent {sent} payload bytes to rank {peer} and received {received}, "
                    f"which received {theirs['received']} and sent {theirs['sent']}"
                )
        # nobody goes on before that, or the greeting of the next training would be counted in this one
        self.post.send_bytes(transport.peers, Kind.FAREWELL, b"")

    def close_books(self) -> dict[str, int]:
        """The bytes of the round: what carried tensors, and everything else as control bytes."""
        return self.ledger.close_round(self.post.num_bytes() if self.post is not None else 0)

    # ---- rounds ---------------------------------------------------------------------------------------------------------------

    def _announce(self) -> Round:
        assert self.conductor is not None
        rnd = self.conductor.next_round()
        if self.post is not None:
            self.post.send_bytes(self.post.transport.peers, Kind.ROUND, rnd.pack(), rnd.index)
        return rnd

    def _follow(self) -> Round:
        assert self.post is not None
        message = self._next(self.post, "waiting for the next round")
        while message.header.kind is Kind.QUESTION and self.answer is not None:
            scores.reply(self.post, message, self.answer)
            message = self._next(self.post, "waiting for the next round")
        if message.header.kind is not Kind.ROUND:
            raise ProtocolError(f"rank {SERVER} sent {message.header.kind.name}, expected a round header")
        return Round.unpack(content(message), len(self.placement.leader_of))

    def _next(self, post: Post, phase: str) -> Message:
        """The server's next message. What it has changed in the base since this rank last took part comes before it."""
        message = post.receive({SERVER}, phase)
        while message.header.kind is Kind.FOLD and self.ground is not None:
            missed = post.keep(message) if self.leads else None
            message.release()
            self.ground.catch_up(self._inner.share(missed) if self._inner is not None else missed or {})
            message = post.receive({SERVER}, phase)
        return message

    def _level(self, holders: Mapping[int, int], round_index: int) -> None:
        """Bring these ranks' base up to date before they get anything that stands on it."""
        if self._levelling is not None:
            self._levelling.bring_up(self.post, self.ledger, holders, round_index)

    def _hosted_in(self, rnd: Round) -> list[int]:
        hosted = set(self.placement.hosted_by(self.rank))
        return [client for client in rnd.cohort if client in hosted]

    # ---- a client's side ------------------------------------------------------------------------------------------------------

    def _attempt(self, rnd: Round, client: C, work: Callable[[C], Update]) -> Update | Failure:
        """The client's boundary: what goes wrong inside is a Failure of this client, in this round, and of nobody else."""
        seed_everything(seed_for(rnd.seed, "turn", client.id))
        owned, lost = _parted(self._owned.of(client.id))
        ready = replace(client, owned=owned)  # type: ignore[type-var]
        trace, meter = "", Meter(self.device)
        try:
            done = self._coded(rnd, work(ready), lost)
            outcome: Update | Failure = replace(done, metrics={**done.metrics, **meter.figures()})
        except Aborted:
            raise
        except Exception as error:  # noqa: BLE001 - the one place where anything may be caught; printed or told below
            where = f"rank {self.rank}: " if self._inner is not None else ""
            outcome = Failure(client.id, type(error).__name__, where + " ".join(str(error).split())[:2000])
            if not isinstance(error, FedmpiError):  # a fault of the program or the machine: its place matters
                trace = traceback.format_exc()
        agreed = self._agreed(outcome)
        if trace and agreed == outcome:  # the other members of a client fail because of the first
            print(trace, file=sys.stderr)
        if isinstance(agreed, Failure) or agreed.owned is None:
            return agreed
        return replace(agreed, owned=None, owned_sha256=self._owned.offer(client.id, agreed.owned))

    def _coded(self, rnd: Round, update: Update, lost: Tensors) -> Update:
        """The update as its chain has it: what it says is what counts everywhere. A residual joins what the client owns."""
        if self.up.raw:
            return update
        coded = encode(self.up, update.tensors, seed_for(rnd.seed, "update", update.client), self._sent, lost)
        kept = {f"{OWNED}{name}": tensor for name, tensor in {**lost, **coded.lost}.items()}
        owned = {**(update.owned or {}), **kept} if kept else update.owned
        return replace(update, tensors=coded.tensors, coded=coded, coded_bytes=len(coded.body), owned=owned)

    def _agreed(self, outcome: Update | Failure) -> Update | Failure:
        """A client of several ranks has an update when all of them have; else its failure is that of the first to fail."""
        if self._inner is None:
            return outcome
        said = json.dumps({"kind": outcome.kind, "message": outcome.message}) if isinstance(outcome, Failure) else None
        fault = self._inner.settle(said)
        return outcome if fault is None else Failure(outcome.client, **json.loads(fault))

    def _hand_in(self, rnd: Round, outcome: Update | Failure, post: Post) -> None:
        if isinstance(outcome, Failure):
            said = {"kind": outcome.kind, "message": outcome.message}
            post.send_json(SERVER, Kind.FAILURE, said, rnd.index, outcome.client)
            return
        note = {"metrics": outcome.metrics, "owned": outcome.owned_sha256}
        if outcome.coded is not None:
            post.send_coded((SERVER,), outcome.coded, rnd.index, outcome.client, note)
        else:
            post.send_tensors((SERVER,), Kind.UPDATE, outcome.tensors, rnd.index, outcome.client, note)

    # ---- the server's side ----------------------------------------------------------------------------------------------------

    def _spread(self, rnd: Round, tensors: Tensors) -> Tensors:
        """One copy to each rank that hosts a client of the cohort; alone, one for each client."""
        alone = self.post is None
        first = {client if alone else self.placement.leader_of[client]: client for client in reversed(rnd.cohort)}
        self._level(first, rnd.index)
        coded = None if self.down.raw else self.downlink.encode(tensors, rnd)
        decoded = tensors if coded is None else coded.tensors
        able = set() if coded is None else self.downlink.readers(first)
        self.ledger.down.update({c: len(coded.body) if coded and h in able else num_bytes(decoded) for h, c in first.items()})
        if self.post is None:
            return decoded
        if coded is not None:
            self.post.send_coded(sorted(able), coded, rnd.index)
        self.post.send_tensors(sorted(first.keys() - able), Kind.BROADCAST, decoded, rnd.index)
        for leader in first:  # members wait on their own link until it is time to turn to their leader
            self.post.send_bytes(self.placement.seat_of(leader)[1:], Kind.BROADCAST, b"", rnd.index)
        return decoded


def _parted(owned: Tensors | None) -> tuple[Tensors | None, Tensors]:
    """What a client's algorithm owns, and what its codec does."""
    lost = {name.removeprefix(OWNED): tensor for name, tensor in (owned or {}).items() if name.startswith(OWNED)}
    rest = {name: tensor for name, tensor in (owned or {}).items() if not name.startswith(OWNED)}
    return rest or None, lost
