"""A client's side of a round: its turn, inside which whatever goes wrong is that client's Failure, and what is handed in after it.

It knows what a client owns, how updates are coded and who trains beside it; never what the work is, or other clients.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from fedmpi import watch
from fedmpi.codecs import Chain
from fedmpi.command import FAILED
from fedmpi.errors import Aborted, FedmpiError, LinkError
from fedmpi.federation.coding import OWNED, encode
from fedmpi.federation.meeting import Meeting
from fedmpi.federation.owned import Owned
from fedmpi.federation.post import Post
from fedmpi.federation.updates import Failure, Party, Update
from fedmpi.messages import Kind
from fedmpi.meter import Meter
from fedmpi.round import SERVER, Round
from fedmpi.seeding import seed_everything, seed_for
from fedmpi.tensors import Tensors

C = TypeVar("C", bound=Party)


@dataclass
class Turns:
    """The turns of the clients that live on one rank."""

    meeting: Meeting
    owned: Owned
    up: Chain  # what updates are coded by
    device: str
    patience_s: float | None = None  # a turn without a step for so long is stuck; None: a turn is a run that watches over itself

    def take(self, rnd: Round, client: C, work: Callable[[C], Update], sent: Tensors) -> Update | Failure:
        """The client's boundary: what goes wrong inside is a Failure of this client, in this round, and of nobody else."""
        seed_everything(seed_for(rnd.seed, "turn", client.id))
        owned, lost = _parted(self.owned.of(client.id))
        ready = replace(client, owned=owned)  # type: ignore[type-var]
        trace, meter = "", Meter(self.device)
        try:
            with watch.over(self.patience_s, self._alarm(rnd, client.id)):
                done = self._coded(rnd, work(ready), sent, lost)
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
        if isinstance(agreed, Failure) or agreed.owned is None:
            return agreed
        return replace(agreed, owned=None, owned_sha256=self.owned.offer(client.id, agreed.owned))

    def _alarm(self, rnd: Round, client: int) -> Callable[[str], None]:
        """What is done about a turn that is stuck for good: the server goes on without it; where nobody can, the process ends."""
        post, told = self.meeting.post, False

        def report(why: str) -> None:
            nonlocal told
            try:
                if post is None:
                    raise LinkError("nobody is there to go on without it")
                if not told:
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

    def _coded(self, rnd: Round, update: Update, sent: Tensors, lost: Tensors) -> Update:
        """The update as its chain has it: what it says is what counts everywhere. A residual joins what the client owns."""
        if self.up.raw:
            return update
        coded = encode(self.up, update.tensors, seed_for(rnd.seed, "update", update.client), sent, lost)
        kept = {f"{OWNED}{name}": tensor for name, tensor in {**lost, **coded.lost}.items()}
        owned = {**(update.owned or {}), **kept} if kept else update.owned
        return replace(update, tensors=coded.tensors, coded=coded, coded_bytes=len(coded.body), owned=owned)

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


def hand_in(post: Post, rnd: Round, outcome: Update | Failure) -> None:
    """Send what a turn came to."""
    if isinstance(outcome, Failure):
        said = {"kind": outcome.kind, "message": outcome.message}
        post.send_json(SERVER, Kind.FAILURE, said, rnd.index, outcome.client)
        return
    note = {"metrics": outcome.metrics, "owned": outcome.owned_sha256}
    if outcome.coded is not None:
        post.send_coded((SERVER,), outcome.coded, rnd.index, outcome.client, note)
    else:
        post.send_tensors((SERVER,), Kind.UPDATE, outcome.tensors, rnd.index, outcome.client, note)


def _parted(owned: Tensors | None) -> tuple[Tensors | None, Tensors]:
    """What a client's algorithm owns, and what its codec does."""
    lost = {name.removeprefix(OWNED): tensor for name, tensor in (owned or {}).items() if name.startswith(OWNED)}
    rest = {name: tensor for name, tensor in (owned or {}).items() if not name.startswith(OWNED)}
    return rest or None, lost
