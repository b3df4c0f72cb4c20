"""One training from start to end on every rank: greet, resume, rounds, commit, results. The scenarios of `run` are made of these.

It knows any algorithm by the names that its file exports, and nothing of what they do.
"""

import platform
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from fedmpi import aggregation, checkpoint, models
from fedmpi.errors import QuorumLost
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.lockstep import SERVER, Federation
from fedmpi.federation.post import Post
from fedmpi.folder import RunFolder
from fedmpi.host import Host, trained_share
from fedmpi.progress import Progress
from fedmpi.recipe import Recipe
from fedmpi.round import End, Round, cohort_size, fixed_cohort, place
from fedmpi.tensors import Tensors, num_bytes

LEAST_LIMIT_BYTES = 1 << 20


@dataclass
class Stop:
    """Whether this process has been told to stop, and by what. Set by signal handlers, read between rounds."""

    signal: str | None = None
    post: Post | None = None

    def install(self) -> None:
        """From now on TERM and USR1 finish the round in hand instead of ending the process."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._noted)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if self.post is not None:
            self.post.transport.want_stop()


@dataclass
class Session:
    """What one rank needs for one training."""

    recipe: Recipe
    algorithm: ModuleType
    host: Host
    path: Path
    title: str
    stop: Stop
    post: Post | None = None
    experiment: str = ""  # the program's: the runs inside a scenario are parts of one experiment
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # launcher and world, for the record
    quiet: bool = False

    def train(self) -> tuple[End, dict[str, Any] | None]:
        """Run to the end, or to a signal. The server gets the summary of a finished run, the others None."""
        recipe, clients = self.recipe, len(self.host.parties.clients)
        rank, size = (SERVER, 1) if self.post is None else (self.post.transport.rank, self.post.transport.size)
        placement = place(clients, size, recipe.ranks_per_client, recipe.groups)
        vault = checkpoint.Vault(self.path / "checkpoints" / "clients")
        fed = Federation(placement, rank, self.post, vault=vault, near=self.facts.get("store"))
        hosted = placement.hosted_by(rank)
        sizes = fed.greet(self.experiment, {c: len(self.host.examples(c)) for c in hosted})
        parties = {c: self.algorithm.build_client(self.host, c) for c in hosted}
        if rank != SERVER:
            if not hosted:
                print(f"fedmpi: rank {rank} has no client of the {clients} and idles", flush=True)
            fed.welcome({}, 0)
            return self._follow(fed, parties), None
        return self._lead(fed, parties, sizes)

    def _follow(self, fed: Federation, parties: Mapping[int, Any]) -> End:
        for rnd in fed.rounds():
            self.algorithm.run_round(fed, rnd, None, parties)
        fed.farewell()
        return fed.end

    # ---- the server -----------------------------------------------------------------------------------------------------------

    def _lead(self, fed: Federation, parties: Mapping[int, Any], sizes: Mapping[int, int]) -> tuple[End, dict[str, Any] | None]:
        folder = RunFolder(self.path, self.experiment, self.recipe.keep)
        folder.claim("auto", self.settings)  # the program has looked at --resume; what is in the folder is its own
        folder.describe({**self.facts, "data": self.host.parties.record})
        committed = folder.resume()
        done = folder.summary()
        fed.conductor = self._conductor(sizes, committed.round + 1 if committed else 0)
        if not self.quiet:
            print(f"fedmpi: {self.title}: {described(sizes)}, weights by {self.recipe.weights}", flush=True)
        server = None if done else self.algorithm.build_server(self.host)
        if committed is not None and server is not None:
            server = restored(server, committed.tensors)
        if done:
            fed.conductor.end = End.FINISHED
        owned = committed.owned if committed else {}
        fed.welcome(owned, LEAST_LIMIT_BYTES + 4 * (num_bytes(server.adapter) if server else 0))
        keeper = Keeper(self, folder, fed, owned, committed.record if committed else None)
        if server is not None:
            server = keeper.rounds(server, parties)
        else:
            for _ in fed.rounds():
                raise AssertionError("a finished run has no further round")
        fed.farewell()
        return fed.end, done or (keeper.finish(server) if fed.end is End.FINISHED else None)

    def _conductor(self, sizes: Mapping[int, int], first_round: int) -> Conductor:
        recipe, num_clients = self.recipe, len(sizes)
        fixed = recipe.sampling.startswith("fixed:")
        return Conductor(
            num_examples=[sizes[client] for client in range(num_clients)],
            rounds=recipe.rounds,
            seed=recipe.seed,
            cohort_size=len(fixed_cohort(recipe.sampling, num_clients))
            if fixed
            else cohort_size(recipe.clients_per_round, num_clients),
            sampling=recipe.sampling,
            weights=recipe.weights,
            min_clients=recipe.min_clients,
            on_quorum_lost=recipe.on_quorum_lost,
            first_round=first_round,
            durable=first_round - 1,
        )


class Keeper:
    """The server's bookkeeping around the rounds: evaluate, commit, report, stop early. One per session, on the server alone."""

    def __init__(
        self,
        session: Session,
        folder: RunFolder,
        fed: Federation,
        owned: Mapping[int, str],
        record: Mapping[str, Any] | None,
    ) -> None:
        self.session, self.folder, self.fed = session, folder, fed
        self.recipe, self.host = session.recipe, session.host
        self.owned = dict(owned)
        self.history: dict[str, Any] = (
            dict(record["history"]) if record else {"best": None, "worse": 0, "seconds": 0.0, "steps": 0.0, "train_s": 0.0}
        )
        fed.ledger.totals.update(record["totals"] if record else {})
        self.resumed = record is not None

    def rounds(self, server: Any, parties: Mapping[int, Any]) -> Any:
        """The loop that every algorithm shares."""
        conductor = self.fed.conductor
        assert conductor is not None
        if not self.resumed:
            self._line({"round": -1, "event": "evaluation", **self.host.score(server.adapter), **self._answer_base(server)})
        else:
            self._line({"round": conductor.first_round - 1, "event": "resume"})
        progress = Progress(self.session.title, conductor.first_round, self.recipe.rounds, self.session.quiet)
        conductor.largest = aggregation.largest(server.adapter)
        if self.session.stop.signal:
            conductor.end = End.SIGNAL
        try:
            for rnd in self.fed.rounds():
                began = time.monotonic()
                try:
                    after = self.session.algorithm.run_round(self.fed, rnd, server, parties)
                    conductor.largest = aggregation.largest(after.adapter)
                except QuorumLost as lost:
                    self._line({"round": rnd.index, "event": "quorum_lost", "message": str(lost), "attempt": rnd.attempt})
                    print(f"fedmpi: {lost}", file=sys.stderr, flush=True)
                    continue
                server = after
                self._after_round(rnd, server, began, progress)
        finally:
            progress.close()
        return server

    def _after_round(self, rnd: Round, server: Any, began: float, progress: Progress) -> None:
        conductor = self.fed.conductor
        assert conductor is not None
        line = self._figures(rnd)
        last = rnd.index + 1 >= self.recipe.rounds
        if last or (self.recipe.eval_every and (rnd.index + 1) % self.recipe.eval_every == 0):
            line.update(self.host.score(server.adapter))
        line["seconds"] = time.monotonic() - began
        self._line(line)
        self.owned.update(self.fed.outcome.owned)
        self._decide(conductor, line)
        if last or conductor.end or (rnd.index + 1) % self.recipe.checkpoint_every == 0:
            self._commit(rnd.index, server)
        progress.round(line)

    def _decide(self, conductor: Conductor, line: Mapping[str, Any]) -> None:
        """Whether this was the last round after all."""
        self.history["seconds"] += line["seconds"]
        self.history["steps"] += line["steps"]
        self.history["train_s"] += line["train_s"]
        if self.recipe.early_stop and "eval_loss" in line:
            better = self.history["best"] is None or line["eval_loss"] < self.history["best"]
            self.history["worse"] = 0 if better else self.history["worse"] + 1
            self.history["best"] = line["eval_loss"] if better else self.history["best"]
            if self.history["worse"] >= self.recipe.early_stop:
                conductor.end = End.FINISHED
        if self.session.stop.signal or self.fed.stop_wanted():
            conductor.end = End.SIGNAL

    def _figures(self, rnd: Round) -> dict[str, Any]:
        outcome = self.fed.outcome
        supervised = {c: m["supervised"] for c, m in outcome.metrics.items()}
        loss = sum(m["loss"] * m["supervised"] for m in outcome.metrics.values()) / sum(supervised.values())
        summed: dict[str, float] = {key: sum(m[key] for m in outcome.metrics.values()) for key in ("tokens", "flops", "steps")}
        return {
            "round": rnd.index,
            "attempt": rnd.attempt,
            "cohort": list(rnd.cohort),
            "counted": sorted(outcome.counted),
            "failures": {c: str(failure) for c, failure in sorted(outcome.failures.items())},
            "weights": dict(sorted(outcome.weights.items())),
            "train_loss": loss,
            "train_s": sum(m["seconds"] for m in outcome.metrics.values()),
            **summed,
            **self.fed.close_books(),
            "wait_s": outcome.wait_s,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "client_losses": {c: m["loss"] for c, m in sorted(outcome.metrics.items())},
        }

    def _answer_base(self, server: Any) -> dict[str, Any]:
        """The base model's answers; one solo run does not repeat what the federation's run tells."""
        return {} if self.session.post is None and self.session.title != "fed" else self.host.answer(server.adapter)

    def _line(self, line: dict[str, Any]) -> None:
        self.folder.pending.append(line)

    def _commit(self, round_index: int, server: Any) -> None:
        """State first, then the metrics lines: a line that is there tells of a round that cannot be lost."""
        record = {"lines": self.folder.pending, "history": self.history, "totals": dict(self.fed.ledger.totals)}
        self.folder.checkpoints.commit(round_index, saved(server), record, self.owned)
        self.folder.publish()
        assert self.fed.conductor is not None
        self.fed.conductor.durable = round_index

    def finish(self, server: Any) -> dict[str, Any]:
        """The results of a run that came to its end."""
        lines = self.folder.metrics()
        models.save_adapter(self.host.base.model, server.adapter, self.folder.path / "adapter")
        rounds = [line for line in lines if "event" not in line]
        first = next((line for line in lines if line["round"] == -1), {})
        totals = dict(self.fed.ledger.totals) | {"seconds": self.history["seconds"]}
        wanted = ("train_loss", "eval_loss", "eval_token_accuracy")
        final: dict[str, Any] = {key: rounds[-1][key] for key in wanted if key in rounds[-1]}
        summary = {
            "rounds": rounds[-1]["round"] + 1,
            "base": {key: first[key] for key in ("eval_loss", "eval_token_accuracy", "exact_match") if key in first},
            "final": final | self.host.answer(server.adapter),
            "totals": totals,
            "step_s": self.history["train_s"] / max(1.0, self.history["steps"]),
            "trainable_share": trained_share(server.adapter, self.host.base.model),
            "adapter_sha256": checkpoint.file_sha256(self.folder.path / "adapter" / "adapter_model.safetensors"),
            "data": self.host.parties.record,
            **environment(),
            **self.session.facts,
        }
        self.folder.write("summary.json", summary)
        return summary


def described(sizes: Mapping[int, int]) -> str:
    """The clients' examples, as they were declared and from now on are fixed."""
    shown = " ".join(str(sizes[client]) for client in sorted(sizes)[:16])
    return f"{len(sizes)} clients with {shown}{' ...' if len(sizes) > 16 else ''} examples, {sum(sizes.values())} in all"


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the recipe."""
    names = ("torch", "transformers", "peft", "numpy", "fedmpi")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in names}
    return {
        "versions": versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str:
    from fedmpi import __version__

    return __version__ if name == "fedmpi" else version(name)


def saved(server: Any) -> Tensors:
    """The tensors of a server's state: the fields that its class names in SAVED."""
    return {f"{name}/{key}": tensor for name in server.SAVED for key, tensor in getattr(server, name).items()}


def restored(server: Any, tensors: Tensors) -> Any:
    """The server value with the state that `saved` gave."""
    known = {f.name for f in fields(server)}
    parts = {name: {key.split("/", 1)[1]: t for key, t in tensors.items() if key.startswith(f"{name}/")} for name in server.SAVED}
    assert set(parts) <= known
    return replace(server, **parts)
