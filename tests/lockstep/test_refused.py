"""An update is checked before it touches the aggregate: one that is refused is its client's Failure, and the round goes on."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fedmpi.training import Hook
from tests.lockstep.ranks import recipe, run


@dataclass(frozen=True)
class Spoils(Hook):
    """Alters what is about to be sent, after the client's own checks: the second turn of the run."""

    factor: ClassVar[float] = math.nan
    seen: ClassVar[list[int]] = []

    def after_fit(self, model: Any) -> None:
        self.seen.append(0)
        if len(self.seen) == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad)[0] *= self.factor


HOOK = f"--train.hooks=[{__name__}.Spoils]"


@pytest.fixture(autouse=True)
def anew() -> None:
    Spoils.factor, Spoils.seen = math.nan, []


def first_round(folder: Path) -> dict[str, Any]:
    return next(line for line in map(json.loads, (folder / "metrics.jsonl").open()) if "event" not in line)


@pytest.mark.parametrize(("size", "rule"), [(1, "flexlora"), (3, "mean")])
def test_a_value_that_is_not_finite_is_a_failure_of_its_client(settings: list[str], tmp_path: Path, size: int, rule: str) -> None:
    wanted = recipe(*settings, "--rounds=1", HOOK, f"--aggregation.rule={rule}")
    assert run(wanted, tmp_path, size) == [0] * size
    line = first_round(tmp_path)
    assert len(line["counted"]) == 4 and len(line["failures"]) == 1
    assert "NonFinite: the update's" in str(line["failures"]) and "not finite" in str(line["failures"])
    assert line["up_bytes"] == 5 * 4 * 2 * 2 * (8 * 16 + 16 * 8)  # what came is counted, whatever became of it


def test_an_update_that_moved_too_far_is_refused(settings: list[str], tmp_path: Path) -> None:
    Spoils.factor = 1e6
    assert run(recipe(*settings, "--rounds=1", HOOK, "--aggregation.most_norm=50"), tmp_path) == [0]
    assert "aggregation.most_norm allows 50" in str(first_round(tmp_path)["failures"])
