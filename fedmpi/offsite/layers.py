"""Which layers are adapter and which are kept in the emulator, and what their tensors are called: numbers and names alone.

Layers are counted as in the original model, from 0. The rule is LayerExtract of FedBiOT (Wu et al., KDD 2024, Algorithm 1), in
exact arithmetic: a drop rate of 0.2 is one fifth, not the binary number next to it. It must never know a model.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from fedmpi.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """A model of `num_layers` at `path`: the first and last ones are the adapter, `emulator` stands between them.

    `emulator` are original numbers in the order in which they are passed; one stands in it again where a layer is shared.
    """

    path: str
    num_layers: int
    first: int
    last: int
    emulator: tuple[int, ...]

    @property
    def inner(self) -> range:
        """The layers between the adapters: the emulator before it is compressed."""
        return range(self.first, self.num_layers - self.last)

    @property
    def adapter(self) -> tuple[int, ...]:
        """The layers of the adapter."""
        return (*range(self.first), *range(self.num_layers - self.last, self.num_layers))

    @property
    def order(self) -> tuple[int, ...]:
        """The original number of each layer of the compressed model, from its first to its last."""
        return (*range(self.first), *self.emulator, *range(self.num_layers - self.last, self.num_layers))

    @property
    def last_emulated(self) -> int:
        """The place in the compressed model where the emulator ends."""
        return self.first + len(self.emulator) - 1

    def keeping(self, numbers: Iterable[int]) -> "Layout":
        """The same split with other layers in the emulator."""
        return replace(self, emulator=tuple(numbers))

    def original(self, name: str) -> str:
        """The name on the original model of a tensor of the compressed one."""
        return self._renumber(name, self.order.__getitem__)

    def compressed(self, name: str) -> str:
        """The name on the compressed model of a tensor of the original one; of a shared layer, that of its first place."""
        return self._renumber(name, self.order.index)

    def part(self, name: str) -> Literal["adapter", "emulator"] | None:
        """What a tensor, by its name on the original model, belongs to; None outside the layers, or in one that is dropped."""
        found = self._pattern.search(name)
        if found is None:
            return None
        number = int(found[1])
        return "adapter" if number in self.adapter else "emulator" if number in self.emulator else None

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:^|(?<=\.)){re.escape(self.path)}\.(\d+)(?=\.|$)")

    def _renumber(self, name: str, number: Callable[[int], int]) -> str:
        return self._pattern.sub(lambda found: f"{self.path}.{number(int(found[1]))}", name, count=1)


def layout(path: str, num_layers: int, first: int, last: int, drop_rate: float) -> Layout:
    """The split with layers dropped at equal distances."""
    num_inner = num_layers - first - last
    if num_inner < 1:
        raise ConfigError(
            f"offsite.adapter_first {first} and offsite.adapter_last {last} take {first + last} layers and the model has "
            f"{num_layers}: leave at least one between them to the emulator"
        )
    num_kept = how_many(num_inner, drop_rate)
    if not num_kept:
        raise ConfigError(
            f"offsite.drop_rate {drop_rate} leaves none of the {num_inner} layers between the adapters to the emulator: "
            f"drop {num_inner - 1} of them at most"
        )
    return Layout(path, num_layers, first, last, tuple(first + place for place in evenly(num_inner, num_kept)))


def how_many(num_inner: int, drop_rate: float) -> int:
    """Layers that stay: what is left, rounded down."""
    return math.floor((1 - Fraction(str(drop_rate))) * num_inner)


def evenly(num_inner: int, num_kept: int) -> list[int]:
    """Places at equal distances, the first and the last among them; of one, the first."""
    if num_kept == 1:
        return [0]
    return [j * (num_inner - 1) // (num_kept - 1) for j in range(num_kept)]
