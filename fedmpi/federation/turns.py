"""A client's side of a round: its turn, inside which whatever goes wrong is that client's Failure, and what is handed in after it.

It knows what a client owns, how updates are coded and who trains beside it; never what the work is, or other clients.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedmpi import watch
from fedmpi.codecs import Chains
from fedmpi.command import FAILED
from fedmpi.errors import Aborted, FedmpiError, LinkError
from fedmpi.federation.coding import OWNED, Encoding
from fedmpi.federation.known import Known
from fedmpi.federation.meeting import Meeting
from fedmpi.federation.owned import Owned
from fedmpi.federation.post import Post
from fedmpi.federation.updates import Failure, Party, Update
from fedmpi.messages import Kind
from fedmpi.meter import Meter
from fedmpi.round import SERVER, Round
from fedmpi.seeding import seed_everything, seed_for
from fedmpi.tensors import Tensors, part, prefixed

C = TypeVar("C", bound=Party)


@dataclass
class Turns:
    """The turns of the clients that live on one rank."""

    meeting: Meeting
    owned: Owned
    up: Chains  # what updates are coded by
    device: str
    patience_s: float | None = None  # a turn without a step for so long is stuck; None: a turn is a run that watches over itself
    _known: Known = field(default_factory=Known)  # the round's broadcast, where updates are differences from it

    def take(self, rnd: Round, client: C, work: Callable[[C], Update], sent: Tensors) -> Update | Failure:
        """The client's boundary: what goes wrong inside is a Failure of this client, in this round, and of nobody else."""
        seed_everything(seed_for(rnd.seed, "turn", client.id))
        owned, lost = _parted(self.owned.of(client.id))
        ready = replace(client, owned=owned)  # type: ignore[type-var]
        trace, meter = "", Meter(self.device)
        try:
            with watch.over(self.patience_s, self._alarm(rnd, client.id)):
                done = self._coding(rnd, work(ready), sent, lost)
            outcome: Update | Failure = replace(done, metrics={**done.metrics, **meter.figures()})
        except Aborted:
            raise
        except Exception as error:  # noqa: BLE001 - the one place where anything may be caught; printed or told below
            where = f"rank {self.meeting.rank}: " if self.meeting.inner is not None else ""
            outcome = Failure(client.id, type(error).__name__, where + " ".join(str(error).split())[:2000])
            if not isinstance(error, FedmpiError):  # a fault of the program or the machine: its place matters
                trace = traceback.format_exc()
        agreed = self._agreed(outcome)
        if trace and agreed == outcome:  # the other members of a client fail because of the first
            print(trace, file=sys.stderr)
        return agreed

    def _alarm(self, rnd: Round, client: int) -> Callable[[str], None]:
        """What is done about a turn that is stuck for good: the server goes on without it; where nobody can, the process ends.

        In a client of several ranks its leader tells: it waits for the others, and of them the server expects no word but farewell.
        """
        post, told = self.meeting.post, False

        def report(why: str) -> None:
            nonlocal told
            try:
                if post is None:
                    raise LinkError("nobody is there to go on without it")
                if self.meeting.leads and not told:
                    post.alarm(SERVER, Kind.STUCK, why, rnd.index, client)
                    told = True
                post.transport.check()
                if (lost := post.transport.failures.get(SERVER)) is not None:
                    raise lost
            except LinkError as error:
                where = f"rank {self.meeting.rank}: round {rnd.index}, client {client}"
                print(f"fedmpi: {where}: {why}, and cannot be interrupted; {error}: this process ends", file=sys.stderr, flush=True)
                os._exit(FAILED)

        return report

    def settled(self, outcome: Update | Failure) -> Update | Failure:
        """What a turn came to, where it does not travel."""
        return self.sealed(outcome) if isinstance(outcome, Update) else outcome

    def sealed(self, update: Update) -> Update:
        """The update once its message was coded: what that says is what counts. What the client owns is kept, and what was lost."""
        if update.coded is not None:
            coded = update.coded.finished()
            owned = {**(update.owned or {}), **prefixed(OWNED, coded.lost)} or None
            update = replace(update, tensors=coded.tensors, coded=None, coded_bytes=coded.num_bytes, owned=owned)
        if update.owned is None:
            return update
        return replace(update, owned=None, owned_sha256=self.owned.offer(update.client, update.owned))

    def _coding(self, rnd: Round, update: Update, sent: Tensors, lost: Tensors) -> Update:
        """The update, ready to be coded on its way."""
        if self.up.raw:
            return update
        if sent is not self._known.tensors:
            self._known = Known(sent)
        seed, alone = seed_for(rnd.seed, "update", update.client), self.meeting.post is None
        coded = Encoding(self.up, update.tensors, seed, self._known, Known(lost), told=alone)
        owned = {**(update.owned or {}), **prefixed(OWNED, lost)} or None  # of tensors that are not in this update
        return replace(update, coded=coded, owned=owned)

    def _agreed(self, outcome: Update | Failure) -> Update | Failure:
        """A client of several ranks has an update when all of them have; else its failure is that of the first to fail."""
        if self.meeting.inner is None:
            return outcome
        said = json.dumps({"kind": outcome.kind, "message": outcome.message}) if isinstance(outcome, Failure) else None
        fault = self.meeting.inner.settle(said)
        return outcome if fault is None else Failure(outcome.client, **json.loads(fault))


def overtaken(post: Post) -> bool:
    """Whether the server has gone on: between broadcast and answer it says nothing to who is waited for."""
    return post.transport.holds({SERVER})


def hand_in(post: Post, rnd: Round, outcome: Update | Failure, sealed: Callable[[Update], Update]) -> None:
    """Send what a turn came to. A coded update is sealed when all of it has left: only then it is known what was lost."""
    if isinstance(outcome, Failure):
        tell(post, rnd, outcome)
        return
    if outcome.coded is None:
        note = {"metrics": outcome.metrics, "owned": sealed(outcome).owned_sha256}
        post.send_tensors((SERVER,), Kind.UPDATE, outcome.tensors, rnd.index, outcome.client, note)
        return
    post.send_coded((SERVER,), outcome.coded, rnd.index, outcome.client, {"metrics": outcome.metrics})
    post.send_json(SERVER, Kind.SEAL, {"owned": sealed(outcome).owned_sha256}, rnd.index, outcome.client)


def tell(post: Post, rnd: Round, failure: Failure) -> None:
    """Say why there is no update."""
    post.send_json(SERVER, Kind.FAILURE, {"kind": failure.kind, "message": failure.message}, rnd.index, failure.client)


def _parted(owned: Tensors | None) -> tuple[Tensors | None, Tensors]:
    """What a client's algorithm owns, and what its codec does."""
    rest = {name: tensor for name, tensor in (owned or {}).items() if not name.startswith(OWNED)}
    return rest or None, part(owned or {}, OWNED)
