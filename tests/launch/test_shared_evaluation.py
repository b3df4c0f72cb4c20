"""An evaluation on several ranks is the same result as in one process, record by record, killed in its middle or not."""

import json
import sys
from pathlib import Path

import pytest
from program import TORCHRUN, run, started, wait_for

pytestmark = pytest.mark.timeout(600)
ITS_OWN = {"ranks", "seconds", "model_seconds", "asked_now"}


def commands(run_dir: Path, *asked: str) -> tuple[list[str], list[str]]:
    """In one process and on two ranks, into folders `one` and `two`."""
    command = ["-m", "fedmpi.evaluate", str(run_dir), "--batch_size", "4", *asked]
    several = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *command]
    return [sys.executable, *command, "--out", "one"], [*several, "--out", "two"]


def results(folder: Path, task: str) -> tuple[dict, dict]:
    """What both found; all but what is a process's own must be equal."""
    one, two = (json.loads((folder / name / f"{task}.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() and [key for key in one if one[key] != two[key] and key not in ITS_OWN] == []
    return one, two


def test_ranks_give_the_result_of_one_process(expected_run: Path, tmp_path: Path) -> None:
    alone, several = commands(expected_run, "--task", "perplexity")
    run(alone, tmp_path)
    run(several, tmp_path)
    one, two = results(tmp_path, "perplexity")
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["asked_now"] == two["asked_now"] == len(one["records"])


def test_ranks_that_are_killed_go_on_where_they_were(expected_run: Path, tmp_path: Path) -> None:
    alone, several = commands(expected_run, "--task", "exact_match", "--rows", "192", "--max_new_tokens", "8")
    part, done = tmp_path / "two" / "exact_match.jsonl", tmp_path / "two" / "exact_match.json"
    with started(several, tmp_path) as ranks:  # its end is SIGKILL, for the launcher and both ranks
        wait_for(lambda: part.exists() and part.read_bytes().count(b"\n") > 3, ranks, "three chunks of answers")
    assert part.exists() and not done.exists(), "killed in the middle"
    run(several, tmp_path)
    run(alone, tmp_path)
    one, two = results(tmp_path, "exact_match")
    assert 0 < two["asked_now"] < one["asked_now"] == 192 and not part.exists()
    before = done.read_bytes()
    assert run(several, tmp_path).count("all outputs") == 3 and done.read_bytes() == before, "nothing was asked again"
