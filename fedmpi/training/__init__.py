"""Local training: the one optimiser loop, its hooks, its engines, and a client's inner world. This door needs no torch.

It must never know rounds, servers or links: a turn is a model, examples and a seed, and what comes back is a Fit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.training.hooks import Hook as Hook
    from fedmpi.training.hooks import Step as Step
    from fedmpi.training.hooks import load_hooks as load_hooks
    from fedmpi.training.inner import Host as Host
    from fedmpi.training.inner import InnerWorld as InnerWorld
    from fedmpi.training.inner import host as host
    from fedmpi.training.inner import join as join
    from fedmpi.training.loop import fit as fit
    from fedmpi.training.optim import OptimState as OptimState
    from fedmpi.training.tally import Fit as Fit
    from fedmpi.training.zero import check as check

Optimizer = Literal["adamw", "adam", "sgd", "adamw8bit", "paged_adamw", "paged_adamw8bit"]
Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["fp32", "bf16", "fp16", "half"]
EngineName = Literal["plain", "ddp", "fsdp", "deepspeed"]
StateBetweenTurns = Literal["fresh", "keep"]
OnNonfinite = Literal["fail", "skip"]
OnOom = Literal["retry", "fail"]
_CHOICES: Mapping[str, object] = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "precision": Precision,
    "engine": EngineName,
    "optimizer_state": StateBetweenTurns,
    "on_nonfinite": OnNonfinite,
    "on_oom": OnOom,
}


@dataclass(frozen=True)
class Config:
    """How a client trains in its turn.

    Args:
        steps: optimiser steps of a turn; not read where epochs is given.
        epochs: passes over the client's examples, ceil(examples / batch_size) micro-batches each.
        batch_size: samples of a micro-batch, on each rank of a clustered client.
        lr: peak learning rate.
        optimizer: adamw, adam or sgd (without momentum); through bitsandbytes adamw8bit, whose state takes a quarter of the memory,
            and paged_adamw, paged_adamw8bit, whose state leaves a full GPU for the CPU.
        betas: of adamw and adam of every kind.
        weight_decay: of the optimiser.
        schedule: constant, cosine or linear, over the steps of one turn.
        warmup_steps: steps over which the rate rises to lr, at the start of every turn.
        clip_norm: largest norm of the gradient; 0 or null is off.
        accumulation: micro-batches of a step; the loss is divided once, by all their supervised tokens.
        precision: fp32; bf16 or fp16 for autocast, fp16 with a scaled loss: trained weights stay in fp32; half: everything in
            the base's type, float16 or bfloat16, optimiser state too, the loss unscaled; in float16 adamw and adam have an
            epsilon of 1e-4, since squares of gradients vanish there.
        checkpointing: keep a layer's input alone and compute the layer again in the backward pass: less memory, more time.
        compile: run the layers as code that torch.compile makes of them: on a CPU half a minute in a process's first turn, and
            steps after it take a tenth to a fifth less time; not measured on GPUs.
        engine: plain, or among the ranks of a clustered client ddp (a whole model on each), fsdp or deepspeed (in parts).
        zero_stage: what deepspeed shares out among a client's ranks: 1 optimiser state, 2 gradients too (default), 3 weights too.
        zero_offload: keep the optimiser's state, and its work, on the CPU (deepspeed).
        deepspeed: a JSON file with further settings of DeepSpeed; it may not contradict the recipe.
        optimizer_state: fresh in every turn, or keep, as state that the client owns.
        on_nonfinite: what a loss or gradient that is not finite does: fail the client's turn, or skip the step (--on_nonfinite).
        on_oom: what running out of memory does: retry the step in micro-batches of half the size, down to a row, with the same sum
            of losses, or fail the client's turn (--on_oom). Clients of several ranks always fail.
        hooks: dotted names of hook classes, a list or joined by commas, called in this order.
    """

    steps: int = 10
    epochs: int | None = None
    batch_size: int = 8
    lr: float = 1e-3
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    accumulation: int = 1
    precision: Precision = "fp32"
    checkpointing: bool = False
    compile: bool = False
    engine: EngineName = "plain"
    zero_stage: Literal[1, 2, 3] | None = None
    zero_offload: bool = False
    deepspeed: str | None = None
    optimizer_state: StateBetweenTurns = "fresh"
    on_nonfinite: OnNonfinite = "fail"
    on_oom: OnOom = "retry"
    hooks: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with, naming the key. Hooks become a tuple however they were written."""
        if isinstance(self.hooks, str):
            object.__setattr__(self, "hooks", tuple(name.strip() for name in self.hooks.split(",") if name.strip()))
        for key in ("steps", "batch_size", "accumulation", *(() if self.epochs is None else ("epochs",))):
            _expect(self, key, lambda value: value >= 1, "at least 1")
        _expect(self, "lr", lambda value: 0 < value < float("inf"), "a finite number above 0")
        _expect(self, "betas", lambda pair: all(0 <= beta < 1 for beta in pair), "two numbers from 0 to below 1")
        for key in ("weight_decay", "warmup_steps"):
            _expect(self, key, lambda value: 0 <= value < float("inf"), "0 or more")
        if self.clip_norm is not None:
            _expect(self, "clip_norm", lambda value: value >= 0, "above 0, or 0 or null for no clipping")
        for key, choice in _CHOICES.items():
            names = get_args(choice)
            _expect(self, key, names.__contains__, f"one of {', '.join(names)}")
        if "paged" in self.optimizer or "8bit" in self.optimizer:
            _expect(self, "optimizer_state", "fresh".__eq__, f"fresh with train.optimizer {self.optimizer}")
            _expect(self, "engine", ("plain", "ddp").__contains__, f"plain or ddp with train.optimizer {self.optimizer}")
        if self.compile:
            _expect(self, "engine", ("plain", "ddp").__contains__, "plain or ddp with train.compile true")
            _expect(self, "checkpointing", False.__eq__, "false with train.compile true")
        if self.engine != "deepspeed":
            for key in ("zero_stage", "zero_offload", "deepspeed"):
                _expect(self, key, lambda value: not value, f"nothing with train.engine {self.engine}: it belongs to deepspeed")
        if self.engine in ("fsdp", "deepspeed"):
            _expect(self, "zero_stage", (None, 1, 2, 3).__contains__, "1, 2 or 3")
            _expect(self, "precision", ("fp32", "bf16").__contains__, f"fp32 or bf16 with train.engine {self.engine}")
            _expect(self, "optimizer_state", "fresh".__eq__, f"fresh with train.engine {self.engine}, which keeps it in parts")


def _expect(config: Config, key: str, allowed: Callable[..., bool], words: str) -> None:
    value = getattr(config, key)
    if not allowed(value):
        raise ConfigError(f"train.{key} is {value!r}; allowed is {words}")


__getattr__ = door(
    __name__,
    {
        "fit": "loop",
        "Fit": "tally",
        **dict.fromkeys(("Hook", "Step", "load_hooks"), "hooks"),
        **dict.fromkeys(("InnerWorld", "Host", "host", "join"), "inner"),
        "OptimState": "optim",
        "check": "zero",
    },
)
