"""Inside a rank: notes what happens, and makes the faults that were planned for it, by wrapping functions of the product.

Events go to one JSON-lines file per process, each line written at once, so that what a killed process knew is there.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmpi import aggregation, training
from fedmpi.federation import lockstep, updates
from fedmpi.federation.turns import Turns
from fedmpi.record import checkpoint
from fedmpi.sessions.keeper import Keeper
from fedmpi.tensors import digest
from fedmpi.transports.base import Transport
from fedmpi.transports.link import Link
from tests.campaign import faults as kinds
from tests.campaign.faults import DONE_AT_ONCE, Fault, kill_self
from tests.campaign.history import Lost

LARGE_BYTES = 1024
SLOW_WRITES, SLOW_S = 20, 0.05


class Probe:
    """What one process notes and does wrong. Ranks that are threads share it; who speaks is known by thread."""

    def __init__(self, folder: Path, faults: Sequence[Fault], threads: bool) -> None:
        self.folder, self.faults, self.threads = folder, faults, threads
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{os.getpid()}-{time.monotonic_ns()}.jsonl").open("a", buffering=1, encoding="utf-8")
        self.here = threading.local()  # rank and round of this thread
        self.next: dict[int, str] = {}  # by rank: what its next large piece, update or turn will suffer
        self.silent_until: dict[int, float] = {}
        self.slow_writes: dict[int, int] = {}
        self.deadline_s = kinds.DEADLINE_S
        self.wires: list[tuple[int, Damaged]] = []

    def note(self, event: str, rank: int | None = None, round_index: int | None = None, **facts: Any) -> None:
        """One line."""
        who = {"rank": self.here.rank, "round": self.here.round} if rank is None else {"rank": rank, "round": round_index}
        with contextlib.suppress(OSError):  # there is no room any more
            self.file.write(json.dumps({"event": event, **who, "t": time.monotonic(), **facts}) + "\n")

    def at(self, phase: str, only: str = "") -> None:
        """Come to a phase: make the faults that wait for it, each once in the life of the run, whatever process it is by then."""
        for fault in self.faults:
            here = (fault.phase, fault.round, fault.rank) == (phase, self.here.round, self.here.rank)
            if here and only in (fault.kind, ""):
                with contextlib.suppress(FileExistsError):
                    (self.folder / f"made-{fault.name}").touch(exist_ok=False)
                    self.note("fault", kind=fault.kind, phase=phase)
                    self.make(fault)

    def make(self, fault: Fault) -> None:
        """Do it."""
        rank = fault.rank
        if fault.kind == "slow":
            self.slow_writes[rank] = SLOW_WRITES
        elif fault.kind in ("flip", "nan", "again"):
            self.next[rank] = fault.kind
        elif fault.kind == "truncate":
            newest = max((self.folder.parent / "run" / "checkpoints").glob("round-*"))
            os.truncate(newest / "state.safetensors", (newest / "state.safetensors").stat().st_size // 2)
            kill_self()
        elif fault.kind in ("pause", "freeze"):
            seconds = (kinds.PAUSE if fault.kind == "pause" else kinds.LONG_PAUSE) * self.deadline_s
            self.silent_until[rank] = time.monotonic() + seconds
            self.rest(seconds) if self.threads else kinds.stop_self(seconds)
        elif self.threads and fault.kind == "hang":
            self.rest(kinds.HANG * self.deadline_s)
        elif self.threads and fault.kind == "reset":
            for owner, wire in self.wires:
                if owner == rank:
                    wire.close()
        else:
            DONE_AT_ONCE[fault.kind]()

    def rest(self, seconds: float) -> None:
        """A thread stops, and the others go on computing."""
        held = self.here.turn._release_save()
        time.sleep(seconds)
        self.here.turn._acquire_restore(held)

    def due(self, kind: str, rank: int) -> bool:
        """Whether this rank was to suffer that now; only once."""
        found = self.next.get(rank) == kind
        if found:
            del self.next[rank]
        return found

    def written(self, rank: int, parts: Sequence[memoryview]) -> list[memoryview]:
        """What really goes out on a link of this rank, and when."""
        while (wait := self.silent_until.get(rank, 0.0) - time.monotonic()) > 0:
            time.sleep(min(wait, 0.1))
        if self.slow_writes.get(rank):
            self.slow_writes[rank] -= 1
            time.sleep(SLOW_S)
        sent = list(parts)
        if self.next.get(rank) == "flip" and len(sent[-1]) >= LARGE_BYTES:
            del self.next[rank]
            damaged = bytearray(sent[-1])
            damaged[len(damaged) // 2 | 3] ^= 4  # in the high byte of a number
            sent[-1] = memoryview(damaged)
        return sent


class Damaged:
    """A wire whose writes pass by the probe."""

    def __init__(self, wire: Any, probe: Probe, rank: int) -> None:
        self._wire, self._probe, self._rank = wire, probe, rank
        probe.wires.append((rank, self))

    def write(self, *parts: memoryview) -> None:
        """Late, or with a bit turned."""
        self._wire.write(*self._probe.written(self._rank, parts))

    def flush(self) -> None:
        """As it is."""
        self._wire.flush()

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """As it comes."""
        self._wire.read(*parts, heard=heard)

    def close(self) -> None:
        """For good."""
        self._wire.close()


class Steps(training.Hook):
    """Reaches into a client's training."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def before_step(self, step: training.Step) -> None:
        """The second step is in the middle."""
        if step.index == 1:
            self.probe.at("train")
            if self.probe.due("nan", self.probe.here.rank):
                poison(step.model)


