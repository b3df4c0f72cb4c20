"""An evaluation on several ranks is the same result as in one process, record by record; a second time nothing is asked."""

import json
import sys
from pathlib import Path

import pytest
from program import PROGRAM, TORCHRUN, run

pytestmark = pytest.mark.timeout(600)
TASKS = {"perplexity": [], "exact_match": ["--rows", "40", "--max_new_tokens", "8"]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run([sys.executable, *PROGRAM, "--run_dir", "run", "--rounds", "1"], folder)
    return folder / "run"


@pytest.mark.parametrize("task", TASKS)
def test_ranks_give_the_result_of_one_process(run_dir: Path, tmp_path: Path, task: str) -> None:
    asked = ["-m", "fedmpi.evaluate", str(run_dir), "--task", task, "--batch_size", "4", *TASKS[task]]
    several = [*TORCHRUN, "--standalone", "--nproc_per_node", "3", *asked, "--out", "three"]
    run([sys.executable, *asked, "--out", "one"], tmp_path)
    run(several, tmp_path)
    one, three = (json.loads((tmp_path / name / f"{task}.json").read_text()) for name in ("one", "three"))
    assert (one.pop("ranks"), three.pop("ranks")) == (1, 3)
    for key in set(one) - {"seconds", "model_seconds"}:
        assert one[key] == three[key], key
    before = (tmp_path / "three" / f"{task}.json").read_bytes()
    assert "all outputs" in run(several, tmp_path)
    assert (tmp_path / "three" / f"{task}.json").read_bytes() == before
