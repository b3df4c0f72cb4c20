"""Aggregation: pure functions from updates to the next adapter. They know weights and tensors; never ranks, links or models.

mean        the exact weighted mean, order-free, holding one sum
pieces      updates as they come, part by part
check       what an update must be before it counts, piece by piece
factors     averages of products B A on their factors: exact, redistributed, padded; and how far a rule is from the average
robust      rules that bear hostile updates
optimisers  the server's own step along what the updates say
spool       updates on disk, for what needs all of them at once
step        one round's aggregation: a rule, an optimiser, the figures
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.aggregation.check import Check as Check
    from fedmpi.aggregation.check import Wanted as Wanted
    from fedmpi.aggregation.check import begin as begin
    from fedmpi.aggregation.check import most_move as most_move
    from fedmpi.aggregation.factors import narrowed as narrowed
    from fedmpi.aggregation.factors import told as told
    from fedmpi.aggregation.factors import trained as trained
    from fedmpi.aggregation.mean import exact_mean as exact_mean
    from fedmpi.aggregation.mean import grid_scale as grid_scale
    from fedmpi.aggregation.mean import largest as largest
    from fedmpi.aggregation.mean import most_of as most_of
    from fedmpi.aggregation.pieces import Weighted as Weighted
    from fedmpi.aggregation.spool import Spool as Spool
    from fedmpi.aggregation.step import Made as Made
    from fedmpi.aggregation.step import Start as Start
    from fedmpi.aggregation.step import aggregate as aggregate

Rule = Literal["mean", "ffa", "rolora", "fedex", "flora", "flexlora"]
Robust = Literal[
    "none", "median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "clipping", "centred_clipping"
]  # fmt: skip
Optimizer = Literal["none", "avgm", "adam", "yogi", "adagrad"]
FOLDING = ("fedex", "flora")  # these rules change the base
HALVES = ("rolora",)  # these move one factor of each pair in a round


@dataclass(frozen=True)
class Config:
    """How the server makes the next adapter of a round's updates.

    Args:
        rule: mean = average every tensor (FedIT); ffa = A stays as it began; rolora = B is trained in even rounds, A in odd ones;
            fedex = mean, and what it misses of the average product goes into the base; flora = the average product goes into the
            base, adapters begin anew; flexlora = the best adapter of the rank for the average product
        robust: none, or the rule that bears hostile updates: median, trimmed_mean, geometric_median, krum, multi_krum, clipping,
            centred_clipping; every update counts as one
        mixing: each update is first replaced by the mean of its nearest neighbours
        hostile: the share of a round's updates that the robust rule takes for possibly hostile
        radius: of clipping and centred_clipping; default the median of the round's norms
        iterations: of geometric_median and centred_clipping
        most_norm: an update that moves farther than this is refused; adaptive = four times the median move of the round before
        record_error: compare what was applied with the average of the products, every round
    """

    rule: Rule = "mean"
    robust: Robust = "none"
    mixing: bool = False
    hostile: float = 0.25
    radius: float | None = None
    iterations: int = 10
    most_norm: float | Literal["adaptive"] | None = None
    record_error: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be aggregated with, naming the key."""
        if not 0 <= self.hostile < 0.5:
            raise ConfigError(f"aggregation.hostile is {self.hostile}: give a share of at least 0 and below 0.5")
        if self.iterations < 1:
            raise ConfigError(f"aggregation.iterations is {self.iterations}: at least 1 is needed")
        for key in ("radius", "most_norm"):
            value = getattr(self, key)
            if isinstance(value, float | int) and not 0 < value < float("inf"):
                raise ConfigError(f"aggregation.{key} is {value}: give a finite number above 0")
        if self.radius is not None and self.robust not in ("clipping", "centred_clipping"):
            raise ConfigError(f"aggregation.radius {self.radius} belongs to robust clipping or centred_clipping, not {self.robust}")
        if self.mixing and self.robust == "none":
            raise ConfigError("aggregation.mixing goes before a robust rule: give aggregation.robust one")
        if self.robust != "none" and self.rule not in ("mean", "ffa", "rolora"):
            raise ConfigError(
                f"aggregation.robust {self.robust} does not go with rule {self.rule}, which builds on every update's product: "
                "allowed are mean, ffa, rolora"
            )


@dataclass(frozen=True)
class ServerConfig:
    """The settings of the server's optimiser, which steps along the difference that the round's updates make.

    Args:
        lr: of the server; default 1 for avgm, 0.01 for adam, yogi and adagrad
        momentum: of avgm, and the first beta of the others
        beta2: of adam and yogi
        tau: what keeps the division of adam, yogi and adagrad in bounds
    """

    lr: float | None = None
    momentum: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse what no optimiser could step with."""
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ConfigError(f"server.lr is {self.lr}: give a finite number above 0")
        for key in ("momentum", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"server.{key} is {getattr(self, key)}: give a number from 0 to below 1")
        if not 0 < self.tau < float("inf"):
            raise ConfigError(f"server.tau is {self.tau}: give a finite number above 0")


__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(("exact_mean", "grid_scale", "largest", "most_of"), "mean"),
        **dict.fromkeys(("begin", "most_move", "Check", "Wanted"), "check"),
        **dict.fromkeys(("narrowed", "told", "trained"), "factors"),
        "Weighted": "pieces",
        "Spool": "spool",
        **dict.fromkeys(("aggregate", "Made", "Start"), "step"),
    },
)
