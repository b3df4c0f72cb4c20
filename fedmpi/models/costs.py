"""What training costs: operations from a forward pass that is watched, memory from one that has shapes alone.

Two operations per multiply-add. It must never know whose turn it is, or time.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from fedmpi.models.backbone import decoder_layers, repeated_layers
from fedmpi.models.quantized import num_weights
from fedmpi.models.virtual import rows_in_front, virtual_positions

_known: "WeakKeyDictionary[torch.nn.Module, dict[frozenset[str], Work]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Work:
    """Operations of forward and backward: what the mathematics takes, whatever is saved, skipped or done again.

    A matrix costs two per weight and token forward, two more where what went into it needs a gradient, two more where it is
    trained; the head runs on every token. Attention costs its scores and its sum, over the whole square of positions, and on the
    way back the gradients of all that goes into it (in the first trained layer that may be one product too many).
    """

    per_token: int
    per_square: int  # of a position and one that it may see
    per_step: int  # what makes virtual tokens, once per batch
    front: int  # virtual tokens that are computed with every text
    cached: int  # virtual tokens that are seen alone

    def of(self, lengths: Iterable[int], num_steps: int = 1) -> int:
        """Of texts of so many tokens, in so many batches."""
        rows = [length + self.front for length in lengths]
        squares = sum(num * (num + self.cached) for num in rows)
        return self.per_token * sum(rows) + self.per_square * squares + self.per_step * num_steps


@dataclass(frozen=True)
class Call:
    """One matrix in a forward pass: its weights, the rows that went in, and how often each weight is passed in a step."""

    module: torch.nn.Module
    num_weights: int
    num_rows: int
    passes: int

    @property
    def ops(self) -> int:
        """For each row."""
        return 2 * self.num_weights * self.passes


@dataclass
class Watch:
    """What a forward pass went through."""

    calls: list[Call] = field(default_factory=list)
    attention: list[int] = field(default_factory=list)  # passes of each attention: one, or three where it is gone back through
    done: bool = False

    def note(self, module: Any, given: tuple[Any, ...], _: object) -> None:
        """A matrix, or the matrices of an LSTM. Sizes are as the layer says: a weight may be packed, or lie on other ranks."""
        if self.done:
            return
        weights = [p for name, p in module.named_parameters(recurse=False) if name.startswith("weight")]
        match module:
            case torch.nn.Linear():
                num_in, num = module.in_features, module.in_features * module.out_features
            case Conv1D():
                num_in, num = module.nx, module.nx * module.nf
            case _:
                num_in, num = module.input_size, sum(p.numel() for p in weights)
        passes = 1 + bool(given[0].requires_grad) + any(p.requires_grad for p in weights)
        self.calls.append(Call(module, num, given[0].numel() // num_in, passes))

    def attended(self, module: object, given: object, output: Any) -> None:
        """An attention, whose scores go with the square of the length."""
        first = output[0] if isinstance(output, tuple) else output
        if not self.done:
            self.attention.append(3 if first.requires_grad else 1)

    def finish(self, *_: object) -> None:
        """The model's first pass is over: what comes after may be a layer that is computed again."""
        self.done = True

    def work(self, model: Any) -> Work:
        """The pass in figures that hold for every length. What was called with as many rows as the layers belongs to the text."""
        head = model.get_output_embeddings()
        heads = {id(module) for module in head.modules()} if head is not None else set()
        inside = {id(module) for layer in repeated_layers(model) or [model] for module in layer.modules()}
        rows = max((call.num_rows for call in self.calls if id(call.module) in inside), default=0)
        text = [call.num_rows == rows or id(call.module) in heads for call in self.calls]
        front = rows_in_front(model)
        return Work(
            per_token=sum(call.ops for call, is_text in zip(self.calls, text, strict=True) if is_text),
            per_square=4 * _attention_width(model) * sum(self.attention) if self.attention else 0,
            per_step=sum(call.ops * call.num_rows for call, is_text in zip(self.calls, text, strict=True) if not is_text),
            front=front,
            cached=virtual_positions(model) - front,
        )


