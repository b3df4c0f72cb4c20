"""Further algorithms beside a run: federations of the same clients in folders of their own, and rows of one table."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmpi import generate, report
from fedmpi.data import toy
from fedmpi.settings.recipe import Recipe
from tests.lockstep.ranks import STOPS, adapter, recipe, run

PLACES = (".", "fedot", "fedbiot")
SMALL = (
    *("--clients=3", "--rounds=2", "--data.name=json", "--data.splitter=iid", "--data.max_length=64", "--peft.rank=2"),
    *("--train.steps=1", "--train.batch_size=2", "--compare=fedot,fedbiot"),
    *("--offsite.prealign_steps=1", "--offsite.align_steps=1", "--offsite.align_batch_size=2", STOPS),
)


@pytest.fixture(scope="module")
def wanted(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in toy.rows(40, 0, "train")))
    return recipe(f"--model.path={deep_folder}", f"--data.path={rows}", *SMALL)


@pytest.fixture(scope="module")
def whole(wanted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(wanted, folder) == [0]
    return folder


def test_stopped_between_them_it_goes_on_with_other_ranks_to_the_same_bytes(wanted: Recipe, whole: Path, tmp_path: Path) -> None:
    """The eighth turn of a client is in the first round of the second algorithm."""
    assert run(wanted, tmp_path / "run", 3, stop_rank=1, stop_turn=8) == [75] * 3
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "preempted"
    assert (tmp_path / "run" / "fedot" / "metrics.jsonl").exists() and not (tmp_path / "run" / "fedbiot").exists()
    assert run(wanted, tmp_path / "run", 2) == [0, 0]
    for place in PLACES:
        assert adapter(tmp_path / "run" / place) == adapter(whole / place)


def test_each_is_what_it_would_be_alone(whole: Path, tmp_path: Path) -> None:
    alone = recipe("--config", str(whole / "fedbiot" / "config.yaml"))
    assert alone.run_dir == str(whole / "fedbiot") and run(alone, whole / "fedbiot") == [0]  # finished before
    assert run(alone, tmp_path / "run", 2) == [0, 0]
    assert adapter(tmp_path / "run") == adapter(whole / "fedbiot")


def test_the_table_and_the_report_have_a_row_for_each(wanted: Recipe, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name, _ in report.read(whole).rows()]
    assert names == [
        "nothing (the base model)", "the federation", "the federation with fedot", "the federation with fedbiot",
    ]  # fmt: skip
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in names) and "loss with emulator" in page
    assert run(wanted, whole) == [0]
    told = capsys.readouterr().out
    assert all(name in told for name in names) and "loss with emulator" in told
    final: dict[str, Any] = json.loads((whole / "fedot" / "summary.json").read_text())["final"]
    assert f"{final['eval_loss']:.3f}" in told and f"{final['eval_loss_emu']:.3f}" in told


def test_what_was_compared_can_be_heard(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(whole), "--prompt", "Say cat", "--max_new_tokens", "2", "--compare"]
    assert generate.main([*asked, "base,fed,fedbiot"]) == 0
    assert "[fedbiot]" in capsys.readouterr().out
    assert generate.main([*asked, "fedprox"]) == 2
    assert "allowed are base, fed, global, local, local:CLIENT, fedot, fedbiot" in capsys.readouterr().err
