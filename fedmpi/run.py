"""The program: settings -> world -> federation -> for each round: run_round -> results. Every rank runs it.

    python -m fedmpi.run                                     one process simulates the whole federation
    torchrun --nproc_per_node 4 -m fedmpi.run                rank 0 serves, ranks 1 to 3 are clients
    mpirun -n 4 python -m fedmpi.run --config RECIPE.yaml

Exit codes: 0 finished, 1 failed (a rank that never came or went away too), 2 the settings, the model, the data or the launcher's
variables are not possible, 75 stopped by a signal, or short of time, after committing the round in hand, 130 left at once at the
second Ctrl-C.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import config, timeleft, training
from fedmpi.codecs import AUTO, RAW
from fedmpi.command import FAILED, FINISHED, STOPPED, fail, guarded
from fedmpi.errors import CheckpointError, QuorumLost, Stopped
from fedmpi.settings import accord, recipe
from fedmpi.settings.recipe import Recipe
from fedmpi.world import World, from_environment

if TYPE_CHECKING:
    from fedmpi.federation.post import Post
    from fedmpi.hosting.host import Host
    from fedmpi.round import End
    from fedmpi.sessions.session import Session
    from fedmpi.stop import Stop
    from fedmpi.transports.base import Transport

_AGAIN = "run the same command again to go on"
ABOUT = "Fine-tune a language model across parties, in lockstep. Without any argument the recipe builtin:quickstart is run."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    return guarded(lambda: _enter(sys.argv[1:] if arguments is None else arguments), "")


def _enter(arguments: Sequence[str]) -> int:
    wanted, own = recipe.read(arguments, "python -m fedmpi.run", ABOUT)
    world = from_environment(os.environ, wanted.transport)
    return guarded(lambda: start(wanted, own, world), f"rank {world.rank}")


def start(wanted: Recipe, own: Any, world: World) -> int:
    """Open the links, run what the recipe's scenario asks for, close."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings are stacks of C++; what matters comes as an error of ours
    import torch

    from fedmpi.federation.post import Post
    from fedmpi.stop import Stop

    torch.set_num_threads(wanted.threads)
    stop = Stop()
    stop.install()
    if world.rank == 0 or wanted.scenario != "fed":  # who decides whether another round begins
        stop.until = time.monotonic() + timeleft.seconds(wanted.time_left_s, os.environ)
    if world.rank == 0:
        print(f"fedmpi: {world.describe()}", flush=True)
    with open_transport(world, wanted.timeout_s) as transport:
        if transport is not None:
            stop.share(transport.want_stop, transport.stop_wanted)
        return Program(wanted, own, world, stop, Post(transport) if transport is not None else None).run()


def open_transport(world: World, timeout_s: float) -> "AbstractContextManager[Transport | None]":
    """The links of this rank, or none where it is alone."""
    if world.size == 1:
        return nullcontext()
    if world.transport == "mpi":
        from fedmpi.transports import mpi

        return mpi.open(world, timeout_s=timeout_s)
    from fedmpi.transports import torch_dist

    return torch_dist.open(world, timeout_s=timeout_s)


