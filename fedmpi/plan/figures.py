"""The figures of a plan: messages, sides, placement, as plain values out of a recipe and shapes. It prints nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedmpi import aggregation, data, models
from fedmpi.codecs import Chains
from fedmpi.round import cohort_size, fixed_cohort, place
from fedmpi.settings import recipe
from fedmpi.settings.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from fedmpi.models import Outline

SENT_BYTES = 4  # what is trained travels in fp32
# what an optimiser remembers of each trained value; the scales of 8-bit blocks, a 64th of it, are left out
STATE_BYTES = {"adamw": 8, "adam": 8, "sgd": 0, "adamw8bit": 2, "paged_adamw": 8, "paged_adamw8bit": 2}


@dataclass(frozen=True)
class Sent:
    """One tensor of a message."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Side:
    """What one side holds, computes, sends and keeps in memory. Bytes are payload: headers are left out."""

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
    up: tuple[Sent, ...]  # of a client of full rank, in even rounds
    down_bytes: int
    up_bytes: int
    up_odd_bytes: int  # in odd rounds: RoLoRA's other factor
    down_moved_bytes: tuple[int, ...]  # in odd rounds and in even ones, to who had the broadcast before, where a round moves half
    up_bytes_by_rank: Mapping[int, int]  # with peft.client_ranks
    once_bytes: int
    down_most_bytes: int  # a broadcast under the codec: exact where nothing is packed or chosen, else the most that it can take
    up_most_bytes: int
    folds: bool  # the rule changes the base: what it folds travels down beside the adapter, as much as the updates' ranks make it
    clients: int | None
    cohort: int | None
    placement: Mapping[int, tuple[int, ...]]  # clients by rank; rank 0 serves
    sides: tuple[Side, ...]
    prealign_flops: int  # on the server, of texts of data.max_length tokens: before the first round, and in each
    align_flops: int
    link_mbps: float | None

    @property
    def round_s(self) -> float | None:
        """A client's transfers of a round, down and up."""
        return None if self.link_mbps is None else 8 * (self.down_most_bytes + self.up_most_bytes) / (self.link_mbps * 1e6)

    @property
    def once_s(self) -> float | None:
        """The transfer before the first round."""
        return None if self.link_mbps is None else 8 * self.once_bytes / (self.link_mbps * 1e6)


