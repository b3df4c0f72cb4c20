"""What travels up: a client's update, or why there is none; and what the server keeps of a round. Values only."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedmpi.federation.coding import Encoding
from fedmpi.tensors import Tensors, num_bytes


@dataclass(frozen=True)
class Update:
    """What a client sends back. `owned` stays with the client; its digest travels, so that a checkpoint can name it."""

    client: int
    tensors: Tensors
    metrics: dict[str, Any]
    weight: int = 0  # set by the server
    owned: Tensors | None = None
    owned_sha256: str = ""
    coded: Encoding | None = None  # its message under codec chains, while that is on its way
    coded_bytes: int | None = None  # what that message took; `tensors` are then what it says

    @property
    def num_bytes(self) -> int:
        """What the update takes on a link."""
        return num_bytes(self.tensors) if self.coded_bytes is None else self.coded_bytes


@dataclass(frozen=True)
class Failure:
    """Why a client has no update this round."""

    client: int
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass
class Outcome:
    """What the server knows of a round once its updates are in."""

    counted: list[int] = field(default_factory=list)
    failures: dict[int, Failure] = field(default_factory=dict)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    owned: dict[int, str] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    wait_s: float = 0.0
    broadcast_s: float = 0.0
    meanwhile_s: float = 0.0  # what the server did while the clients began to train
    gather_s: float = 0.0  # from then on until the last client had answered

    def mean(self, figure: str) -> float:
        """The mean over clients of a figure that each of them told."""
        return math.fsum(metrics[figure] for metrics in self.metrics.values()) / len(self.metrics)

    def note(self, update: Update) -> None:
        """Keep everything of an update but its tensors."""
        self.counted.append(update.client)
        self.metrics[update.client] = update.metrics
        self.weights[update.client] = update.weight
        if update.owned_sha256:
            self.owned[update.client] = update.owned_sha256


class Party(Protocol):
    """A client value as the federation needs it: numbered, with a place for the state that it owns."""

    @property
    def id(self) -> int: ...

    @property
    def owned(self) -> Tensors | None: ...


class Vault(Protocol):
    """Where client-owned state is made durable, by the digest of its content."""

    def put(self, client: int, tensors: Tensors) -> str: ...

    def get(self, client: int, sha256: str) -> Tensors: ...
