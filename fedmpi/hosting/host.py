"""What one process holds once for everybody it hosts: the base, the rows, and what a round does with both.

Rows are tokenised on first use, so that a rank pays for (and sees) only what its role needs. It must never know ranks.
"""

import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmpi import aggregation, evaluation, models, offsite, training
from fedmpi import data as corpora
from fedmpi.errors import ConfigError, DataError
from fedmpi.hosting.base import Base
from fedmpi.round import Round
from fedmpi.tensors import Tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fedmpi.federation import Update
    from fedmpi.federation.supply import Supply
    from fedmpi.offsite import Layout


@dataclass(frozen=True)
class Split:
    """What every process of offsite tuning knows: how the model is split, and by which settings."""

    config: offsite.Config
    layout: "Layout"


@dataclass(frozen=True)
class Original:
    """What the server of offsite tuning alone has. A client has nothing to read it from."""

    base: Base  # the original model, with the adapter on its own layers
    goal: "Callable[[], offsite.Goal]"  # what the emulator is aligned to, with the public rows
    supply: "Callable[[], Supply]"  # what a rank is given that cannot read a model for itself
    report: Mapping[str, Any] = field(default_factory=dict)  # what the emulator saves, discloses, and misses


@dataclass
class Host:
    """The base and the parties' rows, with the settings that say how they are used."""

    base: Base
    parties: corpora.Federated
    data: corpora.Config
    train: training.Config
    eval: evaluation.Config
    rules: aggregation.Config = field(default_factory=aggregation.Config)
    server_optimizer: str = "none"
    server: aggregation.ServerConfig = field(default_factory=aggregation.ServerConfig)
    scratch: Path | None = None  # where updates wait that a rule needs all at once
    ranks: tuple[int, ...] = ()  # of the clients' adapters, taken in turn
    split: Split | None = None
    original: Original | None = None
    _examples: "dict[int, tuple[Sequence[corpora.Example], corpora.Counts]]" = field(default_factory=dict)
    _kept_back: "dict[int, list[corpora.Example]]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Only the tokenizer knows the text of a chat template."""
        if self.data.template == "chat":
            self.parties.record["template_hash"] = corpora.template_hash("chat", self.base.tokenizer)

    def alone(self, client: int) -> "Host":
        """The same process with one client of these as the only one: what a party could do by itself."""
        one = self.parties.clients[client]
        return self._with(replace(one, id=0), self.parties.sites.get(client, {}), (self._rank(client),) if self.ranks else ())

    def pooled(self) -> "Host":
        """The same process with all rows at one client: what could be done if the data were in one place."""
        rows = [row for client in self.parties.clients for row in client.train]
        return self._with(corpora.ClientData(0, rows, self.parties.heldout), {}, ())

    def _with(self, client: "corpora.ClientData", site: Mapping[str, object], ranks: tuple[int, ...]) -> "Host":
        """Whoever is alone has nobody to be aggregated with, and nothing of a server's: its rounds are plain."""
        parties = replace(self.parties, clients=(client,), sites={0: site})
        plain = {"rules": aggregation.Config(record_error=False), "server_optimizer": "none", "ranks": ranks}
        return replace(self, parties=parties, **plain, original=None, _examples={}, _kept_back={})  # type: ignore[arg-type]

    def views(self, server: Any = None) -> dict[str, tuple[Base, Tensors | None]]:
        """The models that a run is measured by and leaves behind, by the ending of their names; without a server's state, as they
        begin. Offsite tuning has two: the adapter on the original model, and with the emulator."""
        if self.split is None:
            return {"": (self.base, server and server.adapter)}
        whole = {"": (self.original.base, server and server.adapter)} if self.original else {}
        return {**whole, "_emu": (self.base, server and server.outgoing)}

    def reported(self) -> dict[str, Any]:
        """What a run's record says of the emulator, where there is one."""
        return {"emulator": self.original.report} if self.original else {}

    # ---- a round --------------------------------------------------------------------------------------------------------------

    def outgoing(self, adapter: Tensors) -> Tensors:
        """What of an adapter clients have to be sent."""
        return {name: adapter[name] for name in aggregation.told(adapter, self.rules.rule)}

    def whole(self, sent: Tensors) -> Tensors:
        """The adapter that was sent, with what of it everybody has from the beginning."""
        missing = self.base.fresh.keys() - aggregation.told(self.base.fresh, self.rules.rule)
        return {**{name: self.base.fresh[name] for name in missing}, **sent}

    @contextmanager
    def turn(self, client: int, sent: Tensors, rnd: Round) -> "Iterator[PreTrainedModel | PeftModel]":
        """A client's turn on the base: the model with the adapter as it was sent, at the client's rank, ready to be trained."""
        tensors = self._at_rank(client, self.whole(sent))
        models.write(self.base.trained, tensors)
        with models.only(self.base.trained, aggregation.trained(tensors, self.rules.rule, rnd.index)):
            yield self.base.model

    def check(self, server: Any, rnd: Round, beside: Tensors | None = None) -> "aggregation.Check":
        """What every update of the round must be before it touches anything; tensors like `beside` come with the adapter."""
        return self._check(server.adapter, server.memory, rnd, beside or {})

    def own_check(self, sent: Tensors, rnd: Round) -> "aggregation.Check":
        """The same on a client's rank, for updates that nobody sees once they are added up."""
        return self._check(self.base.part(sent, "adapter") if self.base.layout else self.whole(sent), {}, rnd, {})

    def _check(self, adapter: Tensors, memory: Tensors, rnd: Round, beside: Tensors) -> "aggregation.Check":
        names = aggregation.trained(adapter, self.rules.rule, rnd.index)
        most = aggregation.most_of(aggregation.largest(adapter))
        farthest = aggregation.most_move(self.rules, memory)

        def check(client: int, like: Tensors) -> "Callable[[int, Any], float]":
            own = self._at_rank(client, {name: adapter[name] for name in names})
            return aggregation.begin(aggregation.Wanted({**own, **beside}, most, farthest, own), like)

        return check

    def aggregate(self, server: Any, updates: "Iterable[Update]", rnd: Round) -> Any:
        """The server after the round: adapter, what aggregation remembers, figures. A rule that changes the base does so here."""
        start = aggregation.Start(
            adapter=server.adapter,
            memory=server.memory,
            scale=rnd.scale,
            config=self.rules,
            optimizer=self.server_optimizer,
            server=self.server,
            fresh=partial(self.base.anew, rnd.index),
            scratch=self.scratch,
            alike=not self.ranks,
        )
        made = aggregation.aggregate(updates, start)
        self.base.folds.fold(made.fold)
        return replace(server, adapter=made.adapter, memory=made.memory, figures=made.figures)

    def _at_rank(self, client: int, tensors: Tensors) -> Tensors:
        return aggregation.narrowed(tensors, self._rank(client)) if self.ranks else tensors

    def _rank(self, client: int) -> int:
        return self.ranks[client % len(self.ranks)]

    # ---- rows -----------------------------------------------------------------------------------------------------------------

    def examples(self, client: int) -> "Sequence[corpora.Example]":
        """A client's training examples, tokenised on first use; packed ones where that is asked for."""
        return self._own(client)[0]

    def num_examples(self, client: int) -> int:
        """How many rows a client trains on."""
        counts = self._own(client)[1]
        return counts.rows - counts.dropped

    def about(self, client: int) -> dict[str, Any]:
        """What a client's rank tells of its rows: how many were cut or dropped, and with splitter given of what file."""
        return {"samples": asdict(self._own(client)[1]), **self.parties.sites.get(client, {})}

    def _own(self, client: int) -> "tuple[Sequence[corpora.Example], corpora.Counts]":
        if client not in self._examples:
            rows = self.parties.clients[client].train
            examples, counts = self._tokenize(rows)
            if not examples:
                raise DataError(f"client {client}: none of its {len(rows)} rows has a token to learn from ({counts})")
            self._examples[client] = self._arranged(examples), counts
        return self._examples[client]

    def _arranged(self, examples: "list[corpora.Example]") -> "Sequence[corpora.Example]":
        """As batches are to draw them."""
        if self.data.packing:
            models.require_packing(self.base.model, self.base.config.path)
            return corpora.pack(examples, self.data.max_length)
        return corpora.ByLength(examples) if self.data.group_by_length else examples

    @property
    def heldout(self) -> "list[corpora.Example]":
        """The rows that nobody trained on, tokenised."""
        return self._heldout[0]

    @property
    def heldout_samples(self) -> dict[str, int]:
        """How many of the held-out rows were cut or dropped."""
        return asdict(self._heldout[1])

    @cached_property
    def _heldout(self) -> "tuple[list[corpora.Example], corpora.Counts]":
        return self._tokenize(self.parties.heldout)

    def _tokenize(self, rows: "list[corpora.Row]") -> "tuple[list[corpora.Example], corpora.Counts]":
        longest = getattr(self.base.model.config, "max_position_embeddings", None)
        taken = models.virtual_positions(self.base.model)
        if longest is not None and self.data.max_length + taken > longest:
            virtual = f", of which virtual tokens take {taken}" if taken else ""
            raise ConfigError(
                f"data.max_length is {self.data.max_length}, but {self.base.config.path} has {longest} positions{virtual}: "
                f"give at most {longest - taken}, or a model that reads more"
            )
        return corpora.tokenize(rows, self.base.tokenizer, self.data)

    def score(self, adapter: Tensors | None, base: Base | None = None) -> dict[str, float]:
        """Held-out loss and token accuracy of an adapter on a base, or of the base alone."""
        model = (base or self.base).wearing(adapter)
        score = evaluation.heldout_loss(model, self.heldout, self.eval.batch_size, self.base.pad_id)
        return {"eval_loss": score.loss, "eval_token_accuracy": score.token_accuracy}

    def score_each(self, adapter: Tensors, clients: Collection[int]) -> dict[int, Mapping[str, float]]:
        """The same for each of these clients on what it holds out itself, for rows that may not leave their rank."""
        model = self.base.wearing(adapter or None)
        found: dict[int, Mapping[str, float]] = {}
        for client in clients:
            if client not in self._kept_back:
                self._kept_back[client] = self._tokenize(self.parties.clients[client].heldout)[0]
            rows = self._kept_back[client]
            found[client] = asdict(evaluation.heldout_loss(model, rows, self.eval.batch_size, self.base.pad_id))
        return found

    def answer(self, adapter: Tensors | None, base: Base | None = None) -> dict[str, Any]:
        """Exact match of greedy answers on the held-out rows; nothing where the task asks for none."""
        task = self.eval.task
        if task == "none" or (task == "auto" and self.data.name != "builtin:toy") or not self.parties.heldout:
            return {}
        score = evaluation.exact_match(
            (base or self.base).wearing(adapter),
            self.base.tokenizer,
            self.parties.heldout[: self.eval.rows],
            self.data.template,
            self.eval.max_new_tokens,
            self.eval.batch_size,
        )
        return {"exact_match": score.exact, "exact_match_by_category": {k: v[0] for k, v in score.by_category.items()}}


def pick_device(asked: str, local_rank: int) -> str:
    """cpu, or one of the GPUs that this rank shares with as few others as possible."""
    if asked == "cpu":
        return asked
    if not re.fullmatch(r"auto|cuda(:\d+)?", asked):
        raise ConfigError(f"device {asked!r}: allowed are auto, cpu, cuda, or one of several as in cuda:1")
    import torch

    found = torch.cuda.device_count()
    if not found and asked == "auto":
        return "cpu"
    if not found:
        raise ConfigError(f"device {asked!r}: torch finds no GPU here; give cpu or auto")
    device = asked if ":" in asked else f"cuda:{local_rank % found}"
    if int(device.partition(":")[2]) >= found:
        raise ConfigError(f"device {asked!r}: torch finds {found} GPUs here, from cuda:0 on")
    torch.cuda.set_device(device)  # libraries that are not told a device take the current one
    return device


def trained_share(tensors: Mapping[str, Any], model: Any) -> float:
    """Trained parameters among all."""
    return float(sum(t.numel() for t in tensors.values()) / sum(models.num_weights(p) for p in model.parameters()))


def environment() -> dict[str, Any]:
    """What the numbers depend on besides the recipe."""
    import torch

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
