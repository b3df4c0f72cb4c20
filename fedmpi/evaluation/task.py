"""What an evaluation task is: questions with names, a way to ask them, a score of the records. It never knows a run folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy

from fedmpi.data import files
from fedmpi.data.corpora import Row
from fedmpi.data.records import Record as FileRecord
from fedmpi.errors import ConfigError, DataError
from fedmpi.evaluation.decoding import Decoding, Speaker
from fedmpi.seeding import seed_for

Record = dict[str, Any]


class Task(Protocol):
    """One evaluation. Records are plain values, one for each question, and carry their question's `id`."""

    @property
    def name(self) -> str:
        """The task's name."""

    @property
    def ids(self) -> Sequence[str]:
        """The questions, in order."""

    def facts(self) -> Mapping[str, Any]:
        """Everything besides model and code that the score depends on: prompts, shots, decoding, data."""

    def ask(self, speaker: Speaker, chosen: Sequence[int]) -> list[Record]:
        """The records of some questions, in their order."""

    def score(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The scores of all records; `score` is the one figure to quote, `interval` its interval."""


@dataclass(frozen=True)
class Options:
    """What a user may set for a task; None is the task's own choice."""

    task: str
    data: str | None = None
    shots: str | None = None
    form: str | None = None
    rows: int | None = None
    seed: int = 0
    samples: int | None = None
    k: tuple[int, ...] = (1,)
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    allow_code_execution: bool = False
    judge_url: str | None = None
    judge_model: str | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of rows."""
        for key in ("rows", "samples", "max_new_tokens"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ConfigError(f"--{key} is {getattr(self, key)}: it must be at least 1")

    def decoding(self, own: Decoding) -> Decoding:
        """The task's decoding with what the user wants instead."""
        wanted = {key: getattr(self, key) for key in ("max_new_tokens", "temperature", "top_k", "top_p")}
        return Decoding(**{**own.facts(), "seed": self.seed, **{key: value for key, value in wanted.items() if value is not None}})


@dataclass(frozen=True)
class Heldout:
    """The held-out rows of a federation, with the client that holds each; clients without rows are named too."""

    rows: Sequence[Row]
    owners: Mapping[str, int]  # row id -> client
    num_clients: int
    source: str


def prompt_hash(prompts: Sequence[str]) -> str:
    """Names the exact prompts of a result."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def located(given: str | None, names: Sequence[str]) -> Path | None:
    """The file that a user gives, or the first known name in the folder."""
    path = Path(given or "").expanduser()
    found = [] if given is None else [path] if path.is_file() else files.find(path, names)
    return found[0] if found else None


def open_records(task: str, given: str | None, names: Sequence[str]) -> list[FileRecord]:
    """The records of that file."""
    found = located(given, names)
    if found is None:
        where = "none was given" if given is None else f"{given} has none of these"
        raise DataError(f"--task {task} needs --data: {' or '.join(names)}, plain or compressed, or its folder ({where})")
    return files.read(found)[0]


def draw(num: int, wanted: int | None, seed: int, what: str) -> list[int]:
    """Which of `num` rows are asked: all, or a seeded sample in the file's order."""
    if wanted is None or wanted >= num:
        return list(range(num))
    chosen = numpy.random.default_rng(seed_for(seed, "evaluate", what)).choice(num, wanted, replace=False)
    return sorted(int(index) for index in chosen)