@dataclass
class Program:
    """One rank's run of a recipe: one scenario, or all of them and a table."""

    recipe: Recipe
    own: Any
    world: World
    stop: "Stop"
    post: "Post | None"
    supply_bytes: int = 0  # handed out to clients that cannot read a model for themselves

    def run(self) -> int:
        """Gives the exit code, the same on every rank."""
        path = self._path()
        self._check()
        training.load_hooks(self.recipe.train.hooks)  # a wrong name fails now, not in every client's turn
        with self._held(path):
            self._tell(path, "running")
            try:
                return self._train_all(path)
            except BaseException:
                self._tell(path, "failed")
                raise

    def _check(self) -> None:
        """Refuse what this rank could not train. A server beside its clients trains only to align an emulator."""
        from fedmpi import models
        from fedmpi.hosting.host import pick_device

        wanted, model = self.recipe, self.recipe.model
        device = pick_device(wanted.device, self.world.local_rank)
        aligns = any(recipe.scheme_of(name) is not None for name in (wanted.algorithm, *wanted.compare))
        if self.world.rank == 0 and self.world.size > 1 and not aligns:
            training.check(wanted.train, model.quantization)
        else:
            dtype = str(models.dtype_of(model, device)).removeprefix("torch.")
            training.check(wanted.train, model.quantization, device, dtype)

    def _held(self, path: Path) -> AbstractContextManager[Any]:
        """The run folder, taken and locked by the server; another's is not even locked."""
        from fedmpi.record.folder import RunFolder

        if self.world.rank != 0:
            return nullcontext()
        experiment, settings = self._identity()
        folder = RunFolder(path, experiment, self.recipe.keep)
        folder.check(self.recipe.resume, settings)
        lock = folder.lock()
        folder.claim(self.recipe.resume, settings)
        return lock

    def _identity(self) -> tuple[str, dict[str, Any]]:
        """What names this experiment, and all its settings: the recipe's and the algorithm's own."""
        own = config.as_dict(self.own)
        group = {recipe.short(self.recipe.algorithm): own} if own else {}
        return config.digest({**self.recipe.experiment(), **group}), {**self.recipe.settings(), **group}

    def _train_all(self, path: Path) -> int:
        from fedmpi.round import End

        results: dict[str, Any] = {}
        try:
            for name, end, found in self._trainings(path):
                results[name] = found
                if end is End.SIGNAL:
                    return self._stopped(path, "before another round")
                if end is not End.FINISHED:
                    self._tell(path, "failed")
                    why = "too few updates counted, as rank 0 says above; what had counted is kept"
                    fail(QuorumLost(f"the run is given up: {why}: {_AGAIN}"), f"rank {self.world.rank}")
                    return FAILED
        except Stopped as stopped:
            return self._stopped(path, str(stopped))
        if self.world.rank == 0:
            from fedmpi import report

            report.show(results, path)
            print(f"report: {report.write(path)}", flush=True)
        self._tell(path, "finished")
        return FINISHED

    def _stopped(self, path: Path, where: str) -> int:
        self._tell(path, "preempted")
        if self.world.rank == 0:
            why = "out of time" if self.stop.time_is_up else "told to stop"
            print(f"fedmpi: {why}, and stopped {where}: {_AGAIN}", flush=True)
        return STOPPED

    def _trainings(self, path: Path) -> "Iterator[tuple[str, End, Any]]":
        """The scenarios, then other algorithms: the name of each, how it ended, and its scores."""
        yield from self._scenarios(path)
        for algorithm in self.recipe.compare:
            name = recipe.short(algorithm)
            yield name, *self._beside(algorithm, name, path / name)

    def _scenarios(self, path: Path) -> "Iterator[tuple[str, End, Any]]":
        host = self._host(path)
        names = ("local", "global", "fed") if self.recipe.scenario == "all" else (self.recipe.scenario,)
        for name in names:
            folder = path / name if len(names) > 1 and name != "fed" else path
            yield name, *(self._fed(host, folder) if name == "fed" else self._solos(name, host, folder))

    def _host(self, path: Path) -> "Host":
        from fedmpi import data
        from fedmpi.hosting import emulation
        from fedmpi.hosting.base import Base
        from fedmpi.hosting.host import Host, pick_device

        wanted = self.recipe
        device = pick_device(wanted.device, self.world.local_rank)
        measures = self.world.rank == 0 or wanted.scenario != "fed"
        parties = data.federate(wanted.data, wanted.clients, wanted.seed, self._own_clients(), measures)
        scheme = recipe.scheme_of(wanted.algorithm)
        if scheme is None:
            base, split, original = Base(wanted.model, wanted.peft, device, wanted.seed), None, None
        else:
            known = self._identity()[0]
            found = emulation.outfit(wanted, scheme, device, path, parties, self.post, known, self.stop.over)
            base, split, original, self.supply_bytes = found
        return Host(
            base,
            parties,
            wanted.data,
            wanted.train,
            wanted.eval,
            wanted.aggregation,
            wanted.server_optimizer,
            wanted.server,
            scratch=path,
            ranks=tuple(map(int, wanted.peft.client_ranks)),
            split=split,
            original=original,
        )

    def _own_clients(self) -> "tuple[int, ...] | None":
        """Whose files this rank may open where each client brings its own; None: there is nothing to keep apart."""
        from fedmpi.round import place

        wanted = self.recipe
        if wanted.data.splitter != "given" or wanted.clients is None:
            return None
        return place(wanted.clients, self.world.size, wanted.ranks_per_client, tuple(map(int, wanted.groups))).hosted_by(
            self.world.rank
        )

    def _path(self) -> Path:
        return Path(self.recipe.run_dir or f"runs/{recipe.short(self.recipe.algorithm)}-{self._identity()[0]}")

    def _session(self, wanted: Recipe, host: "Host", path: Path, scenario: str, post: "Post | None", title: str = "") -> "Session":
        from fedmpi.sessions.session import Session

        world = {"launcher": self.world.launcher, "world": self.world.size, "transport": self.world.transport}
        facts, title = {"scenario": scenario, **world, **host.reported()}, title or scenario
        algorithm, quiet = recipe.algorithm(wanted.algorithm), self.world.rank != 0
        whole = self._identity()
        given = self.supply_bytes if scenario == "fed" else 0
        return Session(
            wanted, self.own, algorithm, host, path, title, self.stop, post, *whole, facts, given, self.world.store, quiet,
            goes_on=post is not None and self._goes_on(),
        )  # fmt: skip

    def _goes_on(self) -> bool:
        """Whether a rank that is lost is left behind, where the round can do without it."""
        asked = self.recipe.on_rank_lost
        return asked == "continue" or (asked == "auto" and self.world.outlives and not accord.needs_all_ranks(self.recipe))

    def _fed(self, host: "Host", path: Path, title: str = "fed") -> "tuple[End, Any]":
        session = self._session(self.recipe, host, path, "fed", self.post, title)
        if self.recipe.codec == AUTO:
            session = self._coded(session, path)
        return session.train()

    def _coded(self, session: "Session", path: Path) -> "Session":
        """The same with a chain, chosen now or before; it joins the run's settings and its record."""
        from fedmpi.sessions import choosing

        host = session.host
        num_values = sum(tensor.numel() for tensor in host.base.fresh.values())
        chosen = choosing.codec(self.recipe, num_values, len(host.parties.clients), path, self.post)
        if self.world.rank == 0:
            reason = chosen.reason or "as this run began"
            print(f"fedmpi: {session.title}: codec auto is {chosen.chain}: {reason}", flush=True)
            choosing.write(path, session.settings, chosen)
        wanted = replace(session.recipe, codec_chosen=chosen.chain)
        facts = {**session.facts, "codec": {"chosen": chosen.chain, "reason": chosen.reason or choosing.reason(path)}}
        return replace(session, recipe=wanted, facts=facts)

    def _beside(self, algorithm: str, title: str, path: Path) -> "tuple[End, Any]":
        """Another algorithm's federation of the same clients, as a run of its own in a folder of its own."""
        wanted = replace(self.recipe.beside(algorithm), run_dir=str(path), resume="auto")
        other = Program(wanted, recipe.algorithm(algorithm).Config(), self.world, self.stop, self.post)
        with other._held(path):
            return other._fed(other._host(path), path, title)

    def _solos(self, name: str, host: "Host", path: Path) -> "tuple[End, Any]":
        """Federations of one, side by side on the ranks: every client alone, or one client that has all the data."""
        from fedmpi.sessions.solo import Solo, completed, run_solos

        wanted = replace(self.recipe.unscored(), clients_per_round=None, sampling="all", min_clients=1)
        none = {"codec_up": None, "codec_down": None, "codec_chosen": None, "codec_budget": Recipe.codec_budget}
        wanted = replace(wanted, codec=RAW, **none)  # type: ignore[arg-type]  # nothing is exchanged
        if name == "global":
            jobs = {0: self._session(wanted, host.pooled(), path, "global", None)}
        else:
            numbers = range(len(host.parties.clients))
            jobs = {c: self._session(wanted, host.alone(c), path / "clients" / str(c), f"client {c}", None) for c in numbers}
        solos = {c: Solo(c, job) for c, job in jobs.items()}
        complete = partial(completed, host, jobs) if host.split else None
        return run_solos(name, solos, self._identity()[0], self.recipe.seed, self.stop, self.post, complete)

    def _tell(self, path: Path, state: str) -> None:
        """RUN_DIR/state.json: what a batch script reads, where the exit code does not reach it."""
        if self.world.rank == 0:
            from fedmpi.record.checkpoint import write_atomically

            said = {"state": state, "signal": self.stop.signal, "time_is_up": self.stop.time_is_up}
            with suppress(CheckpointError) if state == "failed" else nullcontext():  # a full disk is told of already
                write_atomically(path / "state.json", json.dumps(said) + "\n")


if __name__ == "__main__":
    sys.exit(main())
