"""Rank count never changes numbers, resume never changes numbers: the same bytes from every placement."""

import json
from pathlib import Path

import pytest

from fedmpi.errors import Aborted
from tests.lockstep.ranks import STOPS, adapter, recipe, run


@pytest.mark.parametrize("kept", ["fresh", "keep"])
def test_every_number_of_ranks_gives_the_same_bytes(settings: list[str], tmp_path: Path, kept: str) -> None:
    wanted = recipe(*settings, f"--train.optimizer_state={kept}")
    for size in (1, 2, 4, 7):
        assert run(wanted, tmp_path / str(size), size) == [0] * size
    found = {size: adapter(tmp_path / str(size)) for size in (1, 2, 4, 7)}
    assert len(set(found.values())) == 1, "the adapter differs between numbers of ranks"
    fresh = json.loads((tmp_path / "1" / "metrics.jsonl").read_text().splitlines()[-1])
    ranks = json.loads((tmp_path / "7" / "metrics.jsonl").read_text().splitlines()[-1])
    assert fresh["eval_loss"] == ranks["eval_loss"] and fresh["cohort"] == ranks["cohort"]


def test_packed_rows_are_the_same_in_every_placement(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, "--data.packing=true", "--data.max_length=256", "--rounds=2")
    for size in (1, 4):
        assert run(wanted, tmp_path / str(size), size) == [0] * size
    assert adapter(tmp_path / "1") == adapter(tmp_path / "4")


def test_kept_optimisers_matter(settings: list[str], tmp_path: Path) -> None:
    for kept in ("fresh", "keep"):
        run(recipe(*settings, f"--train.optimizer_state={kept}"), tmp_path / kept)
    assert adapter(tmp_path / "fresh") != adapter(tmp_path / "keep")


@pytest.mark.parametrize("first,then", [(1, 4), (4, 1), (2, 7)])
def test_a_stopped_run_ends_in_the_same_bytes_on_other_ranks(settings: list[str], tmp_path: Path, first: int, then: int) -> None:
    wanted = recipe(*settings, "--train.optimizer_state=keep", "--clients_per_round=9", STOPS)
    run(wanted, tmp_path / "whole")
    stopped = run(wanted, tmp_path / "parts", max(first, 2), stop_rank=1, stop_turn=3)
    assert set(stopped) == {75}
    state = json.loads((tmp_path / "parts" / "state.json").read_text())
    assert state["state"] == "preempted"
    assert not (tmp_path / "parts" / "adapter").exists()
    assert run(wanted, tmp_path / "parts", then) == [0] * then
    assert adapter(tmp_path / "parts") == adapter(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").open()]
    assert [line["round"] for line in lines if "event" not in line] == [0, 1, 2, 3]
    assert [line["event"] for line in lines if "event" in line] == ["evaluation", "resume"]


def test_a_finished_run_is_not_run_again(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(*settings)
    run(wanted, tmp_path / "run", 2)
    before = adapter(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(wanted, tmp_path / "run", 4) == [0] * 4
    assert (adapter(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()) == before
    said = capsys.readouterr().out
    assert "the federation" in said and "round 1/4" not in said


def test_other_settings_are_refused_on_every_rank(settings: list[str], tmp_path: Path) -> None:
    run(recipe(*settings), tmp_path / "run")
    results = run(recipe(*settings, "--seed=1"), tmp_path / "run", 3)
    assert "belongs to experiment" in str(results[0])
    assert all(isinstance(result, Aborted) and "belongs to experiment" in str(result) for result in results[1:])


def test_the_ledger_is_what_the_shapes_say(settings: list[str], tmp_path: Path) -> None:
    run(recipe(*settings), tmp_path / "run", 4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    parameters = 2 * 2 * (8 * 16 + 16 * 8)  # layers, query and value, A and B
    for line in (line for line in lines if "event" not in line):
        ranks = {client % 3 for client in line["cohort"]}
        assert line["up_bytes"] == 4 * parameters * 5
        assert line["down_bytes"] == 4 * parameters * len(ranks)  # one copy for all clients of a rank
        assert line["control_bytes"] > 0
