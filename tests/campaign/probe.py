"""Inside a rank: notes what happens, and makes the faults that were planned for it, by wrapping functions of the product.

Events go to one JSON-lines file per process, each line written at once, so that what a killed process knew is there.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedmpi import aggregation, checkpoint, training
from fedmpi.federation.lockstep import Federation
from fedmpi.tensors import digest
from fedmpi.transports.link import Link
from tests.campaign.faults import DONE_AT_ONCE, Fault, kill_self

LARGE_BYTES = 1024
SLOW_WRITES, SLOW_S = 20, 0.05


class Probe:
    """What one process notes and does wrong. Ranks that are threads share it; who speaks is known by thread."""

    def __init__(self, folder: Path, faults: Sequence[Fault]) -> None:
        self.folder, self.faults = folder, faults
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{os.getpid()}-{time.monotonic_ns()}.jsonl").open("a", buffering=1, encoding="utf-8")
        self.here = threading.local()  # rank and round of this thread
        self.flip_next = self.poison_next = False
        self.slow_writes = 0

    def note(self, event: str, **facts: Any) -> None:
        """One line."""
        said = {"event": event, "rank": self.here.rank, "round": self.here.round, "t": time.monotonic(), **facts}
        self.file.write(json.dumps(said) + "\n")

    def at(self, phase: str) -> None:
        """Come to a phase: make the faults that wait for it, each once in the life of the run, whatever process it is by then."""
        for fault in self.faults:
            if (fault.phase, fault.round, fault.rank) == (phase, self.here.round, self.here.rank):
                with contextlib.suppress(FileExistsError):
                    (self.folder / f"made-{fault.name}").touch(exist_ok=False)
                    self.note("fault", kind=fault.kind, phase=phase)
                    self.make(fault)

    def make(self, fault: Fault) -> None:
        """Do it."""
        if fault.kind == "slow":
            self.slow_writes = SLOW_WRITES
        elif fault.kind == "flip":
            self.flip_next = True
        elif fault.kind == "nan":
            self.poison_next = True
        elif fault.kind == "truncate":
            newest = max((self.folder.parent / "run" / "checkpoints").glob("round-*"))
            os.truncate(newest / "state.safetensors", (newest / "state.safetensors").stat().st_size // 2)
            kill_self()
        else:
            DONE_AT_ONCE[fault.kind]()

    def written(self, parts: Sequence[memoryview]) -> list[memoryview]:
        """What really goes out on a link."""
        if self.slow_writes:
            self.slow_writes -= 1
            time.sleep(SLOW_S)
        sent = list(parts)
        if self.flip_next and len(sent[-1]) >= LARGE_BYTES:
            self.flip_next = False
            damaged = bytearray(sent[-1])
            damaged[len(damaged) // 2] ^= 4
            sent[-1] = memoryview(damaged)
        return sent


class Steps(training.Hook):
    """Reaches into a client's training."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def before_step(self, step: training.Step) -> None:
        """The second step is in the middle."""
        if step.index != 1:
            return
        self.probe.at("train")
        if self.probe.poison_next:
            self.probe.poison_next = False
            with torch.no_grad():
                next(p for p in step.model.parameters() if p.requires_grad).fill_(float("nan"))


def install(folder: Path, faults: Sequence[Fault]) -> None:
    """Wrap what a round consists of."""
    probe = Probe(folder, faults)
    _wrap_rounds(probe)
    _wrap_exchange(probe)
    _wrap_training(probe)
    _wrap_commit(probe)


def _wrap_rounds(probe: Probe) -> None:
    rounds = Federation.rounds

    def noted(fed: Federation) -> Iterator[Any]:
        probe.here.rank, probe.here.round = fed.rank, -1
        probe.note("begin", world=fed.post.transport.size if fed.post else 1)
        for rnd in rounds(fed):
            probe.here.round = rnd.index
            said = {"attempt": rnd.attempt, "verdict": int(rnd.verdict), "counted": list(rnd.counted), "durable": rnd.durable}
            probe.note("round", cohort=list(rnd.cohort), **said)
            probe.at("announce" if fed.conductor is not None else "announced")
            yield rnd
        probe.note("end", end=int(fed.end))

    Federation.rounds = noted  # type: ignore[method-assign]


def _wrap_exchange(probe: Probe) -> None:
    broadcast, write, aggregate = Federation.broadcast, Link._write, aggregation.aggregate

    def broadcasts(fed: Federation, tensors: Any) -> Any:
        if tensors is not None:
            probe.at("broadcast")
        held = broadcast(fed, tensors)
        if held:
            probe.note("holds", sha=digest(held))
        return held

    def writes(link: Link, message: Any) -> None:
        wire = link._wire
        if not isinstance(wire, Damaged):
            link._wire = Damaged(wire, probe)
        write(link, message)

    def aggregates(updates: Any, start: Any) -> Any:
        def watched() -> Iterator[Any]:
            for number, update in enumerate(updates):
                probe.note("added", client=update.client, sha=digest(update.tensors))
                if number == 0:
                    probe.at("gather")
                yield update

        return aggregate(watched(), start)

    Federation.broadcast, Link._write, aggregation.aggregate = broadcasts, writes, aggregates  # type: ignore[method-assign]


class Damaged:
    """A wire whose writes pass by the probe."""

    def __init__(self, wire: Any, probe: Probe) -> None:
        self._wire, self._probe = wire, probe

    def write(self, *parts: memoryview) -> None:
        """Late, or with a bit turned."""
        self._wire.write(*self._probe.written(parts))

    def read(self, *parts: memoryview) -> None:
        """As it comes."""
        self._wire.read(*parts)

    def close(self) -> None:
        """For good."""
        self._wire.close()


def _wrap_training(probe: Probe) -> None:
    fit = training.fit

    def fits(model: Any, *arguments: Any, hooks: Sequence[Any] = (), **options: Any) -> Any:
        done = fit(model, *arguments, hooks=(*hooks, Steps(probe)), **options)
        probe.at("upload")
        if probe.poison_next:  # behind the loop's own checks, as a broken client would send it
            probe.poison_next = False
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return done

    training.fit = fits


def _wrap_commit(probe: Probe) -> None:
    commit, sync = checkpoint.Checkpoints.commit, checkpoint.sync

    def commits(self: Any, round_index: int, tensors: Any, record: Any, owned: Any) -> None:
        probe.here.committing = True
        try:
            commit(self, round_index, tensors, record, owned)
        finally:
            probe.here.committing = False
        probe.note("committed", sha=digest(tensors))
        probe.at("committed")

    def syncs(path: Path) -> None:
        if getattr(probe.here, "committing", False):
            probe.at("commit")
        sync(path)

    checkpoint.Checkpoints.commit, checkpoint.sync = commits, syncs  # type: ignore[method-assign]