@contextmanager
def watch(model: Any) -> Iterator[Watch]:
    """Watch the next forward pass of a model."""
    seen = Watch()
    handles = [model.register_forward_hook(seen.finish)]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LSTM | Conv1D):
            handles.append(module.register_forward_hook(seen.note))
        elif type(module).__name__.endswith("Attention"):
            handles.append(module.register_forward_hook(seen.attended))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def learning(
    model: torch.nn.Module, trained: frozenset[str], plainly: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Learn from a forward pass inside what training these parameters takes, unless it is known: then this costs nothing.

    While it is watched, `plainly` holds: compiled modules cannot be looked into.
    """
    known = _known.setdefault(model, {})
    if trained in known:
        yield
        return
    with watch(model) as seen, plainly():
        yield
    known[trained] = seen.work(model)


def learned(model: torch.nn.Module, trained: frozenset[str]) -> Work:
    """What `learning` found."""
    return _known[model][trained]


@dataclass(frozen=True)
class Step:
    """A training step, from shapes alone: its operations, and the bytes that it keeps for the way back."""

    work: Work
    kept_bytes: int


def step_of(model: Any, batch_size: int, length: int) -> Step:
    """Pass shapes through a model that has no memory; every token of the text counts as supervised, so memory is an upper bound."""
    kept: dict[int, int] = {}
    held: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        scores = tensor.ndim == 4 and tensor.shape[-2:] == (positions, positions + cached)
        if storage._cdata not in held and not scores:  # fused attention, which torch takes on CPU and GPU, keeps no scores
            kept[storage._cdata] = storage.nbytes()
        return tensor

    device, front = next(model.parameters()).device, rows_in_front(model)
    positions, cached = length + front, virtual_positions(model) - front
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, watch(model) as seen, saved_tensors_hooks(keep, lambda tensor: tensor):
        weights = [fake.from_tensor(tensor) for tensor in (*model.parameters(), *model.buffers())]  # alive, or they are made anew
        held |= {tensor.untyped_storage()._cdata for tensor in weights}
        ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        for module in model.train().modules():
            if hasattr(module, "layerdrop"):  # whether a layer is left out is decided by a number, and there is none
                module.training = False
        logits = model(input_ids=ids, use_cache=False).logits[:, front:]
        cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    return Step(seen.work(model), sum(kept.values()))


@dataclass(frozen=True)
class Layers:
    """The repeated layers of a model: how many, how many of them are trained, and how many a gradient leaves at their beginning."""

    num: int
    num_trained: int
    num_back: int
    weights: int  # of the matrices of one layer
    adapter: int  # of the trained matrices of one trained layer


def layers_of(model: Any) -> Layers:
    """Layers as FedBiOT's Table 5 counts them; what is trained in front of them sends its gradient through them all."""
    matrices = [[p for p in layer.parameters() if p.ndim == 2] for layer in decoder_layers(model)]
    moving = [place for place, found in enumerate(matrices) if any(p.requires_grad for p in found)]
    inside = sum(p.numel() for found in matrices for p in found if p.requires_grad)
    outside = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2) > inside
    return Layers(
        num=len(matrices),
        num_trained=len(moving),
        num_back=len(matrices) if outside or not moving else len(matrices) - 1 - moving[0],
        weights=sum(p.numel() for name, p in decoder_layers(model)[0].named_parameters() if p.ndim == 2 and ".lora_" not in name),
        adapter=sum(p.numel() for p in matrices[moving[0]] if p.requires_grad) if moving else 0,
    )


def forward_per_token(model: Any) -> int:
    """Operations of a pass per token, from the weights alone: the head counts, looking up embeddings and attention do not."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    num = sum(num_weights(p) for p in model.parameters()) - (0 if tied else embedding.numel())
    return 2 * int(num)


def paper_count(layers: Layers) -> int:
    """Multiply-adds per token as FedBiOT's Table 5 counts them.

    One per weight and adapter weight of a layer forward, as many on the way back in each layer that a gradient leaves, one per
    trained weight; no head, no attention scores, and nothing of the first trained layer's own way back.
    """
    whole = layers.weights + layers.adapter
    return (layers.num + layers.num_back) * whole + layers.num_trained * layers.adapter


def _attention_width(model: Any) -> int:
    """Heads times their size."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
