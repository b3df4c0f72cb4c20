"""Data that must stay where they are: a rank opens its own clients' files only, and the numbers are those of one process."""

import json
import threading
from collections import defaultdict
from pathlib import Path

import pytest

from fedmpi import run as program
from fedmpi.data import files
from fedmpi.errors import Aborted, DataError
from tests.lockstep import ranks

SIZES = (30, 12, 21, 16, 25)


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """A file for each of five clients, of unequal sizes."""
    folder = tmp_path / "site"
    folder.mkdir()
    for client, size in enumerate(SIZES):
        rows = [{"instruction": f"client {client} says {i}", "response": f"{i * client} " * (i % 5)} for i in range(size)]
        write(folder / f"{client}.jsonl", rows)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """By thread, which is a rank here: the names of the files that it has read."""
    found: dict[int, set[str]] = defaultdict(set)

    def watched(path: Path):
        found[threading.get_ident()].add(path.name)
        return original(path)

    original = files.read
    monkeypatch.setattr(files, "read", watched)
    return found


def arguments(settings: list[str], sites: Path) -> list[str]:
    kept = [one for one in settings if not one.startswith(("--clients", "--data.num_rows", "--data.splitter"))]
    own = ["--clients=5", "--clients_per_round=3", "--data.name=json", "--data.splitter=given"]
    return [*kept, *own, f"--data.path={sites}/{{client}}.jsonl"]


def result(folder: Path) -> tuple[bytes, list[float], object]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return ranks.adapter(folder), losses, json.loads((folder / "summary.json").read_text())["data"]


@pytest.mark.parametrize("common", [False, True])
def test_ranks_open_their_own_clients_files_alone_and_nothing_else_changes(
    settings: list[str], sites: Path, tmp_path: Path, opened: dict[int, set[str]], common: bool
) -> None:
    if common:
        write(sites / "heldout.jsonl", [{"instruction": f"nobody says {i}", "response": str(i)} for i in range(9)])
    wanted = ranks.recipe(*arguments(settings, sites))
    assert ranks.run(wanted, tmp_path / "1") == [0]
    nobodys = {"heldout.jsonl"} if common else set()
    for size, groups in {3: [{0, 2, 4}, {1, 3}], 7: [{0}, {1}, {2}, {3}, {4}]}.items():
        opened.clear()
        assert ranks.run(wanted, tmp_path / str(size), size) == [0] * size
        expected = [{f"{client}.jsonl" for client in group} for group in groups] + ([nobodys] if common else [])
        assert sorted(map(sorted, opened.values())) == sorted(map(sorted, expected))
        assert result(tmp_path / str(size)) == result(tmp_path / "1")
    data = result(tmp_path / "1")[2]
    assert data["train_rows"] == [27, 11, 19, 15, 23] and data["samples"]["rows"] == data["train_rows"]
    assert data["samples"]["dropped"] == [0] * 5 and len(set(data["sha256"])) == 5


def test_scores_of_rows_that_stay_have_a_column_of_their_own(settings: list[str], sites: Path, tmp_path: Path) -> None:
    ranks.run(ranks.recipe(*arguments(settings, sites)), tmp_path / "run", 3)
    rounds = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()][1:]
    adapter = 4 * 2 * 2 * (8 * 16 + 16 * 8)
    assert [line["scoring_bytes"] for line in rounds] == [2 * adapter] * 4  # the base has none to send
    assert all(0 < line["control_bytes"] < 8_000 for line in rounds)


@pytest.mark.parametrize("common", [False, True])
def test_a_client_alone_is_scored_where_its_rows_are(settings: list[str], sites: Path, tmp_path: Path, common: bool) -> None:
    if common:
        write(sites / "heldout.jsonl", [{"instruction": f"nobody says {i}", "response": str(i)} for i in range(9)])
    local = [one for one in arguments(settings, sites) if not one.startswith("--clients_per_round")]
    wanted = ranks.recipe(*local, "--scenario=local", "--rounds=2")
    for size in (1, 3):
        assert ranks.run(wanted, tmp_path / str(size), size) == [0] * size
    for client in range(5):
        assert result(tmp_path / "1" / "clients" / str(client)) == result(tmp_path / "3" / "clients" / str(client))


def test_a_run_goes_on_on_other_ranks_and_refuses_changed_files(settings: list[str], sites: Path, tmp_path: Path) -> None:
    wanted = ranks.recipe(*arguments(settings, sites), ranks.STOPS)
    ranks.run(wanted, tmp_path / "whole")
    assert set(ranks.run(wanted, tmp_path / "parts", 3, stop_rank=1, stop_turn=3)) == {75}
    changed = (sites / "3.jsonl").read_text()
    (sites / "3.jsonl").write_text(changed.replace("says 7", "says seven"))
    refused = ranks.run(wanted, tmp_path / "parts", 4)
    assert "began with other data (sha256" in str(refused[0]) and all(isinstance(other, Aborted) for other in refused[1:])
    (sites / "3.jsonl").write_text(changed)
    assert ranks.run(wanted, tmp_path / "parts", 6) == [0] * 6
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_a_file_that_is_missing_is_told_by_the_rank_that_needs_it(settings: list[str], sites: Path, tmp_path: Path) -> None:
    (sites / "1.jsonl").unlink()
    results = ranks.run(ranks.recipe(*arguments(settings, sites)), tmp_path / "run", 4)
    assert isinstance(results[2], DataError) and "1.jsonl is neither a file nor a folder" in str(results[2])
    assert all(isinstance(results[rank], Aborted) for rank in (0, 1, 3))


@pytest.mark.parametrize("scenario", ["global", "all"])
def test_rows_are_not_put_in_one_place(settings, sites, tmp_path, capsys, scenario: str) -> None:
    assert program.main([*arguments(settings, sites), f"--scenario={scenario}", f"--run_dir={tmp_path / 'run'}"]) == 2
    assert f"scenario {scenario} puts all rows in one place" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
