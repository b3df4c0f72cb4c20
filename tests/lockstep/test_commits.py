"""Training goes on while a round is written, by no more than it may, and what is being written stays as it was handed over."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmpi.errors import CheckpointError
from fedmpi.federation.lockstep import Federation
from fedmpi.record.commits import Commits
from fedmpi.record.folder import RunFolder, read_metrics
from fedmpi.settings.recipe import algorithm, known_algorithms
from fedmpi.stop import Stop
from fedmpi.tensors import digest
from tests.lockstep.ranks import STOPS, adapter, recipe, run


class Held:
    """Holds every write back until training has come to wait for it, and looks at what is written then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.awaited, self.written, self.told = threading.Event(), {}, {}
        begin, wait, write, rounds = Commits.begin, Commits.wait, Commits._write, Federation.rounds
        given: dict[int, str] = {}

        def begins(commits: Commits, index: int, state: Any, *rest: Any) -> None:
            given[index] = digest(state)
            begin(commits, index, state, *rest)

        def waits(commits: Commits) -> None:
            self.awaited.set()
            wait(commits)
            self.awaited.clear()

        def writes(commits: Commits, index: int, state: Any, *rest: Any) -> None:
            assert self.awaited.wait(60)
            self.written[index] = digest(state) == given[index]
            write(commits, index, state, *rest)

        def announced(fed: Federation) -> Iterator[Any]:
            for rnd in rounds(fed):
                self.told[rnd.index] = rnd.durable
                yield rnd
            self.told[fed._now.index] = fed._now.durable

        for owner, name, held in (Commits, "begin", begins), (Commits, "wait", waits), (Commits, "_write", writes):
            monkeypatch.setattr(owner, name, held)
        monkeypatch.setattr(Federation, "rounds", announced)


KINDS = [*known_algorithms(), "fedavg --codec=delta,int8,ef", "fedavg --aggregation.rule=flora"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_being_written_is_not_touched(
    settings: list[str], deep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, *more = kind.split()
    offsite = hasattr(algorithm(name), "SCHEME")
    more += [f"--model.path={deep_folder}", "--offsite.prealign_steps=2", "--offsite.align_steps=1"] if offsite else []
    held = Held(monkeypatch)
    wanted = recipe(
        *settings, *more, f"--algorithm={name}", "--train.optimizer_state=keep", "--clients_per_round=2", "--eval_every=0"
    )
    assert run(wanted, tmp_path) == [0]
    assert held.written == dict.fromkeys(range(4), True)
    assert held.told == {0: -1, 1: -1, 2: 0, 3: 1, 4: 3}  # one round in hand, one being written; the end waits


def test_training_is_ahead_of_the_disk_by_one_checkpoint_at_most(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    wanted = recipe(*settings, "--rounds=7", "--checkpoint_every=2", "--clients_per_round=2", "--eval_every=0")
    assert run(wanted, tmp_path, 2) == [0, 0]
    assert held.told == {0: -1, 1: -1, 2: -1, 3: -1, 4: 1, 5: 1, 6: 3, 7: 6}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["round"] for line in lines if line.get("blocked_s", -1) >= 0] == [1, 3, 5, 6]


def test_a_disk_that_fails_while_training_goes_on_loses_nothing(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = RunFolder.publish

    def full(folder: RunFolder, lines: Any) -> None:
        if lines[-1]["round"] == 1:
            raise CheckpointError("no space, make room")
        publish(folder, lines)

    wanted = recipe(*settings, "--clients_per_round=2", "--eval_every=0")
    monkeypatch.setattr(RunFolder, "publish", full)
    assert "make room" in str(run(wanted, tmp_path / "run", 2)[0])
    monkeypatch.setattr(RunFolder, "publish", publish)
    assert run(wanted, tmp_path / "run") == run(wanted, tmp_path / "whole") == [0]
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    rounds = [[json.loads(line)["round"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("run", "whole")]
    assert rounds == [[-1, 0, 1, 1, 2, 3], [-1, 0, 1, 2, 3]]  # with a line that says where it went on


@pytest.mark.parametrize("size", [1, 2])
def test_a_round_that_would_be_cut_off_is_not_begun(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """Before and after round 0 there is time for more, after round 1 there is none."""
    left = iter((1000.0, 1000.0, 1000.0, 0.0))
    monkeypatch.setattr(Stop, "left_s", lambda stop: next(left))
    wanted = recipe(*settings, "--clients_per_round=2", "--eval_every=0")
    assert run(wanted, tmp_path / "run", size) == [75] * size
    assert [line["round"] for line in read_metrics(tmp_path / "run")] == [-1, 0, 1]
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "preempted", "signal": None, "time_is_up": True}
    said = [line for line in capsys.readouterr().out.splitlines() if "is not begun" in line]
    assert len(said) == 1 and "0 s are left" in said[0] and "round 3" in said[0]
    monkeypatch.setattr(Stop, "left_s", lambda stop: 1000.0)
    assert run(wanted, tmp_path / "run", 2) == [0, 0]
    assert run(wanted, tmp_path / "whole") == [0]
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("scenario", ["fed", "local"])
def test_a_job_whose_time_is_over_begins_nothing(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scenario: str
) -> None:
    """Neither a first round nor, after a stop, a further one; what was committed stays, and goes on when there is time."""
    wanted = recipe(*settings, "--rounds=2", "--eval_every=0", f"--scenario={scenario}", STOPS)
    monkeypatch.setattr(Stop, "left_s", lambda stop: 0.0)
    assert run(wanted, tmp_path / "run", 2) == [75, 75]
    assert "out of time, and stopped before another round" in capsys.readouterr().out
    assert not list((tmp_path / "run").rglob("round-*")) and not list((tmp_path / "run").rglob("adapter"))
    assert json.loads((tmp_path / "run" / "state.json").read_text()) == {"state": "preempted", "signal": None, "time_is_up": True}
    if scenario == "local":
        return
    monkeypatch.setattr(Stop, "left_s", lambda stop: 1000.0)
    assert set(run(wanted, tmp_path / "run", 2, stop_rank=1, stop_turn=1)) == {75}
    monkeypatch.setattr(Stop, "left_s", lambda stop: 0.0)
    assert run(wanted, tmp_path / "run") == [75]
    assert [line["round"] for line in read_metrics(tmp_path / "run") if "event" not in line] == [0]
    monkeypatch.setattr(Stop, "left_s", lambda stop: 1000.0)
    assert run(wanted, tmp_path / "run") == [0]
