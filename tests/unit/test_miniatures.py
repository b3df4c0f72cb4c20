"""The miniatures of FedBiOT's rows run, one round of one step each; on the real small model and real text where these are."""

import json
from pathlib import Path

import pytest
from evaluation_data import shared

from fedmpi import run

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
ONE = (
    *("--rounds", "1", "--train.steps", "1", "--train.batch_size", "1", "--offsite.prealign_steps", "1"),
    *("--offsite.align_batch_size", "1", "--data.max_length", "48", "--eval.rows", "1"),
)
FILES = {
    "gsm8k": "gsm8k/train.jsonl",
    "dolly": "dolly15k/databricks-dolly-15k.jsonl.gz",
    "rosetta": "rosetta/rosetta_code_10lang.jsonl.gz",
}
slow = pytest.mark.slow


def of_the_small_model(task: str) -> list[str]:
    return [
        *("--model.path", str(shared("models/bitstories1M")), "--data.path", str(shared(FILES[task])), "--data.num_rows", "400"),
        *("--offsite.public_path", str(shared("alpaca/alpaca_small.json.gz"))),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "fedbiot-mini-dolly",
        *(pytest.param(f"fedbiot-mini-{task}", marks=slow) for task in ("gsm8k", "rosetta")),
        *(pytest.param(f"fedot-mini-{task}", marks=slow) for task in FILES),
        *(pytest.param(f"{algorithm}-tiny", marks=slow) for algorithm in ("fedot", "fedbiot")),
    ],
)
def test_it_runs(name: str, tmp_path: Path) -> None:
    *_, task = name.split("-")
    given = of_the_small_model(task) if task in FILES else []
    assert run.main(["--config", str(RECIPES / f"{name}.yaml"), *ONE, *given, "--run_dir", str(tmp_path)]) == 0
    final = json.loads((tmp_path / "summary.json").read_text())["final"]
    assert {"eval_loss", "eval_loss_emu", "eval_token_accuracy", "eval_token_accuracy_emu"} <= set(final)
    assert ("exact_match" in final) == (task == "tiny")
