"""Evaluation: scores of a model, one file per kind of score. It never trains or communicates. No torch here."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.evaluation.answers import Score as Score
    from fedmpi.evaluation.answers import exact_match as exact_match
    from fedmpi.evaluation.loss import LossScore as LossScore
    from fedmpi.evaluation.loss import heldout_loss as heldout_loss
    from fedmpi.evaluation.loss import overall as overall


@dataclass(frozen=True)
class Config:
    """How models are scored.

    Args:
        batch_size: rows of a batch, for the held-out loss and for answers.
        max_new_tokens: length of an answer at most.
        task: what is scored at the end besides the loss; auto is exact_match for builtin:toy, none for other data.
        rows: held-out rows that are scored at most, the first ones; all without it.
        overlap: the server scores a round's model while the clients of the next round train; line and checkpoint follow then.
    """

    batch_size: int = 64
    max_new_tokens: int = 64
    task: Literal["auto", "exact_match", "none"] = "auto"
    rows: int | None = None
    overlap: bool = False

    def __post_init__(self) -> None:
        """Refuse what nothing can be scored with."""
        for key in ("batch_size", "max_new_tokens", *(() if self.rows is None else ("rows",))):
            if getattr(self, key) < 1:
                raise ConfigError(f"eval.{key} is {getattr(self, key)}; allowed is at least 1")


__getattr__ = door(
    __name__,
    {"heldout_loss": "loss", "LossScore": "loss", "overall": "loss", "exact_match": "answers", "Score": "answers"},
)
