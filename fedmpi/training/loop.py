"""The one optimiser loop. Its result depends on seed, examples and the weights it starts from, on nothing else."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from torch.nn.functional import cross_entropy

from fedmpi.data.batching import Batch, batches
from fedmpi.data.prompts import Example
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.models.logits import supervised_logits
from fedmpi.seeding import seed_everything, seed_for
from fedmpi.training import Config, engines, optim
from fedmpi.training.engines import Engine
from fedmpi.training.hooks import Hook, Step, load_hooks

# From a model, a batch and the model's device to the sum of a loss over the batch's supervised tokens, in fp32.
Loss = Callable[[torch.nn.Module, Batch, torch.device], torch.Tensor]
CHECK_EVERY = 16  # steps between two looks at the losses where a look is a wait for a GPU or for other ranks


def token_loss(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """How badly the supervised tokens are predicted: what a client trains on."""
    logits, targets = supervised_logits(model, batch, device)
    return cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True)
class Fit:
    """What a client's training came to; losses are means over supervised tokens, counts are of all the client's ranks.

    `flops` is closed-form: two operations per weight and token forward, two backward, two more for weights that are
    trained; attention scores and embedding look-ups are left out. `state` is there with optimizer_state `keep`.
    """

    loss: float
    first_loss: float
    last_loss: float
    steps: int
    examples: int
    tokens: int
    supervised: int
    seconds: float
    flops: int
    state: optim.OptimState | None = None

    def metrics(self) -> dict[str, float]:
        """The figures that travel with an update."""
        names = ("loss", "first_loss", "last_loss", "steps", "examples", "tokens", "supervised", "seconds", "flops")
        return {name: float(getattr(self, name)) for name in names}


@dataclass(frozen=True)
class _Turn:
    """What stays the same during a fit."""

    engine: Engine
    loss: Loss
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    config: Config
    hooks: Sequence[Hook]
    device: torch.device
    num_micro: int
    num_steps: int
    flops_per_token: int


@dataclass
class _Tally:
    """What the steps came to; sums of loss and norms of gradients wait on their device until they are looked at."""

    losses: list[float] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    examples: int = 0
    tokens: int = 0
    pending: list[tuple[Step, torch.Tensor]] = field(default_factory=list)


def fit(
    model: torch.nn.Module,
    examples: Sequence[Example],
    config: Config,
    *,
    seed: int,
    pad_id: int,
    hooks: Sequence[Hook] = (),
    state: optim.OptimState | None = None,
    loss: Loss = token_loss,
) -> Fit:
    """Train the parameters of `model` that require gradients, in place.

    The given hooks are called first, then those of the configuration, made anew. `state` is what a former fit returned;
    without it the optimiser starts fresh. Raises NonFinite, naming step and samples, before a bad weight can be sent.
    The model stays in training mode: a switch costs as much as a small step, and evaluation sets its own mode.
    """
    started = time.perf_counter()
    if not model.training:
        model.train()
    turn = _begin(model, examples, config, hooks, state, loss)
    seed_everything(seed_for(seed, "dropout", *([turn.engine.rank] if turn.engine.rank else [])))
    draws = batches(examples, config.batch_size * turn.engine.size, seed_for(seed, "batches"), pad_id)
    try:
        tally = _train(model, turn, islice(draws, turn.num_micro))
    finally:
        turn.engine.close()
    taken = turn.num_steps + (state.step if state is not None else 0)
    supervised = sum(tally.supervised)
    return Fit(
        loss=math.fsum(tally.losses) / supervised,
        first_loss=tally.losses[0] / tally.supervised[0],
        last_loss=tally.losses[-1] / tally.supervised[-1],
        steps=turn.num_steps,
        examples=tally.examples,
        tokens=tally.tokens,
        supervised=supervised,
        seconds=time.perf_counter() - started,
        flops=turn.flops_per_token * tally.tokens,
        state=optim.save(turn.optimizer, turn.parameters, taken) if config.optimizer_state == "keep" else None,
    )


def num_micro_batches(config: Config, num_examples: int, num_ranks: int = 1) -> int:
    """Micro-batches that a turn draws; with epochs the last step may have fewer of them than the others."""
    if config.epochs is None:
        return config.steps * config.accumulation
    return config.epochs * math.ceil(num_examples / (config.batch_size * num_ranks))


def flops_per_token(model: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> int:
    """Operations that training takes per token, from the shapes of all the model's parameters (see Fit)."""
    num_weights = num_trained = 0
    for parameter in parameters:
        num_weights += parameter.numel()
        num_trained += parameter.numel() if parameter.requires_grad else 0
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding:
        num_weights -= embedding.numel()
    return 4 * num_weights + 2 * num_trained


