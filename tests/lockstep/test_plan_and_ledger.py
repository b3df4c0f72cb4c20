"""What the plan says is what a run's ledger then holds: bytes exactly, and operations exactly."""

import json
from pathlib import Path

import pytest

from fedmpi import aggregation
from fedmpi.data import federate, tokenize
from fedmpi.models import costs, load_shapes, load_tokenizer, only, same_for_all, trained
from fedmpi.plan import figures
from fedmpi.settings import recipe as recipes
from tests.lockstep.ranks import recipe, run

METHODS = {
    "lora": ["--peft.rank=4"],
    "prompt": ["--peft.method=prompt", "--peft.num_virtual_tokens=4"],
    "ffa": ["--aggregation.rule=ffa"],  # A goes neither up nor down
    "rolora": [
        "--aggregation.rule=rolora",
        "--server_optimizer=avgm",
    ],  # half up, and half down to who had the round before
    "int8": ["--codec=int8"],
    "scaffold": ["--algorithm=scaffold", "--train.optimizer=sgd", "--train.lr=0.1"],
}


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_of_a_run_is_its_ledger(name: str, model_folder: Path, tmp_path: Path) -> None:
    """One epoch, so that every row is seen once and all lengths are known."""
    asked = [f"--model.path={model_folder}", "--rounds=2", "--clients=3", "--data.num_rows=30", "--data.max_length=128"]
    wanted = recipe(*asked, "--train.epochs=1", "--train.batch_size=4", "--eval.task=none", *METHODS[name])
    assert run(wanted, tmp_path / "run", 3) == [0] * 3
    plan = figures.build(wanted, recipes.algorithm(wanted.algorithm).Config(), ranks=3)

    parties = federate(wanted.data, wanted.clients, wanted.seed)
    rows = [row for client in parties.clients for row in client.train]
    lengths = [len(example.input_ids) for example in tokenize(rows, load_tokenizer(wanted.model), wanted.data)[0]]
    shapes = same_for_all(load_shapes(wanted.model), wanted.peft).client
    up, down = [plan.up_most_bytes] * 2, [plan.down_most_bytes] * 2
    if plan.down_moved_bytes:
        up[1], down[1] = plan.up_odd_bytes, plan.down_moved_bytes[0]
        assert down[1] == plan.up_bytes < plan.down_bytes == up[0] + up[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for line in (line for line in lines if "event" not in line):
        with only(trained(shapes), aggregation.trained(trained(shapes), wanted.aggregation.rule, line["round"])):
            flops = costs.step_of(shapes, 1, 8).work.of(lengths)
        assert line["up_bytes"] == 3 * up[line["round"]]
        assert line["down_bytes"] == 2 * down[line["round"]]  # a copy for each rank that hosts clients
        assert (line["tokens"], line["flops"]) == (sum(lengths), flops)


@pytest.mark.parametrize("name", ["fedot", "fedbiot"])
def test_the_plan_of_offsite_tuning_is_its_ledger(name: str, deep_folder: Path, tmp_path: Path) -> None:
    """Down go the LoRA of adapter and emulator, or of the adapter, up that of the adapter; the emulator goes once."""
    asked = [f"--algorithm={name}", f"--model.path={deep_folder}", "--rounds=1", "--clients=3", "--data.num_rows=30"]
    few = ["--data.max_length=128", "--offsite.prealign_steps=1", "--offsite.align_steps=1", "--offsite.align_batch_size=2"]
    wanted = recipe(*asked, *few, "--train.epochs=1", "--train.batch_size=4", "--eval.task=none", "--eval.batch_size=256")
    assert run(wanted, tmp_path / "run", 3) == [0] * 3
    module = recipes.algorithm(name)
    plan = figures.build(wanted, module.Config(), ranks=3)
    client = module.outline(module.Config(), load_shapes(wanted.model), wanted).client

    parties = federate(wanted.data, wanted.clients, wanted.seed)
    rows = [row for each in parties.clients for row in each.train]
    lengths = [len(example.input_ids) for example in tokenize(rows, load_tokenizer(wanted.model), wanted.data)[0]]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    (told,) = (line for line in lines if "event" not in line)
    assert (told["up_bytes"], told["down_bytes"]) == (3 * plan.up_bytes, 2 * plan.down_bytes)
    assert (told["tokens"], told["flops"]) == (sum(lengths), costs.step_of(client, 1, 8).work.of(lengths))
    files = sum((tmp_path / "run" / "emulator" / file).stat().st_size for file in ("tokenizer.json", "tokenizer_config.json"))
    assert lines[0]["supply_bytes"] == 2 * (plan.once_bytes + files)


@pytest.mark.parametrize("builder", ["uniform", "thin", "distilled"])
def test_the_plan_of_alignment_is_its_ledger(builder: str, deep_folder: Path, tmp_path: Path) -> None:
    """Texts are all longer than what is read of them, so that the most is what there is."""
    asked = ["--algorithm=fedbiot", f"--model.path={deep_folder}", "--rounds=1", "--clients=1", "--data.num_rows=8"]
    few = ["--data.max_length=40", "--offsite.prealign_steps=2", "--offsite.align_steps=3", "--offsite.align_batch_size=2"]
    wanted = recipe(*asked, *few, f"--offsite.builder={builder}", "--train.steps=1", "--eval.task=none", "--eval_every=0")
    assert run(wanted, tmp_path / "run") == [0]
    plan = figures.build(wanted, recipes.algorithm("fedbiot").Config())
    (told,) = (line for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "event" not in line)
    assert (told["align_tokens"], told["align_flops"]) == (3 * 2 * 40, plan.align_flops)
    report = json.loads((tmp_path / "run" / "summary.json").read_text())["emulator"]
    assert (report["align_tokens"], report["align_flops"]) == (2 * 2 * 40, plan.prealign_flops)
    assert 0 < report["disclosed"] < 1 and 0 < report["after"]["relative"] < report["before"]["relative"]
