"""An evaluation on several ranks is the same result as in one process, record by record; a second time nothing is asked."""

import json
import sys
from pathlib import Path

import pytest
from program import TORCHRUN, run

pytestmark = pytest.mark.timeout(600)
TASKS = {"perplexity": [], "exact_match": ["--rows", "40", "--max_new_tokens", "8"]}


@pytest.mark.parametrize("task", TASKS)
def test_ranks_give_the_result_of_one_process(expected_run: Path, tmp_path: Path, task: str) -> None:
    asked = ["-m", "fedmpi.evaluate", str(expected_run), "--task", task, "--batch_size", "4", *TASKS[task]]
    several = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *asked, "--out", "two"]
    run([sys.executable, *asked, "--out", "one"], tmp_path)
    run(several, tmp_path)
    one, two = (json.loads((tmp_path / name / f"{task}.json").read_text()) for name in ("one", "two"))
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    for key in set(one) - {"seconds", "model_seconds"}:
        assert one[key] == two[key], key
    if task == "exact_match":
        before = (tmp_path / "two" / f"{task}.json").read_bytes()
        assert run(several, tmp_path).count("all outputs") == 3
        assert (tmp_path / "two" / f"{task}.json").read_bytes() == before
