"""One training from start to end on every rank: greet, resume, rounds, commit, results. The scenarios of `run` are made of these.

It knows any algorithm by the names that its file exports, and nothing of what they do.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fedmpi import aggregation, config
from fedmpi.errors import ConfigError, PeerLost, PeerSilent
from fedmpi.federation import supply
from fedmpi.federation.bench import Bench
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.lockstep import Federation
from fedmpi.federation.post import Post
from fedmpi.federation.sums import Terms
from fedmpi.hosting.host import Host
from fedmpi.record import checkpoint
from fedmpi.record.folder import RunFolder
from fedmpi.round import SERVER, End, Placement, cohort_of, place
from fedmpi.sessions import choosing
from fedmpi.sessions.keeper import Keeper, restored
from fedmpi.settings import exchange
from fedmpi.settings.recipe import Recipe
from fedmpi.stop import Stop
from fedmpi.tensors import Tensors, num_bytes, part

LEAST_LIMIT_BYTES = 1 << 20


@dataclass
class Session:
    """What one rank needs for one training."""

    recipe: Recipe
    own: Any  # the algorithm's own settings
    algorithm: ModuleType
    host: Host
    path: Path
    title: str
    stop: Stop
    post: Post | None = None  # without one this process is the whole world of this training
    experiment: str = "alone"  # the program's: trainings inside a scenario are parts of one experiment
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # launcher and world, for the record
    supply_bytes: int = 0  # what was handed out before this training
    near: str | None = None  # host:port that every rank can reach, where there is one
    quiet: bool = False
    goes_on: bool = False  # without ranks that are gone

    def train(self) -> tuple[End, dict[str, Any] | None]:
        """Run to the end, or to a signal. The server gets the summary of a finished run, the others None."""
        recipe, clients = self.recipe, len(self.host.parties.clients)
        rank, size = (SERVER, 1) if self.post is None else (self.post.transport.rank, self.post.transport.size)
        placement = place(clients, size, recipe.ranks_per_client, tuple(map(int, recipe.groups)))
        vault = checkpoint.Vault(self.path / "checkpoints" / "clients")
        hosted = placement.hosted_by(rank)
        answer = partial(self.host.score_each, clients=hosted)
        folds = self.host.base.folds
        folds.restore({})  # another training may have stood on this base
        num_examples = {client: self.host.num_examples(client) for client in hosted}
        way = exchange.choose(recipe, self.algorithm, placement, cohort_of(recipe.sampling, recipe.clients_per_round, clients))
        if way.reason and rank == SERVER and self.post is not None:
            print(f"fedmpi: {self.title}: exchange auto is {way.exchange}: {way.reason}", flush=True)
        fed = Federation(
            placement, rank, self.post, vault=vault, scratch=self.host.scratch, near=self.near, ground=folds, answer=answer,
            device=self.host.base.device, up=recipe.chain("up"), down=recipe.chain("down"), collective=way.exchange == "collective",
            halves=self.host.rules.rule in aggregation.HALVES,
            terms=None if way.exchange == "star" else Terms(recipe.weights, num_examples, self.host.own_check),
            supplied=self._supplied(placement), goes_on=self.goes_on and way.exchange == "star", patience_s=recipe.timeout_s,
        )  # fmt: skip
        if recipe.scenario == "fed" and rank == SERVER and self.post is not None:
            then = "the run goes on without it" if fed.goes_on else "the job ends"
            print(f"fedmpi: where a rank is lost, {then} (on_rank_lost {recipe.on_rank_lost})", flush=True)
        # ranks that read other rows are as foreign as ranks with other settings
        experiment = f"{self.experiment} by {way.exchange} on data {config.digest(self.host.parties.record)}"
        sizes = fed.greet(experiment, num_examples, {c: self.host.about(c) for c in hosted})
        parties = {c: self.algorithm.build_client(self.own, self.host, c) for c in hosted}
        if rank != SERVER:
            if not hosted:
                print(f"fedmpi: rank {rank} has no client of the {clients} and idles", flush=True)
            fed.welcome({}, 0)
            return self._follow(fed, parties, self.post), None
        return self._lead(fed, parties, sizes)

    def _follow(self, fed: Federation, parties: Mapping[int, Any], post: "Post | None") -> End:
        try:
            for rnd in fed.rounds():
                self.algorithm.run_round(fed, rnd, None, parties)
            fed.farewell()
        except (PeerLost, PeerSilent) as lost:
            if post is None or not fed.goes_on or not post.transport.can_return:
                raise
            rank = post.transport.rank
            print(f"fedmpi: rank {rank}: {lost}; it asks to be let in again", file=sys.stderr, flush=True)
            with post.apart():
                post.transport.reopen(SERVER)
            post.forget(SERVER)
            return self.train()[0]
        return fed.end

    def _supplied(self, placement: Placement) -> Callable[[int, Mapping[str, Any]], int] | None:
        """How a rank is given a model anew that was started again; None where nobody is given one."""
        original, post = self.host.original, self.post
        if original is None or post is None:
            return None

        def give(peer: int, greeting: Mapping[str, Any]) -> int:
            supply.same(peer, greeting, self.experiment)
            return supply.give(post, [peer], original.supply(), [peer] if placement.hosted_by(peer) else [])

        return give

    @property
    def adapter_bytes(self) -> int:
        """What the adapter takes on the way to another rank; nothing where it stays."""
        return 4 * num_bytes(self.host.base.fresh) if self.host.split else 0

    def adapter(self) -> Tensors:
        """The adapter of the last durable round."""
        committed = RunFolder(self.path, self.experiment, self.recipe.keep).checkpoints.latest()
        tensors = committed.tensors if committed else {}
        return {name.removeprefix("adapter/"): tensor for name, tensor in tensors.items() if name.startswith("adapter/")}

    # ---- the server -----------------------------------------------------------------------------------------------------------

    def _lead(self, fed: Federation, parties: Mapping[int, Any], sizes: Mapping[int, int]) -> tuple[End, dict[str, Any] | None]:
        recipe = self.recipe
        folder = RunFolder(self.path, self.experiment, recipe.keep)
        folder.claim("auto", self.settings)  # the program has looked at --resume; what is in the folder is its own
        committed = folder.resume()
        done, rows = folder.finished(committed), self.host.parties.known(fed.about)
        facts = {**self.facts, "data": rows}
        if committed:
            folder.same_data(rows)
            choosing.same(recipe, committed.record, self.path)
        if not done:
            folder.describe(facts)
        if self.supply_bytes:
            fed.ledger.supplied(self.supply_bytes)
            folder.pending.append(
                {"round": committed.round if committed else -1, "event": "supply", "supply_bytes": self.supply_bytes}
            )
        fed.conductor = self._conductor(sizes, committed.round + 1 if committed else 0)
        fed.conductor.bench.replay(folder.metrics() if committed else ())
        if not self.quiet:
            print(f"fedmpi: {self.title}: {described(sizes)}, weights by {recipe.weights}{_standing(committed, done)}", flush=True)
            print(f"fedmpi: {self.title}: {lost(rows['samples'], self.host.data.max_length)}", flush=True)
        server = None if done else self.algorithm.build_server(self.own, self.host)
        if committed is not None and server is not None:
            server = restored(server, committed.tensors)
            self.host.base.folds.restore(part(committed.tensors, "base/"))
            fed.downlink.restore(part(committed.tensors, "downlink/"))
        if done:
            fed.conductor.end = End.FINISHED
        owned = committed.owned if committed else {}
        most = max(self._most_bytes(tensors or {}) for _, tensors in self.host.views(server).values())
        fed.welcome(owned, LEAST_LIMIT_BYTES + most)
        keeper = Keeper(recipe, self.algorithm, self.host, folder, fed, self.stop, self.title, self.quiet, dict(owned))
        if server is None:
            for _ in fed.rounds():
                raise AssertionError("a finished run has no further round")
        else:
            server = keeper.rounds(server, parties, committed.record if committed else None)
        fed.farewell()
        return fed.end, done or (keeper.finish(server, facts) if fed.end is End.FINISHED else None)

    def _most_bytes(self, adapter: Tensors) -> int:
        """What the largest message of the run will stay below."""
        folding = self.host.rules.rule in aggregation.FOLDING
        return 4 * num_bytes(adapter) + (self.host.base.folds.most_bytes() if folding else 0)

    def _conductor(self, sizes: Mapping[int, int], first_round: int) -> Conductor:
        recipe, num_clients = self.recipe, len(sizes)
        size = cohort_of(recipe.sampling, recipe.clients_per_round, num_clients)
        if recipe.close_share is not None and self.post is None:
            raise ConfigError(f"close_share {recipe.close_share}: in one process nobody is late: start ranks, or leave it out")
        if recipe.min_clients > size:
            raise ConfigError(f"min_clients {recipe.min_clients} of a cohort of {size}: no round could ever count")
        return Conductor(
            num_examples=[sizes[client] for client in range(num_clients)],
            rounds=recipe.rounds,
            seed=recipe.seed,
            cohort_size=size,
            sampling=recipe.sampling,
            weights=recipe.weights,
            min_clients=recipe.min_clients,
            on_quorum_lost=recipe.on_quorum_lost,
            close_share=recipe.close_share,
            bench=Bench(recipe.bench_after, recipe.bench_rounds),
            first_round=first_round,
            durable=first_round - 1,
        )


def _standing(committed: checkpoint.Committed | None, done: object) -> str:
    if done:
        return "; finished before, nothing to do"
    return f"; continues after round {committed.round + 1}" if committed else ""


def lost(samples: Any, max_length: int) -> str:
    """What of the clients' rows is not trained on, so that nobody has to guess."""
    rows, cut, ends, dropped = (sum(samples[key]) for key in ("rows", "cut", "cut_responses", "dropped"))
    told = f"{cut} of {rows} training rows are cut to {max_length} tokens ({ends} of them in the response)"
    return f"{told}, {dropped} have nothing to learn and are dropped"


def described(sizes: Mapping[int, int]) -> str:
    """The clients' examples, as they were declared and from now on are fixed."""
    shown = " ".join(str(sizes[client]) for client in sorted(sizes)[:16])
    return f"{len(sizes)} clients with {shown}{' ...' if len(sizes) > 16 else ''} examples, {sum(sizes.values())} in all"
