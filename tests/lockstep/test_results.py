"""What a run leaves behind is what it measured: the adapter opens with PEFT, the scenarios fill the table, early stopping stops."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi import meter
from fedmpi.data import federate, tokenize
from fedmpi.errors import CheckpointError
from fedmpi.evaluation import heldout_loss
from fedmpi.federation.post import Post
from fedmpi.messages import Kind
from fedmpi.settings import recipe as recipes
from tests.lockstep.ranks import STOPS, adapter, recipe, run


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_the_adapter_opens_with_peft_and_gives_the_loss_of_the_run(settings: list[str], model_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = recipe(*settings)
    run(wanted, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    rows = federate(wanted.data, wanted.clients, wanted.seed).heldout
    examples, _ = tokenize(rows, AutoTokenizer.from_pretrained(model_folder), wanted.data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert heldout_loss(model, examples, wanted.eval.batch_size, 0).loss == summary["final"]["eval_loss"]
    assert summary["final"]["eval_loss"] < summary["base"]["eval_loss"]


def test_no_file_of_the_adapter_tells_where_or_when_it_was_made(settings: list[str], model_folder: Path, tmp_path: Path) -> None:
    run(recipe(*settings), tmp_path / "one")
    run(recipe(*settings), tmp_path / "two")
    for path in (tmp_path / "one" / "adapter").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "adapter" / path.name).read_bytes()
        assert str(model_folder.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("size", [1, 3])
def test_all_scenarios_and_the_table(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    short = [*settings, "--scenario=all", "--rounds=2", "--clients=3", "--clients_per_round=2", "--data.splitter=iid"]
    assert run(recipe(*short), tmp_path, size) == [0] * size
    said = capsys.readouterr().out
    for row in ("the base model", "client 2 alone", "mean of the clients alone", "all data in one place", "the federation"):
        assert row in said
    for folder in ("adapter", "global/adapter", "local/clients/0/adapter", "local/clients/2/adapter"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()
    assert len({adapter(tmp_path / part) for part in (".", "global", "local/clients/0", "local/clients/1")}) == 4
    again = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert run(recipe(*short), tmp_path, 2) == [0, 0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == again


def test_a_server_that_is_slow_to_close_one_training_does_not_mix_it_with_the_next(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect = Post.expect

    def slow(post: Post, peer: int, kind: Kind, *rest: Any) -> Any:
        message = expect(post, peer, kind, *rest)
        if kind is Kind.FAREWELL and post.transport.rank == 0:
            time.sleep(0.2)
        return message

    monkeypatch.setattr(Post, "expect", slow)
    short = [*settings, "--scenario=all", "--rounds=1", "--clients=2", "--clients_per_round=2", "--data.splitter=iid"]
    assert run(recipe(*short), tmp_path, 3) == [0] * 3


def test_local_runs_have_the_same_bytes_wherever_they_run(settings: list[str], tmp_path: Path) -> None:
    short = recipe(*settings, "--scenario=local", "--rounds=2", "--clients=3", "--clients_per_round=3")
    for size in (1, 4):
        run(short, tmp_path / str(size), size)
    for client in range(3):
        assert adapter(tmp_path / "1" / "clients" / str(client)) == adapter(tmp_path / "4" / "clients" / str(client))


def test_a_signal_on_one_rank_stops_every_client_that_trains_alone(settings: list[str], tmp_path: Path) -> None:
    alone = ["--scenario=local", "--clients=3", "--clients_per_round=3", "--rounds=500", STOPS]
    assert run(recipe(*settings, *alone), tmp_path, 4, stop_rank=2, stop_turn=2) == [75] * 4
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "preempted"
    rounds = [len(lines_of(path)) for path in (tmp_path / "clients").iterdir() if (path / "metrics.jsonl").exists()]
    assert rounds and all(num < 250 for num in rounds), rounds


def test_results_that_went_missing_are_made_again(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = recipe(*settings)
    run(wanted, tmp_path)
    before = adapter(tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    assert run(wanted, tmp_path, 2) == [0, 0]
    assert "adapter is gone: it is made again" in capsys.readouterr().out
    assert adapter(tmp_path) == before
    (tmp_path / "metrics.jsonl").unlink()
    assert run(wanted, tmp_path) == [0]
    assert "metrics.jsonl lacks the lines of 3 committed rounds (from round 0 on)" in capsys.readouterr().out
    (tmp_path / "summary.json").unlink()
    assert run(wanted, tmp_path) == [0]
    assert json.loads((tmp_path / "summary.json").read_text())["rounds"] == 4
    shutil.rmtree(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="adapter is gone, and without checkpoints it cannot be made again"):
        run(wanted, tmp_path)


def test_early_stopping(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, "--rounds=30", "--train.lr=5.0", "--early_stop=2")
    assert run(wanted, tmp_path, 2) == [0, 0]
    losses = [line["eval_loss"] for line in lines_of(tmp_path) if "event" not in line]
    assert 3 <= len(losses) < 30
    assert min(losses[-2:]) >= min(losses[:-2])
    assert run(wanted, tmp_path) == [0]
    assert len(lines_of(tmp_path)) == len(losses) + 1
    before = adapter(tmp_path)
    (tmp_path / "summary.json").unlink()  # killed between the last commit and the end
    assert run(wanted, tmp_path, 3) == [0] * 3
    assert [line["eval_loss"] for line in lines_of(tmp_path) if "event" not in line] == losses
    assert adapter(tmp_path) == before


def test_checkpoints_may_be_rarer_than_rounds(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, "--rounds=5")
    run(wanted, tmp_path / "each")
    run(replace(wanted, checkpoint_every=2), tmp_path / "rare", 3)
    assert adapter(tmp_path / "each") == adapter(tmp_path / "rare")
    kept = sorted(path.name for path in (tmp_path / "rare" / "checkpoints").glob("round-*"))
    assert kept == ["round-000003", "round-000004"]
    assert [line["round"] for line in lines_of(tmp_path / "rare")] == [-1, 0, 1, 2, 3, 4]


def test_the_resolved_recipe_runs_again(settings: list[str], tmp_path: Path) -> None:
    run(recipe(*settings), tmp_path / "run")
    again = recipes.read([f"--config={tmp_path / 'run' / 'config.yaml'}"], "test", "")[0]
    assert again.hash() == recipe(*settings).hash()


def test_costs_are_told_for_each_client_of_a_round(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every column of every round; test_plan_and_ledger.py holds tokens and operations to other counts, test_meter.py joules."""
    monkeypatch.setattr(meter, "packages_uj", dict)  # nothing here tells energy
    run(recipe(*settings, "--link_mbps=8"), tmp_path / "run", 3)
    for line in lines_of(tmp_path / "run")[1:]:
        costs = line["client_costs"]
        assert sorted(map(int, costs)) == line["counted"]
        for key in ("tokens", "flops", "steps", "up_bytes", "down_bytes"):
            assert sum(cost[key] for cost in costs.values()) == line[key] > 0
        for cost in costs.values():
            assert cost["transfer_s"] == pytest.approx((cost["up_bytes"] + cost["down_bytes"]) / 1e6)
            assert cost["turn_s"] > 0 and cost["peak_rss_bytes"] > 1e7
            assert cost["peak_gpu_bytes"] is None and cost["energy_j"] is None
        assert line["seconds"] >= line["round_s"] + line["score_s"] > line["round_s"] > 0 and line["peak_rss_bytes"] > 1e7
        assert line["round_s"] >= line["broadcast_s"] + line["wait_s"] > line["broadcast_s"] > 0
        assert 0 < line["train_s"] <= sum(cost["turn_s"] for cost in costs.values()) and line["exposed_s"] >= 0 <= line["blocked_s"]
    monkeypatch.setattr(meter, "packages_uj", lambda: {Path("package"): 1})
    monkeypatch.setattr(meter, "joules_since", lambda before: 2.5 * len(before))
    run(recipe(*settings, "--rounds=1"), tmp_path / "other")
    costs = lines_of(tmp_path / "other")[1]["client_costs"]
    assert [(cost["transfer_s"], cost["energy_j"]) for cost in costs.values()] == [(None, 2.5)] * 5
