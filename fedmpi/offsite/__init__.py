"""Offsite tuning: an adapter cut out of a model, an emulator of the rest, and how both are kept close to the original.

What FedOT, FedBiOT and single-party offsite tuning share. It must never know clients, rounds or links. This door needs no torch.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.offsite.alignment import Aligned as Aligned
    from fedmpi.offsite.alignment import Goal as Goal
    from fedmpi.offsite.alignment import align as align
    from fedmpi.offsite.alignment import distance as distance
    from fedmpi.offsite.alignment import goal as goal
    from fedmpi.offsite.assembly import assemble as assemble
    from fedmpi.offsite.assembly import find_layers as find_layers
    from fedmpi.offsite.builders import Emulator as Emulator
    from fedmpi.offsite.builders import build as build
    from fedmpi.offsite.layers import Layout as Layout
    from fedmpi.offsite.layers import layout as layout
    from fedmpi.offsite.preparation import prealign as prealign
    from fedmpi.offsite.proximal import Proximal as Proximal
    from fedmpi.offsite.shapes import outline as outline

Builder = Literal["uniform", "influence", "shared", "thin", "quantized", "distilled"]


@dataclass(frozen=True)
class Scheme:
    """What an algorithm of offsite tuning says of itself: where its adapter lies by default, whether rounds tune the emulator."""

    first: int
    last: int
    tunes_emulator: bool

    def resolve(self, config: "Config") -> "Config":
        """The settings, with the algorithm's own adapter where nothing was said."""
        first = self.first if config.adapter_first is None else config.adapter_first
        last = self.last if config.adapter_last is None else config.adapter_last
        return replace(config, adapter_first=first, adapter_last=last)


@dataclass(frozen=True)
class Config:
    """What is cut out of the model, how the rest is compressed, and how the two are aligned.

    Args:
        builder: uniform drops layers at equal distances; influence those that change the hidden state least; shared lets neighbours
            share one; thin keeps them all, in factors and with fewer channels; quantized is uniform in few bits; distilled is
            uniform with all its weights trained by pre-alignment
        drop_rate: share of the layers between the adapters that is dropped; thin: of the weights in each of them
        bits: of a weight (quantized)
        adapter_first: layers of the adapter at the model's beginning; default 0 with fedbiot, 2 with fedot
        adapter_last: layers of the adapter at the model's end; default 2
        emulator: a folder with an emulator that is aligned already, such as RUN_DIR/emulator; nothing is built then
        prealign_steps: steps of alignment before round 0, by LoRA that is then merged into the emulator
        align_steps: steps of alignment at the start of every round
        align_lr: learning rate of the alignment
        align_batch_size: public examples of a step
        align_optimizer_state: keep the alignment's optimiser across rounds, or begin it fresh in each
        align_pool: align on this many batches alone and keep the full model's hidden states on them on disk; 0 = all public data
        kd_weight: lambda, the weight of the divergence of outputs beside the distance of hidden states
        prox_weight: epsilon, the weight of the distance to the received adapter in a client's loss
        normalise: divide hidden states by the root mean square of the full model's, as offsite tuning does
        public_name: the corpus that the server aligns on
        public_path: where that corpus lies
    """

    builder: Builder = "uniform"
    drop_rate: float = 0.2
    adapter_first: int | None = None
    adapter_last: int | None = None
    bits: Literal[4, 8] = 8
    emulator: str | None = None
    prealign_steps: int = 500
    align_steps: int = 10
    align_lr: float = 1e-4
    align_batch_size: int = 10
    align_optimizer_state: Literal["keep", "fresh"] = "keep"
    align_pool: int = 0
    kd_weight: float = 1.0
    prox_weight: float = 1.0
    normalise: Literal["none", "rms"] = "none"
    public_name: str = "builtin:toy"
    public_path: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could be split or aligned by."""
        at_least = dict.fromkeys(("adapter_first", "adapter_last", "prealign_steps", "align_steps", "align_pool"), 0)
        for key, least in {**at_least, "align_batch_size": 1, "kd_weight": 0, "prox_weight": 0}.items():
            if getattr(self, key) is not None and not least <= getattr(self, key) < float("inf"):
                raise ConfigError(f"offsite.{key} is {getattr(self, key)}: it must be at least {least}")
        if self.public_name == "builtin:toy" and self.public_path is not None:
            raise ConfigError(
                f"offsite.public_path is {self.public_path}, builtin:toy is made by the program: give offsite.public_name"
            )
        if not 0 < self.align_lr < float("inf"):
            raise ConfigError(f"offsite.align_lr is {self.align_lr}: it must be a finite number above 0")
        if not 0 <= self.drop_rate < 1:
            raise ConfigError(f"offsite.drop_rate is {self.drop_rate}: it must be at least 0 and less than 1")
        if self.builder not in get_args(Builder):
            raise ConfigError(f"offsite.builder is {self.builder!r}: allowed are {', '.join(get_args(Builder))}")
        if self.builder == "distilled" and not self.prealign_steps:
            raise ConfigError("offsite.builder is distilled and offsite.prealign_steps 0: give steps to distil in, or take uniform")
        if self.adapter_first == self.adapter_last == 0:
            raise ConfigError(
                "offsite.adapter_first and offsite.adapter_last are both 0: nothing would be trained, give one of them"
            )
        if self.align_pool and self.adapter_first:
            raise ConfigError(
                f"offsite.align_pool is {self.align_pool} and offsite.adapter_first {self.adapter_first}: the full model's hidden "
                "states change with its first layers and cannot be kept, leave one of them 0"
            )


__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(("Layout", "layout"), "layers"),
        **dict.fromkeys(("assemble", "find_layers"), "assembly"),
        **dict.fromkeys(("Emulator", "build"), "builders"),
        **dict.fromkeys(("goal", "Goal", "align", "Aligned", "distance"), "alignment"),
        "prealign": "preparation",
        "Proximal": "proximal",
        "outline": "shapes",
    },
)