@torch.no_grad()
def poison(model: Any) -> None:
    """Numbers that are none."""
    next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


def install(folder: Path, faults: Sequence[Fault], lost: Lost, threads: bool) -> None:
    """Wrap what a round consists of. What `lost` names has no update, whatever else happens."""
    probe = Probe(folder, faults, threads)
    _wrap_rounds(probe)
    _wrap_links(probe)
    _wrap_training(probe, lost)
    _wrap_server(probe)


def _before(owner: Any, name: str, act: Callable[..., None]) -> None:
    """Let `act` see the arguments of every call before the call is made."""
    wrapped = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        act(*arguments)
        return wrapped(*arguments, **options)

    setattr(owner, name, noted)


def _after(owner: Any, name: str, act: Callable[[Any], None]) -> None:
    """Let `act` see the result of every call."""
    wrapped = getattr(owner, name)

    def noted(*arguments: Any, **options: Any) -> Any:
        act(result := wrapped(*arguments, **options))
        return result

    setattr(owner, name, noted)


def _wrap_rounds(probe: Probe) -> None:
    Federation = lockstep.Federation
    rounds = Federation.rounds

    def noted(fed: Any) -> Iterator[Any]:
        probe.here.rank, probe.here.round, probe.here.turn = fed.rank, -1, fed.post.transport.turn
        probe.deadline_s = fed.post.transport.timeout_s
        probe.note("begin")
        for rnd in rounds(fed):
            probe.here.round = rnd.index
            said = {"attempt": rnd.attempt, "verdict": int(rnd.verdict), "counted": list(rnd.counted), "durable": rnd.durable}
            probe.note("round", cohort=list(rnd.cohort), **said)
            probe.at("announce" if fed.conductor is not None else "announced")
            yield rnd
        probe.note("end", end=int(fed.end))

    Federation.rounds = noted  # type: ignore[method-assign]
    _before(Federation, "broadcast", lambda fed, tensors: probe.at("broadcast") if tensors is not None else None)
    _after(Federation, "broadcast", lambda held: probe.note("holds", sha=digest(held)) if held else None)


def _wrap_links(probe: Probe) -> None:
    def damage(link: Any, peer: int, wire: Any, hub: Any, *_: Any) -> None:
        link._probed = hub.rank

    def wired(link: Any) -> None:
        link._wire = Damaged(link._wire, probe, link._probed)

    def lost(transport: Transport, link: Link, error: Exception) -> None:
        if not link.closed and not link.ended:
            probe.note("lost", transport.rank, transport._round, peer=link.peer, error=type(error).__name__)

    _before(Link, "__init__", damage)
    _before(Link, "start", wired)
    _before(Transport, "lost", lost)


def _wrap_training(probe: Probe, lost: Lost) -> None:
    fit, take, hand_in = training.fit, Turns.take, lockstep.hand_in

    def fits(model: Any, *arguments: Any, hooks: Sequence[Any] = (), **options: Any) -> Any:
        done = fit(model, *arguments, hooks=(*hooks, Steps(probe)), **options)
        probe.at("upload")
        if probe.due("nan", probe.here.rank):  # behind the loop's own checks, as a broken client would send it
            poison(model)
        return done

    def takes(turns: Turns, rnd: Any, client: Any, work: Any, *rest: Any) -> Any:
        kind = lost.get(str(rnd.index), {}).get(str(client.id))

        def loses(_: Any) -> Any:
            raise type(kind, (RuntimeError,), {})("lost, as in the run that this one repeats")

        return take(turns, rnd, client, loses if kind else work, *rest)

    def hands_in(post: Any, *rest: Any) -> None:  # perhaps in a thread of its own
        hand_in(post, *rest)
        if probe.due("again", post.transport.rank):
            hand_in(post, *rest)

    training.fit, Turns.take, lockstep.hand_in = fits, takes, hands_in  # type: ignore[method-assign]


def _wrap_server(probe: Probe) -> None:
    commit = checkpoint.Checkpoints.commit

    def commits(self: Any, round_index: int, tensors: Any, *rest: Any) -> None:
        probe.here.rank, probe.here.round, probe.here.committing = 0, round_index, True  # in a thread of its own
        try:
            commit(self, round_index, tensors, *rest)
        finally:
            probe.here.committing = False
        probe.note("committed", sha=digest(tensors))
        probe.at("committed")

    def added(_: Any, update: Any) -> None:
        first = probe.here.__dict__.get("gathered") != probe.here.round
        probe.here.gathered = probe.here.round
        probe.note("added", client=update.client)
        if first:
            probe.at("gather")

    checkpoint.Checkpoints.commit = commits  # type: ignore[method-assign]

    def writes(only: str) -> Callable[..., None]:
        return lambda *_: probe.at("commit", only) if getattr(probe.here, "committing", False) else None

    _before(checkpoint, "save_file", writes("full"))  # before the first byte; the others when all are there and none is synced
    _before(checkpoint, "sync", writes(""))
    _before(updates.Outcome, "note", added)
    _after(aggregation, "aggregate", lambda _: probe.at("aggregate"))
    _before(Keeper, "_score", lambda _, server=None: probe.at("evaluate") if server is not None else None)
