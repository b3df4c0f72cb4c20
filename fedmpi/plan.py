"""What a run would train, exchange, hold and compute, from shapes alone: no weights, no tokenizer, no data, no ranks.

    python -m fedmpi.plan --config RECIPE.yaml                 the options of fedmpi.run; of the model, config.json is enough
    python -m fedmpi.plan --config RECIPE.yaml --ranks 4 --link_mbps 100 --json

--ranks N is the number of ranks that clients are placed on (default one for each client, and the server), --link_mbps N the
speed of a client's link, in 10^6 bits per second, for the times of transfer, --json the same as one JSON object.
Exit codes: 0 done, 1 failed, 2 the settings are not possible.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fedmpi import data, models, recipe
from fedmpi.command import FINISHED, guarded
from fedmpi.recipe import Recipe
from fedmpi.round import cohort_size, fixed_cohort, place

if TYPE_CHECKING:
    import torch

    from fedmpi.models import Outline

SENT_BYTES = 4  # what is trained travels in fp32
STATES = {"adamw": 2, "adam": 2, "sgd": 0}  # an optimiser's values per trained one


@dataclass(frozen=True)
class Sent:
    """One tensor of a message."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Side:
    """What one side holds, computes, sends and keeps in memory. Bytes are payload: headers and codecs are left out."""

    side: str
    layers: int
    trained_layers: int
    parameters: int
    held_bytes: int
    trained_parameters: int
    disclosed_share: float  # of the original model's weights
    peak_bytes: int  # an estimate from above
    paper_macs_per_token: int | None = None  # FedBiOT's count, for LoRA
    flops_per_token: int | None = None  # of training on a text of data.max_length tokens, attention and head included


