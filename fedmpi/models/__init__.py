"""Models: the frozen backbone and the adapter on it. It must never know clients, rounds or where data come from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.models.adapters import add_adapter as add_adapter
    from fedmpi.models.adapters import find_targets as find_targets
    from fedmpi.models.adapters import load_trainable as load_trainable
    from fedmpi.models.adapters import save_adapter as save_adapter
    from fedmpi.models.adapters import trainable as trainable
    from fedmpi.models.backbone import base_of as base_of
    from fedmpi.models.backbone import load_model as load_model
    from fedmpi.models.backbone import load_tokenizer as load_tokenizer
    from fedmpi.models.backbone import public_name as public_name


@dataclass(frozen=True)
class Config:
    """Which backbone, in which number format.

    Args:
        path: a folder, a hub id, or builtin:tiny
        dtype: auto is float32 on CPU and bfloat16 on GPU
    """

    path: str = "builtin:tiny"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


@dataclass(frozen=True)
class PeftConfig:
    """What is trained on the frozen backbone.

    Args:
        method: lora
        rank: of the two factors
        alpha: their product is scaled by alpha / rank
        dropout: before the first factor, while training
        init: how A begins, uniform like a linear layer, or gaussian; B is zero, so that an adapter begins as nothing
        target_modules: names of linear modules, a list or joined by commas, or all-linear; default query and value projections
    """

    method: Literal["lora"] = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    init: Literal["default", "gaussian"] = "default"
    target_modules: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        """Refuse what no model could make sense of."""
        if isinstance(self.target_modules, str):
            object.__setattr__(
                self, "target_modules", tuple(part.strip() for part in self.target_modules.split(",") if part.strip())
            )
        if self.rank < 1:
            raise ConfigError(f"peft.rank is {self.rank}: it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"peft.dropout is {self.dropout}: it must be at least 0 and less than 1")


__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(("base_of", "public_name", "load_tokenizer", "load_model"), "backbone"),
        **dict.fromkeys(("add_adapter", "find_targets", "trainable", "load_trainable", "save_adapter"), "adapters"),
    },
)