def build(wanted: Recipe, own: Any, ranks: int | None = None) -> Plan:
    """The plan of a recipe; `own` are the settings of its algorithm."""
    original = models.load_shapes(wanted.model, wanted.device)
    whole, dtype = _count(original.parameters()), str(original.dtype).removeprefix("torch.")  # before an adapter is in it
    outline, num_clients = _outline(wanted, own, original), _num_clients(wanted)
    told, moving = _told(wanted, outline.down), _moving(wanted, outline.up, 0)
    aligned = outline.alignment.flops(wanted.data.max_length) if outline.alignment else (0, 0)
    down, (up, odd) = message(told), (message(_moving(wanted, outline.up, turn)) for turn in (0, 1))
    return Plan(
        model=models.public_name(wanted.model),
        method=wanted.peft.method,
        algorithm=wanted.algorithm,
        original_parameters=whole,
        dtype=dtype,
        down=down,
        up=up,
        down_bytes=size_of(down),
        up_bytes=size_of(up),
        up_odd_bytes=size_of(odd),
        down_moved_bytes=(size_of(up), size_of(odd)) if _halves(wanted) else (),
        up_bytes_by_rank={rank: size_of(message(aggregation.narrowed(dict(outline.up), rank))) for rank in _ranks(wanted)},
        once_bytes=sum(tensor.numel() * tensor.element_size() for tensor in outline.once.values()),
        down_most_bytes=_coded(wanted.chain("down"), told),
        up_most_bytes=_coded(wanted.chain("up"), moving),
        folds=wanted.aggregation.rule in aggregation.FOLDING,
        clients=num_clients,
        cohort=num_clients and _cohort(wanted, num_clients),
        placement=_placement(wanted, num_clients, ranks) if num_clients else {},
        sides=(server_side(wanted, outline.server, whole), client_side(wanted, outline.client, whole)),
        prealign_flops=aligned[0],
        align_flops=aligned[1],
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


def _moving(wanted: Recipe, tensors: "Mapping[str, torch.Tensor]", turn: int) -> "dict[str, torch.Tensor]":
    """What a client trains in such a round, by the aggregation's rule."""
    return {name: tensors[name] for name in aggregation.trained(tensors, wanted.aggregation.rule, turn)}


def _told(wanted: Recipe, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """What the server has to tell, by the aggregation's rule."""
    return {name: tensors[name] for name in aggregation.told(tensors, wanted.aggregation.rule)}


def _halves(wanted: Recipe) -> bool:
    """Whether the broadcast leaves out what the last round did not move; codecs and collectives take all of it."""
    return wanted.aggregation.rule in aggregation.HALVES and wanted.chain("down").raw and wanted.exchange != "collective"


def _coded(chains: Chains, tensors: "Mapping[str, torch.Tensor]") -> int:
    """The most that these tensors take on their way."""
    from fedmpi.federation.coding import CHUNK_BYTES, Code
    from fedmpi.manifest import manifest_of
    from fedmpi.messages import chunks

    if chains.raw:
        return size_of(message(tensors))
    code = Code(chains, manifest_of({name: tensor.float() for name, tensor in tensors.items()}))
    return sum(code.most_bytes(place) for place in chunks(code.manifest.num_bytes, CHUNK_BYTES))


def _ranks(wanted: Recipe) -> list[int]:
    return sorted(set(map(int, wanted.peft.client_ranks)))


def message(tensors: "Mapping[str, torch.Tensor]") -> tuple[Sent, ...]:
    """Tensors as they travel: in fp32, by name."""
    return tuple(Sent(name, tuple(t.shape), SENT_BYTES * t.numel()) for name, t in sorted(tensors.items()))


def size_of(message: Sequence[Sent]) -> int:
    """Its payload."""
    return sum(tensor.bytes for tensor in message)


def server_side(wanted: Recipe, model: Any, whole: int) -> Side:
    """It evaluates, and holds the adapter, its exact sum in float64 and an update."""
    return _side(
        "server", model, whole, wanted.model.quantization, lambda held, trained: held + (SENT_BYTES + 8 + SENT_BYTES) * trained
    )


def client_side(wanted: Recipe, model: Any, whole: int) -> Side:
    """It trains: gradients, the optimiser's values, what came and what goes, and what is kept for the way back."""
    from fedmpi.models import costs

    length = wanted.data.max_length
    trained = models.trained(model)
    with models.only(trained, _moving(wanted, trained, 0)):
        step = costs.step_of(model, wanted.train.batch_size, length)
    each = 3 * SENT_BYTES + STATE_BYTES[wanted.train.optimizer]
    side = _side(
        "client",
        model,
        whole,
        wanted.model.quantization,
        lambda held, trained: held + each * trained + step.kept_bytes,
    )
    paper = costs.paper_count(costs.layers_of(model)) if wanted.peft.method == "lora" else None
    return replace(side, paper_macs_per_token=paper, flops_per_token=step.work.of([length]) // length)


def _side(name: str, model: Any, whole: int, quantization: str, peak: Callable[[int, int], int]) -> Side:
    from fedmpi.models import costs

    layers, trained = costs.layers_of(model), _count(models.trained(model).values())
    tensors = models.stored(model)
    held = models.held_bytes(model, tensors, quantization)
    added = _count(tensor for name, tensor in tensors.items() if "lora_" in name or "prompt_encoder." in name)
    return Side(
        side=name,
        layers=layers.num,
        trained_layers=layers.num_trained,
        parameters=_count(tensors.values()),
        held_bytes=held,
        trained_parameters=trained,
        disclosed_share=(_count(tensors.values()) - added) / whole,
        peak_bytes=peak(held, trained),
    )


def _count(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)