@dataclass(frozen=True)
class Plan:
    """A run as far as shapes tell."""

    model: str
    method: str
    algorithm: str
    original_parameters: int
    dtype: str
    down: tuple[Sent, ...]
    up: tuple[Sent, ...]
    down_bytes: int
    up_bytes: int
    once_bytes: int
    clients: int | None
    cohort: int | None
    placement: Mapping[int, tuple[int, ...]]  # clients by rank; rank 0 serves
    sides: tuple[Side, ...]
    link_mbps: float | None

    @property
    def round_s(self) -> float | None:
        """A client's transfers of a round, down and up."""
        return None if self.link_mbps is None else 8 * (self.down_bytes + self.up_bytes) / (self.link_mbps * 1e6)

    @property
    def once_s(self) -> float | None:
        """The transfer before the first round."""
        return None if self.link_mbps is None else 8 * self.once_bytes / (self.link_mbps * 1e6)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a command line; gives the exit code."""
    return guarded(lambda: _enter(sys.argv[1:] if arguments is None else list(arguments)), "plan")


def _enter(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m fedmpi.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ranks", type=int)
    own, rest = parser.parse_known_args(arguments)
    wanted, settings = recipe.read(rest, "python -m fedmpi.plan", __doc__ or "")
    plan = build(wanted, settings, own.ranks)
    print(json.dumps({**asdict(plan), "round_s": plan.round_s, "once_s": plan.once_s}, indent=1)) if own.json else show(plan)
    return FINISHED


def build(wanted: Recipe, own: Any, ranks: int | None = None) -> Plan:
    """The plan of a recipe; `own` are the settings of its algorithm."""
    original = models.load_shapes(wanted.model, wanted.device)
    whole, dtype = _count(original.parameters()), str(original.dtype).removeprefix("torch.")  # before an adapter is in it
    outline, num_clients = _outline(wanted, own, original), _num_clients(wanted)
    down, up = message(outline.down), message(outline.up)
    return Plan(
        model=models.public_name(wanted.model),
        method=wanted.peft.method,
        algorithm=wanted.algorithm,
        original_parameters=whole,
        dtype=dtype,
        down=down,
        up=up,
        down_bytes=sum(tensor.bytes for tensor in down),
        up_bytes=sum(tensor.bytes for tensor in up),
        once_bytes=sum(tensor.numel() * tensor.element_size() for tensor in outline.once.values()),
        clients=num_clients,
        cohort=num_clients and _cohort(wanted, num_clients),
        placement=_placement(wanted, num_clients, ranks) if num_clients else {},
        sides=(server_side(wanted, outline.server, whole), client_side(wanted, outline.client, whole)),
        link_mbps=wanted.link_mbps,
    )


def _outline(wanted: Recipe, own: Any, original: Any) -> "Outline":
    """What the algorithm makes of the model: its own word, or, where the file has none, one model that everybody trains."""
    algorithm = recipe.algorithm(wanted.algorithm)
    if hasattr(algorithm, "outline"):
        return algorithm.outline(own, original, wanted)  # type: ignore[no-any-return]
    return models.same_for_all(original, wanted.peft)


def _num_clients(wanted: Recipe) -> int | None:
    """As far as it is known without opening the data."""
    if wanted.clients is not None:
        return wanted.clients
    if wanted.data.name in data.FEDERATED:
        return data.FEDERATED[wanted.data.name].clients
    return data.CORPORA[wanted.data.name].clients if wanted.data.name in data.CORPORA else None


def _cohort(wanted: Recipe, num_clients: int) -> int:
    if wanted.sampling.startswith("fixed:"):
        return len(fixed_cohort(wanted.sampling, num_clients))
    return cohort_size(wanted.clients_per_round, num_clients)


def _placement(wanted: Recipe, num_clients: int, ranks: int | None) -> dict[int, tuple[int, ...]]:
    groups = tuple(map(int, wanted.groups))
    size = ranks or 1 + (sum(groups) or num_clients * wanted.ranks_per_client)
    placed = place(num_clients, size, wanted.ranks_per_client, groups)
    return {rank: placed.hosted_by(rank) for rank in range(size)}


def message(tensors: "Mapping[str, torch.Tensor]") -> tuple[Sent, ...]:
    """Tensors as they travel: in fp32, by name."""
    return tuple(Sent(name, tuple(t.shape), SENT_BYTES * t.numel()) for name, t in sorted(tensors.items()))


def server_side(wanted: Recipe, model: Any, whole: int) -> Side:
    """It evaluates, and holds the adapter, its exact sum in float64 and an update."""
    return _side("server", model, whole, lambda held, trained: held + (SENT_BYTES + 8 + SENT_BYTES) * trained)


def client_side(wanted: Recipe, model: Any, whole: int) -> Side:
    """It trains: gradients, the optimiser's values, what came and what goes, and what is kept for the way back."""
    from fedmpi.models import costs

    length = wanted.data.max_length
    step = costs.step_of(model, wanted.train.batch_size, length)
    copies = 1 + STATES[wanted.train.optimizer] + 2
    side = _side("client", model, whole, lambda held, trained: held + SENT_BYTES * copies * trained + step.kept_bytes)
    paper = costs.paper_count(costs.layers_of(model)) if wanted.peft.method == "lora" else None
    return replace(side, paper_macs_per_token=paper, flops_per_token=step.work.of([length]) // length)


def _side(name: str, model: Any, whole: int, peak: Callable[[int, int], int]) -> Side:
    from fedmpi.models import costs

    layers, trained = costs.layers_of(model), _count(models.trained(model).values())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    added = _count(p for name, p in model.named_parameters() if "lora_" in name or "prompt_encoder." in name)
    return Side(
        side=name,
        layers=layers.num,
        trained_layers=layers.num_trained,
        parameters=_count(model.parameters()),
        held_bytes=held,
        trained_parameters=trained,
        disclosed_share=(_count(model.parameters()) - added) / whole,
        peak_bytes=peak(held, trained),
    )


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def show(plan: Plan) -> None:
    """The plan for people: figures as in papers, and every size as a plain number of bytes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, force_terminal=False)
    print(f"{plan.algorithm}, {plan.method} on {plan.model}: {plan.original_parameters:,} parameters in {plan.dtype}")
    for title, message in _messages(plan):
        table = Table("name", "shape", "bytes", title=f"{title}: {_bytes(sum(t.bytes for t in message))} in {len(message)} tensors")
        for tensor in _shortened(message):
            table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), f"{tensor.bytes:,}" if tensor.bytes else "")
        console.print(table)
    table = Table("", *(side.side for side in plan.sides), title="Each side")
    for label, cells in _rows(plan):
        table.add_row(label, *cells)
    console.print(table)
    for line in _lines(plan):
        print(line)


def _messages(plan: Plan) -> list[tuple[str, tuple[Sent, ...]]]:
    if plan.down == plan.up:
        return [("Trained and exchanged, down and up in every round", plan.up)]
    return [("Down in every round", plan.down), ("Trained, and up in every round", plan.up)]


def _shortened(message: Sequence[Sent]) -> list[Sent]:
    """Layers repeat: of a long list the beginning and the end."""
    if len(message) <= 12:
        return list(message)
    return [*message[:5], Sent(f"... {len(message) - 10} more (--json has them all)", (), 0), *message[-5:]]


def _rows(plan: Plan) -> list[tuple[str, list[str]]]:
    def row(label: str, cell: Any) -> tuple[str, list[str]]:
        return label, [cell(side) for side in plan.sides]

    return [
        row("layers (of these trained)", lambda s: f"{s.layers} ({s.trained_layers})"),
        row("parameters held", lambda s: f"{s.parameters:,}"),
        row("bytes held", lambda s: f"{s.held_bytes:,}"),
        row("share of the original's weights", lambda s: f"{s.disclosed_share:.1%}"),
        row("trained", lambda s: f"{s.trained_parameters / 1e6:.3f} M ({s.trained_parameters:,})"),
        row("GFLOP/token, FedBiOT's count", lambda s: _giga(s.paper_macs_per_token)),
        row("GFLOP/token, all operations", lambda s: _giga(s.flops_per_token)),
        row("peak memory, at most about", lambda s: _bytes(s.peak_bytes)),
    ]


def _lines(plan: Plan) -> list[str]:
    lines = [
        f"a client's round: {_bytes(plan.down_bytes + plan.up_bytes)}, down {plan.down_bytes:,} and up {plan.up_bytes:,} bytes"
    ]
    lines += [f"before the first round, to each client: {_bytes(plan.once_bytes)}"] if plan.once_bytes else []
    if plan.link_mbps is not None:
        once = f"; before the first {plan.once_s:.2f} s" if plan.once_bytes else ""
        lines.append(f"at {plan.link_mbps:g} Mbit/s a round's transfers take {plan.round_s:.2f} s{once}")
    if plan.clients is None or plan.cohort is None:
        return [*lines, "clients: as many as the data have; --clients N places them"]
    lines.append(
        f"{plan.clients} clients, {plan.cohort} per round: up to the server {plan.cohort * plan.up_bytes:,} bytes per round"
    )
    for rank, hosted in plan.placement.items():
        what = f"clients {', '.join(map(str, hosted))}" if hosted else "idle"
        server = "the server" + (f" and {what}" if hosted else "")
        lines.append(f"  rank {rank}: {server if rank == 0 else what}")
    return lines


def _bytes(num: int) -> str:
    return f"{num / 1e6:.2f} MB ({num:,} bytes)"


def _giga(num: int | None) -> str:
    if num is None:
        return "-"
    return f"{num / 1e9:.2f}" if num >= 1e8 else f"{num / 1e9:.2g}"


if __name__ == "__main__":
    sys.exit(main())