def _begin(
    model: torch.nn.Module,
    examples: Sequence[Example],
    config: Config,
    hooks: Sequence[Hook],
    state: optim.OptimState | None,
    loss: Loss,
) -> _Turn:
    everything = dict(model.named_parameters())
    parameters = {name: p for name, p in everything.items() if p.requires_grad}
    if not examples:
        raise TrainingError("no examples to train on: give the client rows, or leave it out of the federation")
    if not parameters:
        raise TrainingError("no parameter of the model requires gradients: add an adapter before training")
    device = next(iter(parameters.values())).device
    engine = engines.start(config.engine, model, device)
    optimizer = optim.build(parameters, config)
    optimizer.zero_grad()  # a client that failed may have left gradients on the shared model
    if state is not None:
        optim.restore(optimizer, parameters, state)
    num_micro = num_micro_batches(config, len(examples), engine.size)
    return _Turn(
        engine=engine,
        loss=loss,
        parameters=parameters,
        optimizer=optimizer,
        config=config,
        hooks=(*hooks, *load_hooks(config.hooks)),
        device=device,
        num_micro=num_micro,
        num_steps=math.ceil(num_micro / config.accumulation),
        flops_per_token=flops_per_token(model, everything.values()),
    )


def _train(model: torch.nn.Module, turn: _Turn, draws: Iterator[Batch]) -> _Tally:
    tally = _Tally()
    look_every = 1 if turn.device.type == "cpu" and turn.engine.size == 1 else CHECK_EVERY
    for hook in turn.hooks:
        hook.before_fit(model)
    for index in range(turn.num_steps):
        optim.set_rate(turn.optimizer, optim.rate(turn.config, index, turn.num_steps))
        step = Step(model, turn.optimizer, index, turn.num_steps, list(islice(draws, turn.config.accumulation)))
        for hook in turn.hooks:
            hook.before_step(step)
        step = _gradients(turn, step, tally)
        if len(tally.pending) == look_every:
            _look(turn.engine, tally)
        turn.optimizer.step()
        turn.optimizer.zero_grad()
        for hook in turn.hooks:
            hook.after_step(step)
    _look(turn.engine, tally)
    _require_finite(turn)
    for hook in turn.hooks:
        hook.after_fit(model)
    return tally


def _gradients(turn: _Turn, step: Step, tally: _Tally) -> Step:
    """Fill the gradients of one step, clipped; its sum of losses and the norm of its gradient wait in the tally."""
    supervised = sum(batch.num_supervised for batch in step.batches)
    if not supervised:
        raise TrainingError(f"step {step.index}: samples {_names(step)} have no supervised token")
    loss = torch.zeros((), device=turn.device)
    for number, batch in enumerate(step.batches, start=1):
        with nullcontext() if number == len(step.batches) else turn.engine.quiet():
            part = _loss(turn, batch)
            # DDP divides the sum of gradients by the number of ranks; the division that counts is by supervised tokens.
            (part * (turn.engine.size / supervised)).backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    tally.supervised.append(supervised)
    tally.examples += sum(batch.num_examples for batch in step.batches)
    tally.tokens += sum(batch.num_tokens for batch in step.batches)
    step = replace(step, loss=loss / supervised)
    for hook in turn.hooks:
        hook.after_backward(step)
    tally.pending.append((step, torch.stack([loss, _clip(turn)])))
    return step


def _loss(turn: _Turn, batch: Batch) -> torch.Tensor:
    """The sum of the losses of this rank's share of a batch, in fp32."""
    with torch.autocast(turn.device.type, torch.bfloat16, enabled=turn.config.precision == "bf16"):
        return turn.loss(turn.engine.model, turn.engine.share(batch), turn.device)


def _clip(turn: _Turn) -> torch.Tensor:
    """The norm of the gradient, which is clipped to the configured one; 0 where clipping is off."""
    if not turn.config.clip_norm:
        return torch.zeros((), device=turn.device)
    trained = list(turn.parameters.values())
    return torch.nn.utils.clip_grad_norm_(trained, turn.config.clip_norm).float()


def _look(engine: Engine, tally: _Tally) -> None:
    """Move pending losses into the tally, the same on every rank of the client; refuse what is not finite."""
    if not tally.pending:
        return
    values = engine.total(torch.stack([evidence for _, evidence in tally.pending])).tolist()
    for (step, _), (loss, norm) in zip(tally.pending, values, strict=True):
        if not math.isfinite(loss) or not math.isfinite(norm):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
            raise NonFinite(f"step {step.index} of {step.num_steps}: {what}, samples {_names(step)}; lower train.lr")
        tally.losses.append(loss)
    tally.pending.clear()


def _require_finite(turn: _Turn) -> None:
    """The last step may have broken a weight after the last look at a loss."""
    norm = torch.nn.utils.get_total_norm([p.detach() for p in turn.parameters.values()])
    if not math.isfinite(norm):
        raise NonFinite(f"after step {turn.num_steps - 1} the norm of the trained weights is {norm}; lower train.lr")


def _names(step: Step) -> str:
    ids = [str(name) for batch in step.batches for name in batch.ids]
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
