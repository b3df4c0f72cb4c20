"""What the program adds when one process simulates many clients, to a bare loop that takes the same steps on the same batches.

    python benchmarks/simulate.py [--clients 100] [--per_round 5] [--rounds 30] [--steps 4] [--checkpoint_every 0]

The real session runs (rounds, gather, bookkeeping, exact mean, progress) with a tiny random Llama. Each client's turn and the
bare loop on the same client take turns, each first every other time; both must end in the same adapter, bit for bit. Prints one
JSON line: milliseconds added per client turn, and per round outside of all turns; of processor time beside each, since a busy
machine disturbs that less. The bare loop finds its batches ready and copies the adapter in and out; it makes an optimiser of
its own for each turn, as the program does.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ranks
import torch
import transformers

from fedmpi import aggregation, data, evaluation, models, training
from fedmpi.algorithms import fedavg
from fedmpi.data.prompts import IGNORED, Example
from fedmpi.federation.lockstep import Federation
from fedmpi.federation.updates import Update
from fedmpi.hosting.base import Base
from fedmpi.hosting.host import Host
from fedmpi.models.logits import supervised_logits
from fedmpi.round import Round
from fedmpi.seeding import seed_for
from fedmpi.sessions.session import Session
from fedmpi.settings.recipe import Recipe
from fedmpi.stop import Stop
from fedmpi.tensors import Tensors

VOCABULARY, PAD = 512, 0
Spent = tuple[float, float]  # seconds, processor seconds


class Still(Host):
    """A host whose evaluations are free: what is measured is everything else."""

    heldout_samples: Mapping[str, int] = {}

    def score(self, *_: object) -> dict[str, float]:
        """No figures."""
        return {}

    def answer(self, *_: object) -> dict[str, Any]:
        """No figures."""
        return {}


@dataclass
class Times:
    """What was measured: by turn, and by round outside of the turns."""

    turns: list[Spent] = field(default_factory=list)
    bare: list[Spent] = field(default_factory=list)
    rounds: list[Spent] = field(default_factory=list)
    resting: float = 0.0  # of a round: what turns and bare loop took
    resting_cpu: float = 0.0

    def keep(self, kind: list[Spent], began: Spent) -> None:
        """Note what has passed since `began`; it belongs to no round."""
        spent = (time.perf_counter() - began[0], time.process_time() - began[1])
        kind.append(spent)
        self.resting += spent[0]
        self.resting_cpu += spent[1]


def now() -> Spent:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def host(asked: argparse.Namespace, folder: Path) -> Still:
    """A tiny model, and unequal clients with random examples."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=asked.hidden,
        intermediate_size=asked.hidden * 8 // 3,
        num_hidden_layers=asked.layers,
        num_attention_heads=4,
        pad_token_id=PAD,
    )
    with models.without_optional():
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    base = Base(models.Config(path=str(folder)), models.PeftConfig(rank=asked.rank), "cpu", 0)
    base.tokenizer = SimpleNamespace(pad_token_id=PAD)  # the examples are tokens already
    clients = tuple(data.ClientData(c, [], []) for c in range(asked.clients))
    parties = data.Federated(clients, [data.Row("", "", "", "", "0")], (), {"splitter": "iid"}, "nobody")
    train = training.Config(steps=asked.steps, batch_size=4, optimizer_state=asked.optimizer_state)
    made = Still(base, parties, data.Config(), train, evaluation.Config())
    for client in range(asked.clients):
        tokens = examples(8 + client % 9, client)
        made._examples[client] = tokens, data.Counts(len(tokens), 0, 0, sum(len(example.input_ids) for example in tokens))
    return made


