"""Models: the frozen backbone and the adapter on it. It must never know clients, rounds or where data come from."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.models.adapters import adapted as adapted
    from fedmpi.models.adapters import add_adapter as add_adapter
    from fedmpi.models.adapters import bare as bare
    from fedmpi.models.adapters import drop_where_trained as drop_where_trained
    from fedmpi.models.adapters import load_trainable as load_trainable
    from fedmpi.models.adapters import merged as merged
    from fedmpi.models.adapters import moving as moving
    from fedmpi.models.adapters import only as only
    from fedmpi.models.adapters import save_adapter as save_adapter
    from fedmpi.models.adapters import trainable as trainable
    from fedmpi.models.adapters import trained as trained
    from fedmpi.models.adapters import worn as worn
    from fedmpi.models.adapters import write as write
    from fedmpi.models.backbone import base_of as base_of
    from fedmpi.models.backbone import dtype_of as dtype_of
    from fedmpi.models.backbone import load_in_full as load_in_full
    from fedmpi.models.backbone import load_model as load_model
    from fedmpi.models.backbone import load_shapes as load_shapes
    from fedmpi.models.backbone import load_tokenizer as load_tokenizer
    from fedmpi.models.backbone import public_name as public_name
    from fedmpi.models.folding import Folds as Folds
    from fedmpi.models.library import without_optional as without_optional
    from fedmpi.models.methods import initialise as initialise
    from fedmpi.models.outline import Outline as Outline
    from fedmpi.models.outline import same_for_all as same_for_all
    from fedmpi.models.outline import stored as stored
    from fedmpi.models.packing import require_packing as require_packing
    from fedmpi.models.quantized import held_bytes as held_bytes
    from fedmpi.models.quantized import num_weights as num_weights
    from fedmpi.models.targets import find_targets as find_targets
    from fedmpi.models.virtual import rows_in_front as rows_in_front
    from fedmpi.models.virtual import to_continue as to_continue
    from fedmpi.models.virtual import virtual_positions as virtual_positions

# bitsandbytes asks in vain for an optional kernel from the hub, and says at every product that int8 is multiplied in float16.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Config:
    """Which backbone, in which number format.

    Args:
        path: a folder, a hub id, or builtin:tiny
        dtype: auto is float32 on CPU and bfloat16 on GPU
        quantization: of the base's linear layers, int8 or nf4 (QLoRA), through bitsandbytes
    """

    path: str = "builtin:tiny"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "int8", "nf4"] = "none"


Method = Literal["lora", "prefix", "ptuning", "prompt", "none"]
_READ_BY: dict[str, tuple[str, ...]] = {  # whose settings these are; another method would leave them unread
    "target_modules": ("lora",),
    "client_ranks": ("lora",),
    "rslora": ("lora",),
    "dora": ("lora",),
    "dropout": ("lora", "ptuning"),
    "init": ("lora", "prefix", "prompt"),
    "init_text": ("prompt",),
    "encoder": ("prefix", "ptuning"),
}


@dataclass(frozen=True)
class PeftConfig:
    """What is trained on the frozen backbone.

    Args:
        method: lora, prefix tuning, ptuning (P-tuning), prompt tuning, or none = the whole model
        rank: of the two factors (lora)
        client_ranks: ranks of the clients, such as 4,8,8, taken in turn; default all have rank, none may have more (lora)
        alpha: their product is scaled by alpha / rank (lora)
        rslora: scale by alpha / sqrt(rank) instead (lora)
        dora: train the length of each weight's columns beside the factors (lora)
        dropout: while training, before the first factor (lora), or between the layers of an lstm encoder (ptuning)
        init: lora: A as a linear layer begins, or gaussian; prefix and prompt: like the model's embeddings, or gaussian = N(0, 1)
        target_modules: names of linear modules, a list or joined by commas, or all-linear; default query and value (lora)
        num_virtual_tokens: positions before the text (prefix, ptuning, prompt)
        init_text: a prompt begins as the embeddings of this text, repeated or cut to its number of tokens (prompt)
        encoder: what makes the virtual tokens, mlp or lstm; default mlp (ptuning) and none at all (prefix, which may have mlp)
    """

    method: Method = "lora"
    rank: int = 8
    client_ranks: tuple[int, ...] | str = ()
    alpha: int = 16
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: Literal["default", "gaussian"] = "default"
    target_modules: tuple[str, ...] | str = ()
    num_virtual_tokens: int = 20
    init_text: str = ""
    encoder: Literal["mlp", "lstm"] | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could make sense of, and what the method would not read."""
        if isinstance(self.target_modules, str):
            object.__setattr__(
                self, "target_modules", tuple(part.strip() for part in self.target_modules.split(",") if part.strip())
            )
        if isinstance(self.client_ranks, str):
            object.__setattr__(self, "client_ranks", _numbers("peft.client_ranks", self.client_ranks))
        for key in ("rank", "alpha", "num_virtual_tokens"):
            if getattr(self, key) < 1:
                raise ConfigError(f"peft.{key} is {getattr(self, key)}: it must be at least 1")
        if wrong := [rank for rank in self.client_ranks if not 1 <= int(rank) <= self.rank]:
            raise ConfigError(f"peft.client_ranks has {wrong[0]}: a client's rank is at least 1 and at most peft.rank, {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"peft.dropout is {self.dropout}: it must be at least 0 and less than 1")
        for key, methods in _READ_BY.items():
            if self.method not in methods and getattr(self, key) != getattr(type(self), key):
                given, owners = getattr(self, key), " and ".join(methods)
                raise ConfigError(f"peft.{key} is {given!r}, but peft.method {self.method} has none: it belongs to {owners}")
        if self.encoder == "lstm" and self.method == "prefix":
            raise ConfigError("peft.encoder is 'lstm', but peft.method prefix has mlp or none")
        if self.dropout and self.method == "ptuning" and self.encoder != "lstm":
            raise ConfigError(f"peft.dropout is {self.dropout}, but of the encoders of ptuning only lstm has one")


def _numbers(key: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{key} {text!r}: give whole numbers, such as 4,8,8") from None


__getattr__ = door(
    __name__,
    {
        **dict.fromkeys(
            ("base_of", "dtype_of", "public_name", "load_tokenizer", "load_model", "load_in_full", "load_shapes"), "backbone"
        ),
        **dict.fromkeys(
            (
                "add_adapter",
                "trained",
                "trainable",
                "load_trainable",
                "moving",
                "only",
                "drop_where_trained",
                "save_adapter",
                "adapted",
                "merged",
                "worn",
                "write",
                "bare",
            ),
            "adapters",
        ),
        **dict.fromkeys(("virtual_positions", "rows_in_front", "to_continue"), "virtual"),
        **dict.fromkeys(("Outline", "same_for_all", "stored"), "outline"),
        "Folds": "folding",
        "find_targets": "targets",
        "without_optional": "library",
        **dict.fromkeys(("held_bytes", "num_weights"), "quantized"),
        "require_packing": "packing",
        "initialise": "methods",
    },
)
