"""Codecs: what the bytes of an exchange mean. Here a chain such as `delta,int8,ef,zstd` is read and checked, without torch.

A chain says what is done to the values of one tensor group, stage after stage, and is undone in reverse:

    delta     send the difference from a state that both sides hold
    topk      of each chunk, the share of values that are largest in magnitude: `topk:0.05`; the others are 0
    a number  bf16, fp16, or by blocks with one scale each int8, int4, int2, nf4, sign: `int8:block=64`, `int4:stochastic`
    shuffle   first bytes of all values, then all second bytes, ...
    a packer  zstd, deflate or gzip: `zstd`, `zstd:9`
    ef        error feedback: what a lossy stage lost is added to what is sent next

`raw` is none of these. A tensor group may have a chain of its own, as SCAFFOLD's control variates do in `int4,ef; control=int8`:
what no group is named for goes to all others. This module must never know links, rounds, or what the values are for.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fedmpi.errors import ConfigError
from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.codecs.coder import Coder as Coder

RAW, AUTO = "raw", "auto"  # auto: to be chosen before the first round (fedmpi.codecs.choice)
BLOCKS = {"int8": 256, "int4": 1024, "int2": 256, "nf4": 64, "sign": 256}  # values that share a scale, where the chain does not say
FLOATS = ("fp32", "bf16", "fp16")
LEVELS = {"zstd": (1, 22), "deflate": (1, 9), "gzip": (1, 9)}
FASTEST = 1
NAMES = ("delta", "topk", *FLOATS[1:], *BLOCKS, "shuffle", *LEVELS, "ef", RAW)


@dataclass(frozen=True)
class Number:
    """How one value is written. `block` is 0 for the floating-point forms."""

    name: str = "fp32"
    block: int = 0
    stochastic: bool = False


@dataclass(frozen=True)
class Packer:
    """A general compressor and its level."""

    name: str
    level: int = FASTEST


@dataclass(frozen=True)
class Chain:
    """What is done to a group's values, in the order of the fields."""

    delta: bool = False
    share: float | None = None  # of values that are sent
    number: Number = Number()
    shuffle: bool = False
    packer: Packer | None = None
    feedback: bool = False

    @property
    def raw(self) -> bool:
        """Whether the bytes are those of the values."""
        return self == Chain()

    @property
    def lossy(self) -> bool:
        """Whether what is decoded may differ from what was encoded."""
        return self.share is not None or self.number.name != "fp32"


@dataclass(frozen=True)
class Chains:
    """What is done to the groups of a message: to those that have a chain of their own, and to all others."""

    others: Chain = Chain()
    own: tuple[tuple[str, Chain], ...] = ()

    def of(self, group: str) -> Chain:
        """The chain of a group."""
        return dict(self.own).get(group, self.others)

    @property
    def raw(self) -> bool:
        """Whether the bytes are those of the values."""
        return all(chain.raw for chain in self._all)

    @property
    def delta(self) -> bool:
        """Whether a state that both sides hold is needed."""
        return any(chain.delta for chain in self._all)

    @property
    def feedback(self) -> bool:
        """Whether what was lost is kept by the sender."""
        return any(chain.feedback for chain in self._all)

    @property
    def _all(self) -> tuple[Chain, ...]:
        return self.others, *(chain for _, chain in self.own)


def chains(text: str, key: str = "codec") -> Chains:
    """The chains that `text` describes: one for all, and behind it `group=chain` for those that have their own, apart by `;`."""
    first, *rest = (part.strip() for part in text.split(";"))
    own: dict[str, Chain] = {}
    for part in rest:
        group, found, chain = (word.strip() for word in part.partition("="))
        if not found or not group.isidentifier() or group in own:
            raise ConfigError(f"{key} {text!r}: {part!r}; after a ; give a tensor group once and its chain, as in control=int8")
        own[group] = parse(chain, key)
    return Chains(parse(first, key), tuple(own.items()))


def parse(text: str, key: str = "codec") -> Chain:
    """The chain that `text` describes; a ConfigError says which stage is wrong, and why."""
    words = [word.strip() for word in text.split(",")]
    if words == [RAW]:
        return Chain()
    given: dict[str, object] = {}
    for word in words:
        part, value = _stage(word, key, text)
        if part in given:
            raise ConfigError(f"{key} {text!r}: {word} comes after another stage of its kind; a chain has one of each")
        _in_order(list(given), part, word, key, text)
        given[part] = value
    chain = Chain(**given)  # type: ignore[arg-type]
    if chain.feedback and not chain.lossy:
        raise ConfigError(f"{key} {text!r}: ef feeds back what is lost, and nothing is lost here; add a number or topk")
    if chain.shuffle and chain.packer is None:
        raise ConfigError(f"{key} {text!r}: shuffle alone saves nothing; follow it with {', '.join(LEVELS)}")
    return chain


def _in_order(before: Sequence[str], part: str, word: str, key: str, text: str) -> None:
    """Stages stand in the order in which they are done; `ef` may stand anywhere behind what it repairs."""
    order = [field.name for field in fields(Chain)]
    late = [name for name in before if name != "feedback" and order.index(name) > order.index(part)]
    if part == "feedback":
        late = []
    if late:
        raise ConfigError(f"{key} {text!r}: {word} comes too late; the order is delta, topk, a number, shuffle, a packer")


def _stage(word: str, key: str, text: str) -> tuple[str, object]:
    """The field of Chain that a word sets, and its value."""
    name, *options = word.split(":")
    if name not in NAMES or name == RAW:
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = "raw stands alone" if name == RAW else f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise ConfigError(f"{key} {text!r}: {word!r} is no stage here; {hint}")
    try:
        if name == "topk":
            return "share", _share(options)
        if name in BLOCKS or name in FLOATS:
            return "number", _number(name, options)
        if name in LEVELS:
            return "packer", _packer(name, options)
        if options:
            raise ValueError(f"{name} takes no options")
    except ValueError as wrong:
        raise ConfigError(f"{key} {text!r}: {word}: {wrong}") from None
    return ("feedback" if name == "ef" else name), True


def _share(options: Sequence[str]) -> float:
    share = float(options[0]) if len(options) == 1 else 0.0
    if not 0 < share < 1:
        raise ValueError("give the share of values that are sent, above 0 and below 1, as in topk:0.05")
    return share


def _number(name: str, options: Sequence[str]) -> Number:
    block, stochastic = BLOCKS.get(name, 0), False
    for option in options:
        if option in ("stochastic", "nearest") and name.startswith("int"):
            stochastic = option == "stochastic"
        elif option.startswith("block=") and name in BLOCKS:
            block = int(option.removeprefix("block="))
        else:
            raise ValueError(f"no option {option!r}; int stages take block=N, nearest and stochastic, nf4 and sign block=N")
    if name in BLOCKS and not (8 <= block <= 1 << 16 and block & (block - 1) == 0):
        raise ValueError(f"block={block}; give a power of two from 8 to 65536")
    return Number(name, block, stochastic)


def _packer(name: str, options: Sequence[str]) -> Packer:
    level = int(options[0]) if options else FASTEST
    low, high = LEVELS[name]
    if len(options) > 1 or not low <= level <= high:
        raise ValueError(f"give one level from {low} to {high}, as in {name}:{low}")
    return Packer(name, level)


__getattr__ = door(__name__, {"Coder": "coder"})