def examples(count: int, client: int) -> list[Example]:
    """Of 16 to 31 tokens, the second half supervised."""
    generator = torch.Generator().manual_seed(client)
    sizes = torch.randint(16, 32, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]
    return [Example(ids, [IGNORED] * (len(ids) // 2) + ids[len(ids) // 2 :], str(i)) for i, ids in enumerate(rows)]


def bare_turn(model: torch.nn.Module, sent: Tensors, batches: list[data.Batch], lr: float) -> Tensors:
    """The training steps as one would write them down for this purpose alone."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(sent[name])
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    device = torch.device("cpu")
    for batch in batches:
        logits, targets = supervised_logits(model, batch, device)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (loss * (1 / batch.num_supervised)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def side_by_side(
    received: Iterator[Update], cohort: tuple[int, ...], bare: Callable[[int], Tensors], times: Times
) -> Iterator[Update]:
    """The program's turns, each beside the bare loop on the same client."""
    for place, client in enumerate(cohort):
        first = place % 2 == 0
        kept = alone(bare, client, times) if first else {}
        began = now()
        update = next(received)
        times.keep(times.turns, began)
        kept = kept or alone(bare, client, times)
        if any(not torch.equal(kept[name], update.tensors[name]) for name in kept):
            raise SystemExit(f"client {client}: the bare loop ends elsewhere than the program: they do not do the same work")
        yield update
    for _ in received:
        raise SystemExit("more updates than the cohort has clients")


def alone(bare: Callable[[int], Tensors], client: int, times: Times) -> Tensors:
    """The bare loop for one client, timed."""
    began = now()
    kept = bare(client)
    times.keep(times.bare, began)
    return kept


def measured(times: Times, with_turns: Host) -> Any:
    """FedAvg as the package has it, its round written out again with the clocks in it."""
    marks: list[Spent] = []

    def run_round(fed: Federation, rnd: Round, server: fedavg.Server, clients: Mapping[int, fedavg.Client]) -> fedavg.Server:
        if marks:  # from the start of the round before to here, turns aside
            wall, cpu = (after - before for after, before in zip(now(), marks.pop(), strict=True))
            times.rounds.append((wall - times.resting, cpu - times.resting_cpu))
        marks.append(now())
        times.resting = times.resting_cpu = 0.0
        prepared = {client: ready(with_turns, rnd, client) for client in rnd.cohort}
        marks[0] = now()  # making batches for the bare loop is not the program's
        model = with_turns.base.model
        sent = fed.broadcast(server.adapter)
        received = fed.gather(rnd, clients, lambda client: fedavg.client_update(client, sent, rnd))
        bare = lambda client: bare_turn(model, sent, prepared[client], with_turns.train.lr)  # noqa: E731
        both = side_by_side(received, rnd.cohort, bare, times)
        return replace(server, adapter=aggregation.exact_mean(both, rnd.scale))

    return SimpleNamespace(run_round=run_round, build_server=fedavg.build_server, build_client=fedavg.build_client)


def ready(with_turns: Host, rnd: Round, client: int) -> list[data.Batch]:
    """The batches that the program will draw for this client in this round."""
    seed = seed_for(seed_for(rnd.seed, "fit", client), "batches")
    return list(islice(data.batches(with_turns.examples(client), with_turns.train.batch_size, seed, PAD), with_turns.train.steps))


def main() -> None:
    """Run the session, show the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"clients": 100, "per_round": 5, "rounds": 30, "steps": 4, "layers": 4, "hidden": 64, "rank": 8}
    for name, default in {**sizes, "checkpoint_every": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    asked.optimizer_state = "fresh"
    torch.set_num_threads(1)
    times = Times()
    recipe = Recipe(
        rounds=asked.rounds,
        clients=asked.clients,
        clients_per_round=asked.per_round,
        eval_every=0,
        checkpoint_every=asked.checkpoint_every or asked.rounds,
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made = host(asked, Path(folder) / "model")
        Session(recipe, fedavg.Config(), measured(times, made), made, Path(folder) / "run", "fed", Stop()).train()
    report(asked, times)


def report(asked: argparse.Namespace, times: Times) -> None:
    """Medians; the first round warms up."""
    warm = asked.per_round
    turns = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(times.turns[warm:], times.bare[warm:], strict=True)]

    def middle(spent: list[Spent], clock: int) -> float:
        return 1e3 * statistics.median(entry[clock] for entry in spent)

    ranks.show(
        {
            "benchmark": "simulate",
            **vars(asked),
            "added_ms_per_turn": middle(turns, 0),
            "added_cpu_ms_per_turn": middle(turns, 1),
            "added_ms_per_round": middle(times.rounds[1:], 0),
            "added_cpu_ms_per_round": middle(times.rounds[1:], 1),
            "bare_ms_per_turn": middle(times.bare[warm:], 0),
            "bare_cpu_ms_per_turn": middle(times.bare[warm:], 1),
        }
    )


if __name__ == "__main__":
    main()
