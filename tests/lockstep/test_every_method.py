"""Every PEFT method in the whole program: the same bytes from every number of ranks and after a stop, and a folder that opens."""

import json
from pathlib import Path

import pytest
import torch

from fedmpi.data import federate, tokenize
from fedmpi.errors import ConfigError
from fedmpi.evaluation import heldout_loss
from fedmpi.generate import main as generate
from tests.lockstep.ranks import STOPS, adapter, recipe, run

METHODS = {
    "rslora": ["--peft.rslora=true", "--peft.target_modules=all-linear"],
    "dora": ["--peft.dora=true"],
    "prefix": ["--peft.method=prefix"],
    "ptuning": ["--peft.method=ptuning"],
    "ptuning-lstm": ["--peft.method=ptuning", "--peft.encoder=lstm"],
    "prompt": ["--peft.method=prompt"],
    "prompt-text": ["--peft.method=prompt", "--peft.init_text=Think step by step."],
    "none": ["--peft.method=none"],
}


@pytest.fixture
def short(settings: list[str]) -> list[str]:
    plain = [setting for setting in settings if not setting.startswith(("--peft", "--rounds", "--clients", "--train.accum"))]
    return [*plain, "--rounds=3", "--clients=3", "--clients_per_round=2", "--data.num_rows=40", "--peft.num_virtual_tokens=4"]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_every_placement(name: str, short: list[str], model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = recipe(*short, *METHODS[name], STOPS)
    assert run(wanted, tmp_path / "one") == [0]
    assert run(wanted, tmp_path / "four", 4) == [0] * 4
    assert set(run(wanted, tmp_path / "parts", 2, stop_rank=1, stop_turn=3)) == {75}
    assert run(wanted, tmp_path / "parts", 3) == [0] * 3
    assert adapter(tmp_path / "one") == adapter(tmp_path / "four") == adapter(tmp_path / "parts")

    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "four" / "metrics.jsonl").open()]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    examples, _ = tokenize(
        federate(wanted.data, wanted.clients, wanted.seed).heldout, AutoTokenizer.from_pretrained(model_folder), wanted.data
    )
    assert heldout_loss(base, examples, wanted.eval.batch_size, 0).loss == summary["base"]["eval_loss"]
    assert lines[0]["eval_loss"] == summary["base"]["eval_loss"]
    assert min(line["eval_loss"] for line in lines[2:]) < lines[1]["eval_loss"]  # it learns
    if name != "none":
        opened = PeftModel.from_pretrained(base, tmp_path / "one" / "adapter")
        assert heldout_loss(opened, examples, wanted.eval.batch_size, 0).loss == summary["final"]["eval_loss"]
    assert generate([str(tmp_path / "one"), "--prompt=Count to three.", "--compare=fed,base", "--max_new_tokens=4"]) == 0


def test_what_is_exchanged_is_what_is_trained(short: list[str], tmp_path: Path) -> None:
    """P-tuning's encoder travels, though peft's own state leaves it out."""
    run(recipe(*short, *METHODS["ptuning"]), tmp_path, 3)
    line = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()][-1]
    parameters = 4 * 16 + 3 * (16 * 16 + 16)
    assert line["up_bytes"] == 2 * 4 * parameters


def test_virtual_tokens_take_positions(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, "--peft.method=prompt", "--peft.dropout=0", "--peft.num_virtual_tokens=400")
    with pytest.raises(ConfigError, match="512 positions, of which virtual tokens take 400: give at most 112"):
        run(wanted, tmp_path)


def test_checkpointing_does_not_go_with_a_prefix() -> None:
    with pytest.raises(ConfigError, match="train.checkpointing .* prefix"):
        recipe("--peft.method=prefix", "--train.checkpointing=true")
