"""What the server does around the rounds: evaluate, commit, tell, decide to stop, and write the results. Rank 0 alone has a keeper.

It knows any algorithm by its `run_round` and its server's `adapter` and `SAVED`; it must never know what they do.
"""

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import ModuleType
from typing import Any

from fedmpi import aggregation, evaluation
from fedmpi.errors import ConfigError, QuorumLost
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.lockstep import Federation
from fedmpi.hosting.host import Host, environment, trained_share
from fedmpi.progress import Progress
from fedmpi.record import checkpoint
from fedmpi.record.commits import Commits
from fedmpi.record.folder import RunFolder
from fedmpi.round import End, Round
from fedmpi.settings.recipe import Recipe
from fedmpi.stop import Stop
from fedmpi.tensors import Tensors, part, prefixed

RECENT = 10  # rounds by which the time for the next one is reckoned
COSTS = ("tokens", "flops", "steps", "turn_s", "peak_rss_bytes", "peak_gpu_bytes", "energy_j")
_NEW = {"best": None, "worse": 0, "seconds": 0.0, "steps": 0.0, "train_s": 0.0}


@dataclass
class Keeper:
    """The server's bookkeeping around the rounds of one training: evaluate, commit, report, stop early."""

    recipe: Recipe
    algorithm: ModuleType
    host: Host
    folder: RunFolder
    fed: Federation
    stop: Stop
    title: str
    quiet: bool
    owned: dict[int, str]  # which state of each client counts, by digest
    history: dict[str, Any] = field(default_factory=lambda: dict(_NEW))

    def __post_init__(self) -> None:
        if self.recipe.eval.overlap and not self.host.parties.heldout:
            raise ConfigError("eval.overlap: clients score on their own rows here, and cannot while they train: leave it out")
        self.spans: deque[float] = deque(maxlen=RECENT)  # seconds of the last rounds, lost ones too
        self.commits = Commits(self.folder, partial(setattr, self.fed.conductor, "durable"))

    def rounds(self, server: Any, parties: Mapping[int, Any], record: Mapping[str, Any] | None) -> Any:
        """The loop that every algorithm shares."""
        conductor = self.fed.conductor
        assert conductor is not None
        over = self.stop.over()
        if record is not None:
            self.history = dict(record["history"])
            self.fed.ledger.totals.update(record["totals"])
            self._line({"round": conductor.first_round - 1, "event": "resume"})
        elif not over:
            self._line({"round": -1, "event": "evaluation", **self._score(), **self._answer_base()})
        progress = Progress(self.title, conductor.first_round, self.recipe.rounds, self.quiet)
        conductor.largest = aggregation.largest(server.adapter)
        if self._waited_enough():
            conductor.end = End.FINISHED
        elif over or self.stop.over():
            conductor.end = End.SIGNAL
        try:
            with self.commits:
                for rnd in self.fed.rounds():
                    began = time.monotonic()
                    try:
                        after = self.algorithm.run_round(self.fed, rnd, server, parties)
                        conductor.largest = aggregation.largest(after.adapter)
                    except QuorumLost as lost:
                        self._lost(rnd, server, began, str(lost))
                        continue
                    server = after
                    self._after_round(rnd, server, began, progress)
        finally:
            progress.close()
        return server

    def _lost(self, rnd: Round, server: Any, began: float, why: str) -> None:
        """A round that did not count. Where the run ends with it, what counted since the last checkpoint is made durable."""
        conductor = self.fed.conductor
        assert conductor is not None
        self._tell_of_ranks(rnd)
        failures = {c: str(failure) for c, failure in sorted(self.fed.outcome.failures.items())}
        self._line({"round": rnd.index, "event": "quorum_lost", "message": why, "attempt": rnd.attempt, "failures": failures})
        print(f"fedmpi: {why}", file=sys.stderr, flush=True)
        self._heed(conductor, rnd.index, began)
        if not conductor.end:
            return self.commits.check()
        self.commits.wait()
        if rnd.index - 1 > conductor.durable:
            self._commit(rnd.index - 1, server)
            self.commits.wait()
        else:
            self.folder.publish(self.folder.take())

    def _after_round(self, rnd: Round, server: Any, began: float, progress: Progress) -> None:
        conductor = self.fed.conductor
        assert conductor is not None
        last = rnd.index + 1 >= self.recipe.rounds
        due = last or bool(self.recipe.eval_every and (rnd.index + 1) % self.recipe.eval_every == 0)
        later = due and self.recipe.eval.overlap and not last
        trained = time.monotonic()
        scores = self._score(server) if due and not later else {}  # first: what it sends belongs to this round
        line = {**self._figures(rnd), **server.figures, **scores}
        self._tell_of_ranks(rnd)
        line["round_s"], line["score_s"] = trained - began, time.monotonic() - trained
        line["seconds"] = time.monotonic() - began
        self.owned.update(self.fed.outcome.owned)
        self._decide(conductor, line)
        self._heed(conductor, rnd.index + 1, began)
        ends = last or bool(conductor.end)
        if later and not ends:
            self.commits.tidy(self.owned)
            self.fed.meanwhile = partial(self._scored, rnd.index, server, line, progress)
        else:
            line |= self._score(server) if later else {}
            self._complete(rnd.index, server, line, ends, progress)

    def _scored(self, round_index: int, server: Any, line: dict[str, Any], progress: Progress) -> None:
        """What was put off: the scores of the round before, while clients are busy with this one. Its line is complete then."""
        began = time.monotonic()
        line |= self._score(server)
        line["score_s"] = time.monotonic() - began
        self._complete(round_index, server, line, False, progress, between_rounds=False)

    def _complete(
        self, round_index: int, server: Any, line: dict[str, Any], ends: bool, progress: Progress, between_rounds: bool = True
    ) -> None:
        """The line of a round, and its checkpoint if one is due."""
        self._line(line)
        self.commits.check()
        if ends or (round_index + 1) % self.recipe.checkpoint_every == 0:
            self._commit(round_index, server, between_rounds)
        if ends:  # nobody hears that the run is over before all of it is on disk
            self.commits.wait()
        progress.round(line)

    def _tell_of_ranks(self, rnd: Round) -> None:
        """What the federation noted: ranks that were lost, and ranks that came back."""
        if self.fed.roll is not None:
            for event in self.fed.roll.told():
                self._line({"round": rnd.index, **event})

    def _decide(self, conductor: Conductor, line: Mapping[str, Any]) -> None:
        """Whether this was the last round after all."""
        self.history["seconds"] += line["seconds"]
        self.history["steps"] += line["steps"]
        self.history["train_s"] += line["train_s"]
        judged = "eval_loss" if "eval_loss" in line else "eval_loss_emu"  # who has the emulator alone stops by it
        if self.recipe.early_stop and judged in line:
            better = self.history["best"] is None or line[judged] < self.history["best"]
            self.history["worse"] = 0 if better else self.history["worse"] + 1
            self.history["best"] = line[judged] if better else self.history["best"]
        if self._waited_enough():
            conductor.end = End.FINISHED

    def _waited_enough(self) -> bool:
        """Whether early stopping has set in; a resumed run asks before its first round."""
        return 0 < self.recipe.early_stop <= int(self.history["worse"])

    def _heed(self, conductor: Conductor, following: int, began: float) -> None:
        """Somebody was told to stop, or the next round would be cut off: the run ends here, and a restart goes on."""
        self.spans.append(time.monotonic() - began)
        if conductor.end or following >= self.recipe.rounds:
            return
        needed_s, left_s = max(self.spans) + self.commits.slowest_s, self.stop.left_s()
        if left_s < needed_s:
            self.stop.time_is_up = True
            said = f"{max(0.0, left_s):.0f} s are left of the job's time, a round and its checkpoint took up to {needed_s:.0f} s"
            print(f"fedmpi: {said}: round {following + 1} is not begun", flush=True)
        if self.stop.time_is_up or self.stop.wanted():
            conductor.end = End.SIGNAL

    def _figures(self, rnd: Round) -> dict[str, Any]:
        outcome = self.fed.outcome
        supervised = {c: m["supervised"] for c, m in outcome.metrics.items()}
        loss = sum(m["loss"] * m["supervised"] for m in outcome.metrics.values()) / sum(supervised.values())
        summed: dict[str, float] = {key: sum(m[key] for m in outcome.metrics.values()) for key in ("tokens", "flops", "steps")}
        costs = {c: self._costs(c, metrics) for c, metrics in sorted(outcome.metrics.items())}
        return {
            "round": rnd.index,
            "attempt": rnd.attempt,
            "cohort": sorted({*rnd.cohort, *outcome.failures}),
            "counted": sorted(outcome.counted),
            "failures": {c: str(failure) for c, failure in sorted(outcome.failures.items())},
            **({"benched": list(benched)} if (benched := self.fed.conductor and self.fed.conductor.benched) else {}),
            "weights": dict(sorted(outcome.weights.items())),
            "train_loss": loss,
            "train_s": sum(m["seconds"] for m in outcome.metrics.values()),
            **summed,
            **self.fed.close_books(),
            **self._communication(),
            "broadcast_s": outcome.broadcast_s,
            "wait_s": outcome.wait_s,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "skipped": {c: m["skipped"] for c, m in sorted(outcome.metrics.items()) if m.get("skipped")},
            "client_losses": {c: m["loss"] for c, m in sorted(outcome.metrics.items())},
            "client_costs": costs,
        }

    def _communication(self) -> dict[str, float]:
        """Beside what of the round's communication nobody computed; and what went on behind a next client's turn, on one rank."""
        outcome, leader_of = self.fed.outcome, self.fed.placement.leader_of
        turns_s, hidden_s = Counter[int](), Counter[int]()
        for client, metrics in outcome.metrics.items():
            turns_s[leader_of[client]] += metrics.get("turn_s", 0.0)
            hidden_s[leader_of[client]] += metrics.get("hidden_s", 0.0)
        computing_s = max(outcome.meanwhile_s, *turns_s.values())
        passed_s = outcome.broadcast_s + outcome.meanwhile_s + outcome.gather_s
        return {"exposed_s": max(0.0, passed_s - computing_s), "hidden_s": max(hidden_s.values())}

    def _costs(self, client: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What a client's part of the round came to; its own copy of what went down, where it had one."""
        up, down, speed = self.fed.ledger.up[client], self.fed.ledger.down[client], self.recipe.link_mbps
        measured = {key: metrics[key] for key in COSTS if key in metrics}
        return {**measured, "up_bytes": up, "down_bytes": down, "transfer_s": speed and 8e-6 * (up + down) / speed}

    def _score(self, server: Any = None) -> dict[str, float]:
        """Held-out loss, before the first round of the base: on rows that the server has, else on each client's own rank."""
        found: dict[str, float] = {}
        for ending, (base, tensors) in self.host.views(server).items():
            if self.host.parties.heldout:
                found |= _ended(self.host.score(tensors, base), ending)
            elif base is self.host.base:  # clients score what they hold
                found |= _ended(evaluation.overall(self.fed.measure(tensors or {})), ending)
        return found

    def _answers(self, server: Any = None) -> dict[str, Any]:
        views = self.host.views(server).items()
        return {k: v for ending, (base, tensors) in views for k, v in _ended(self.host.answer(tensors, base), ending).items()}

    def _answer_base(self) -> dict[str, Any]:
        """The base model's answers, once: a run beside the federation's does not repeat what that tells."""
        return self._answers() if self.title == "fed" else {}

    def _line(self, line: dict[str, Any]) -> None:
        self.folder.pending.append(line)

    def _commit(self, round_index: int, server: Any, between_rounds: bool = True) -> None:
        """The state of now. Its tensors are handed over, not copied: states are replaced, never mutated."""
        state = saved(server) | prefixed("base/", self.host.base.folds.saved())
        state |= prefixed("downlink/", self.fed.downlink.saved(round_index))
        record = {"history": dict(self.history), "totals": dict(self.fed.ledger.totals), "codec_chosen": self.recipe.codec_chosen}
        self.commits.begin(round_index, state, record, dict(self.owned), between_rounds)

    def finish(self, server: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The results of a run that came to its end."""
        lines = self.folder.metrics()
        folders = {ending: self.folder.path / f"adapter{ending}" for ending in self.host.views(server)}
        where = " and ".join(map(str, folders.values()))
        advice = "every round is safe: make room and start the run again, it ends there"
        with checkpoint.writing(where, advice):
            for ending, (base, tensors) in self.host.views(server).items():
                base.save(tensors or {}, folders[ending])
                base.folds.save(folders[ending])
        rounds = [line for line in lines if "event" not in line]
        first = next((line for line in lines if line.get("event") == "evaluation"), {})
        totals = dict(self.fed.ledger.totals) | {"seconds": self.history["seconds"]}
        measured = [f"{key}{ending}" for key in ("eval_loss", "eval_token_accuracy", "exact_match") for ending in folders]
        final: dict[str, Any] = {key: rounds[-1][key] for key in ("train_loss", *measured) if key in rounds[-1]}
        summary = {
            "rounds": rounds[-1]["round"] + 1,
            "base": {key: first[key] for key in measured if key in first},
            "final": final | self._answers(server),
            "totals": totals,
            "step_s": self.history["train_s"] / max(1.0, self.history["steps"]),
            "trainable_share": trained_share(server.adapter, self.host.base.model),
            "adapter_sha256": checkpoint.file_sha256(next(iter(folders.values())) / "adapter_model.safetensors"),
            "heldout_samples": self.host.heldout_samples,
            **environment(),
            **facts,
        }
        self.folder.write("summary.json", summary)
        return summary


def _ended(figures: Mapping[str, Any], ending: str) -> dict[str, Any]:
    return {f"{name}{ending}": value for name, value in figures.items()}


def saved(server: Any) -> Tensors:
    """The tensors of a server's state: the fields that its class names in SAVED."""
    return {key: tensor for name in server.SAVED for key, tensor in prefixed(f"{name}/", getattr(server, name)).items()}


def restored(server: Any, tensors: Tensors) -> Any:
    """The server value with the state that `saved` gave."""
    known = {f.name for f in fields(server)}
    parts = {name: part(tensors, f"{name}/") for name in server.SAVED}
    assert set(parts) <= known
    return replace(server, **parts)
