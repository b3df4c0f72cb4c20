"""The one optimiser loop. Its result depends on seed, examples and the weights it starts from, on nothing else."""

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import torch
from torch.nn.functional import cross_entropy

from fedmpi import watch
from fedmpi.data.batching import Batch, batches
from fedmpi.data.prompts import Example
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.models import costs
from fedmpi.models.adapters import moving
from fedmpi.models.logits import supervised_logits
from fedmpi.seeding import seed_everything, seed_for
from fedmpi.training import Config, engines, memory, optim
from fedmpi.training.compiling import as_written, compiled
from fedmpi.training.engine import Engine
from fedmpi.training.hooks import Hook, Step, load_hooks
from fedmpi.training.precision import autocast, prepared
from fedmpi.training.tally import Fit, Tally, names

# From a model, a batch and the model's device to the sum of a loss over the batch's supervised tokens, in fp32.
Loss = Callable[[torch.nn.Module, Batch, torch.device], torch.Tensor]
AHEAD = 8  # batches that are made at a time
CHECK_EVERY = 16  # steps between two looks at the losses where a look is a wait for a GPU or for other ranks


def token_loss(model: torch.nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """How badly the supervised tokens are predicted: what a client trains on."""
    logits, targets = supervised_logits(model, batch, device)
    return cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True)
class _Turn:
    """What stays the same during a fit."""

    engine: Engine
    loss: Loss
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    shapes: Mapping[str, torch.Size]
    config: Config
    hooks: Sequence[Hook]
    device: torch.device
    num_micro: int
    num_steps: int
    moving: frozenset[str]  # names of the parameters


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
    """
    started = time.perf_counter()
    trained = moving(model)
    with prepared(model, list(trained.values()), config), compiled(model, config):
        turn = _begin(model, trained, examples, config, hooks, state, loss)
        seed_everything(seed_for(seed, "dropout", *([turn.engine.rank] if turn.engine.rank else [])))
        draws = batches(examples, config.batch_size * turn.engine.size, seed_for(seed, "batches"), pad_id)
        try:
            tally = _train(turn, _ahead(islice(draws, turn.num_micro)))
            turn.engine.gather()
        finally:
            turn.engine.close()
    _require_sound(turn)
    for hook in turn.hooks:
        hook.after_fit(model)
    kept = None
    if config.optimizer_state == "keep":
        taken = turn.num_steps - len(tally.skipped) + (state.step if state is not None else 0)
        kept = optim.save(turn.optimizer, turn.parameters, taken)
    return tally.fit(turn.num_steps, time.perf_counter() - started, kept)


def _ahead(draws: Iterator[Batch]) -> Iterator[Batch]:
    """The same, made a few at a time: alone, behind a step that has emptied the processor's caches, one takes ten times as long."""
    return chain.from_iterable(iter(lambda: list(islice(draws, AHEAD)), []))


def num_micro_batches(config: Config, num_examples: int, num_ranks: int = 1) -> int:
    """Micro-batches that a turn draws; with epochs the last step may have fewer of them than the others."""
    if config.epochs is None:
        return config.steps * config.accumulation
    return config.epochs * math.ceil(num_examples / (config.batch_size * num_ranks))


def _begin(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    examples: Sequence[Example],
    config: Config,
    hooks: Sequence[Hook],
    state: optim.OptimState | None,
    loss: Loss,
) -> _Turn:
    if not examples:
        raise TrainingError("no examples to train on: give the client rows, or leave it out of the federation")
    if not parameters:
        raise TrainingError("no parameter of the model requires gradients: add an adapter before training")
    device = next(iter(parameters.values())).device
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    optimizer = optim.build(parameters, config)
    optimizer.zero_grad()  # a client that failed may have left gradients on the shared model
    if state is not None:
        optim.restore(optimizer, parameters, state)
    hooks = (*hooks, *load_hooks(config.hooks))
    for hook in hooks:  # while the model is whole: an engine may take it apart
        hook.before_fit(model)
    engine = engines.start(config, model, optimizer, device)
    num_micro = num_micro_batches(config, len(examples), engine.size)
    return _Turn(
        engine=engine,
        loss=loss,
        parameters=parameters,
        optimizer=optimizer,
        shapes=shapes,
        config=config,
        hooks=hooks,
        device=device,
        num_micro=num_micro,
        num_steps=math.ceil(num_micro / config.accumulation),
        moving=frozenset(parameters),
    )


