"""A client that fails is a Failure and nobody else's; too few updates repeat the round or end the run."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedmpi.algorithms import fedavg
from fedmpi.training import Hook
from tests.lockstep.ranks import adapter, recipe, run


@dataclass(frozen=True)
class Fails(Hook):
    """Raises at the turns that a test names, counted over the whole run."""

    turns: ClassVar[set[int]] = set()
    seen: ClassVar[list[int]] = []

    def before_fit(self, model: Any) -> None:
        self.seen.append(len(self.seen))
        if self.seen[-1] in self.turns:
            raise RuntimeError("this turn fails")


@pytest.fixture(autouse=True)
def anew() -> None:
    Fails.turns, Fails.seen = set(), []


HOOK = f"--train.hooks=[{__name__}.Fails]"


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize("size", [1, 3])
def test_the_round_goes_on_without_a_failed_client(settings: list[str], tmp_path: Path, size: int) -> None:
    Fails.turns = {1}
    assert run(recipe(*settings, HOOK), tmp_path, size) == [0] * size
    first = lines_of(tmp_path)[1]
    assert len(first["counted"]) == 4 and len(first["failures"]) == 1
    assert "RuntimeError: this turn fails" in str(first["failures"])
    assert first["counted"] + [int(c) for c in first["failures"]] != first["cohort"] or len(first["cohort"]) == 5


def test_too_few_updates_repeat_the_round_with_another_cohort(settings: list[str], tmp_path: Path) -> None:
    Fails.turns = {2}
    wanted = recipe(*settings, HOOK, "--min_clients=5")
    assert run(wanted, tmp_path) == [0]
    lines = lines_of(tmp_path)
    assert [line["event"] for line in lines if "event" in line] == ["evaluation", "quorum_lost"]
    assert [line["attempt"] for line in lines if "event" not in line] == [1, 0, 0, 0]


def test_state_of_an_update_that_did_not_count_is_rolled_back(settings: list[str], tmp_path: Path) -> None:
    """With all clients in every round, a repeated round is the same round: kept optimisers must be as before it."""
    steady = [*settings, "--train.optimizer_state=keep", "--clients_per_round=9", "--min_clients=9", HOOK]
    Fails.turns = {9 + 4}  # the second round loses its fifth client
    assert run(recipe(*steady), tmp_path / "repeated") == [0]
    repeated = [line for line in lines_of(tmp_path / "repeated") if "event" not in line]
    assert [line["attempt"] for line in repeated] == [0, 1, 0, 0]
    assert repeated[1]["counted"] == list(range(9))
    assert adapter(tmp_path / "repeated")


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_without_a_quorum_stops_with_its_reason(
    settings: list[str], tmp_path: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Fails.turns = set(range(100))
    assert run(recipe(*settings, HOOK, "--on_quorum_lost=stop"), tmp_path, size) == [1] * size
    said = capsys.readouterr().err
    assert "--min_clients is 1" in said
    assert all(f"fedmpi: rank {rank}: QuorumLost: the run is given up" in said for rank in range(size))
    assert [line["event"] for line in lines_of(tmp_path)] == ["evaluation", "quorum_lost"]


@pytest.mark.parametrize("size", [1, 3])
def test_giving_up_keeps_what_counted_since_the_last_checkpoint(settings: list[str], tmp_path: Path, size: int) -> None:
    """With a checkpoint every ten rounds, the third of four loses all its clients for good; later it finds them again."""
    rare = [*settings, HOOK, "--checkpoint_every=10", "--on_quorum_lost=stop", "--train.optimizer_state=keep"]
    Fails.turns = set(range(10, 15))
    assert run(recipe(*rare), tmp_path / "run", size) == [1] * size
    assert [(line["round"], line.get("event")) for line in lines_of(tmp_path / "run")] == [
        (-1, "evaluation"), (0, None), (1, None), (2, "quorum_lost"),
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*")] == ["round-000001"]
    assert run(recipe(*rare), tmp_path / "run") == [0]
    told = [line.get("event") for line in lines_of(tmp_path / "run")]
    assert told == ["evaluation", None, None, "quorum_lost", "resume", None, None]
    run(recipe(*rare), tmp_path / "whole")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("factor", "words"), [(float("nan"), "not finite"), (1e6, "has grown to")])
def test_an_update_that_would_break_the_mean_is_its_clients_failure(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, factor: float, words: str
) -> None:
    honest = fedavg.client_update

    def hostile(client: Any, sent: Any, rnd: Any) -> Any:
        update = honest(client, sent, rnd)
        worse = {name: factor * tensor for name, tensor in update.tensors.items()}
        return replace(update, tensors=worse) if client.id == rnd.cohort[2] and rnd.index == 1 else update

    monkeypatch.setattr(fedavg, "client_update", hostile)
    assert run(recipe(*settings), tmp_path, size) == [0] * size
    rounds = [line for line in lines_of(tmp_path) if "event" not in line]
    assert [len(line["counted"]) for line in rounds] == [5, 4, 5, 5]
    assert words in str(rounds[1]["failures"][str(rounds[1]["cohort"][2])])


class Poisons(Hook):
    """Makes the gradient of the first step of every turn infinite."""

    def after_backward(self, step: Any) -> None:
        if step.index == 0:
            next(p for p in step.model.parameters() if p.requires_grad).grad.fill_(float("inf"))


@pytest.mark.parametrize("way", [["--on_nonfinite", "skip"], ["--on_nonfinite=skip"]])
def test_a_step_that_is_not_finite_is_skipped_and_told(settings: list[str], tmp_path: Path, way: list[str]) -> None:
    wanted = recipe(*settings, f"--train.hooks=[{__name__}.Poisons]", "--rounds=1", *way)
    assert run(wanted, tmp_path) == [0]
    (line,) = [line for line in lines_of(tmp_path) if "event" not in line]
    assert line["failures"] == {} and line["skipped"].keys() == {str(client) for client in line["cohort"]}
    for (note,) in line["skipped"].values():
        assert note.startswith("step 0 of 2: the norm of the gradient is inf, samples ")


def test_by_default_it_is_the_clients_failure_with_step_and_samples(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, f"--train.hooks=[{__name__}.Poisons]", "--rounds=1", "--on_quorum_lost=stop")
    assert run(wanted, tmp_path) == [1]
    (lost,) = [line for line in lines_of(tmp_path) if line.get("event") == "quorum_lost"]
    assert "NonFinite: step 0 of 2: the norm of the gradient is inf, samples " in lost["message"]
