"""How answers are decoded, and what tasks ask of a speaker. No torch here, and no knowledge of any task."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from fedmpi.data.prompts import Example
from fedmpi.errors import ConfigError

LEAST_PROMPT = 16  # tokens of context that answers must leave to a prompt


@dataclass(frozen=True)
class Decoding:
    """Greedy at temperature 0, else sampled from the `top_k` likeliest tokens that hold `top_p` of the probability."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what nothing could be drawn with."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: "
                "allowed are at least 0, at least 0, and above 0 up to 1"
            )

    def facts(self) -> Mapping[str, Any]:
        """For the record of a result."""
        return asdict(self)


@dataclass(frozen=True)
class Measure:
    """The loss of an example's supervised tokens, summed; of these `right` were the model's first choice."""

    loss: float
    num_tokens: int
    right: int


class Speaker(Protocol):
    """A model as tasks see it: it continues prompts and weighs texts. Tests put an oracle in its place."""

    context: int  # tokens that prompt and answer may have together

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt."""

    def encode(self, prompt: str, continuation: str, name: str) -> Example:
        """An example in which the continuation alone is supervised."""

    def say(self, prompts: Sequence[str], decoding: Decoding, keys: Sequence[str], limits: Sequence[int] = ()) -> list[str]:
        """An answer to each prompt; keys name the draws, so that neither batch nor order matters. Limits are single rows' own."""

    def measure(self, examples: Sequence[Example]) -> list[Measure]:
        """The loss of each example."""


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