def _train(turn: _Turn, draws: Iterator[Batch]) -> Tally:
    turn.engine.admit(turn.hooks)
    tally = Tally()
    look = partial(tally.look, turn.engine.total, turn.config.on_nonfinite == "skip")
    # A step that may be skipped is looked at before it is taken, whatever the wait for it costs.
    at_once = turn.config.on_nonfinite == "skip" or (turn.device.type == "cpu" and turn.engine.size == 1)
    look_every = 1 if at_once else CHECK_EVERY
    for index in range(turn.num_steps):
        optim.set_rate(turn.optimizer, optim.rate(turn.config, index, turn.num_steps))
        step = Step(turn.engine.bare, turn.optimizer, index, turn.num_steps, list(islice(draws, turn.config.accumulation)))
        for hook in turn.hooks:
            hook.before_step(step)
        step = _gradients(turn, step, tally)
        moves = len(tally.pending) < look_every or look()
        if moves:
            turn.engine.step()
        turn.engine.clear()
        for hook in turn.hooks if moves else ():
            hook.after_step(step)
    look()
    if not tally.losses:
        raise NonFinite(f"all {turn.num_steps} steps were skipped; the first: {tally.skipped[0]}")
    return tally


def _gradients(turn: _Turn, step: Step, tally: Tally) -> Step:
    """Fill the gradients of one step, clipped; its sum of losses and the norm of its gradient wait in the tally."""
    supervised = sum(batch.num_supervised for batch in step.batches)
    if not supervised:
        raise TrainingError(f"step {step.index}: samples {names(step)} have no supervised token")
    loss = _passes(turn, step, supervised, tally)
    turn.engine.ready()
    work = costs.learned(step.model, turn.moving)
    tally.count(step.batches, sum(work.of(batch.lengths()) for batch in step.batches))
    if turn.hooks:  # nobody else reads it
        step = replace(step, loss=loss / supervised)
    for hook in turn.hooks:
        hook.after_backward(step)
    tally.pending.append((step, supervised, torch.stack([loss, turn.engine.clip(turn.config.clip_norm)])))
    return step


def _passes(turn: _Turn, step: Step, supervised: int, tally: Tally) -> torch.Tensor:
    """Forward and backward of a step; where memory does not last, once more from its start in micro-batches of half the size."""
    while True:
        batches = (
            step.batches if tally.parts == 1 else [part for batch in step.batches for part in memory.parts(batch, tally.parts)]
        )
        try:
            return _pass(turn, step.model, batches, supervised)
        except (RuntimeError, MemoryError) as error:
            # ranks of one client would have to agree; other losses may know their batches
            alone = turn.engine.size == 1 and turn.loss is token_loss
            largest = max(len(batch.input_ids) for batch in batches)
            if not (memory.ran_out(error) and turn.config.on_oom == "retry" and alone and largest > 1):
                raise
            why = (str(error) or type(error).__name__).splitlines()[0]
        tally.parts *= 2
        size = -(-largest // 2)
        print(f"fedmpi: step {step.index} ran out of memory ({why}): on in micro-batches of {size}", file=sys.stderr, flush=True)
        turn.engine.clear()
        gc.collect()  # now, outside of the handler, nothing holds what the failed pass had made
        if turn.device.type == "cuda":
            torch.cuda.empty_cache()


def _pass(turn: _Turn, model: torch.nn.Module, batches: Sequence[Batch], supervised: int) -> torch.Tensor:
    """Add up the gradients of these micro-batches; gives the sum of their losses."""
    losses = []
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else turn.engine.quiet():
            with costs.learning(model, turn.moving, partial(as_written, turn.config)):
                part = _loss(turn, batch)
            # Engines divide the sum of gradients by the number of ranks; the division that counts is by supervised tokens.
            turn.engine.backward(part * (turn.engine.size / supervised))
        losses.append(part.detach())
        watch.tick()
    return sum(losses[1:], losses[0])


def _loss(turn: _Turn, batch: Batch) -> torch.Tensor:
    """The sum of the losses of this rank's share of a batch, in fp32."""
    with autocast(turn.config, turn.device):
        return turn.loss(turn.engine.model, turn.engine.share(batch), turn.device)


def _require_sound(turn: _Turn) -> None:
    """What goes out is whole, whoever held it in parts, and finite: the last step may have broken a weight after the last look."""
    for name, shape in turn.shapes.items():
        if (found := turn.parameters[name].shape) != shape:
            raise TrainingError(f"{name} is {tuple(found)} after training, expected {tuple(shape)}: it was not gathered")
    norm = torch.nn.utils.get_total_norm([p.detach() for p in turn.parameters.values()])
    if not math.isfinite(norm):
        raise NonFinite(f"after step {turn.num_steps - 1} the norm of the trained weights is {norm}; lower train.lr")
