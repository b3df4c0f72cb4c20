"""FSDP and DeepSpeed inside a client of two ranks, on CPUs: they give the steps of one rank with twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from inner_world_member import LAUNCHER, train
from test_inner_world import finish

from fedmpi.errors import ConfigError, TrainingError
from fedmpi.training import Config, Hook, check, fit, zero

pytest.importorskip("deepspeed", reason="no deepspeed here: pip install 'fedmpi[deepspeed]'")
MEMBER = Path(__file__).with_name("engine_member.py")
ADAMW = {"optimizer": "adamw", "lr": 0.01}
TURNS = [
    {"zero_stage": 1},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"zero_stage": 2, "zero_offload": True} | ADAMW,
    {"zero_stage": 3, "zero_offload": True} | ADAMW,
    {"zero_stage": 3, "BREAKS": True},
    {"zero_stage": 3, "clip_norm": 0.05},
    {"zero_stage": 3, "LAYERS": 2, "precision": "bf16", "checkpointing": True} | ADAMW,
    {"zero_stage": 2, "BREAKS": True},
    {"epochs": 1},
    {"engine": "fsdp"},
    {"engine": "fsdp", "BREAKS": True},
    {"engine": "fsdp", "clip_norm": 0.05} | ADAMW,
    {"engine": "fsdp", "LAYERS": 2, "precision": "bf16", "checkpointing": True} | ADAMW,
    {"engine": "fsdp", "epochs": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two members left who took all these turns one after another."""
    path = tmp_path_factory.mktemp("engines")
    environment = os.environ | LAUNCHER | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(MEMBER.parents[2])}
    turns = json.dumps([{"engine": "deepspeed", **turn} for turn in TURNS])
    command = [sys.executable, str(MEMBER), str(path)]
    finish([
        subprocess.Popen([*command, str(rank), turns], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ])  # fmt: skip
    return path


def said(folder: Path, turn: int) -> dict[str, object]:
    first, second = (json.loads((folder / f"{turn}.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    return first


@pytest.mark.parametrize("turn", [n for n, settings in enumerate(TURNS) if "BREAKS" not in settings])
def test_two_ranks_are_one_with_twice_the_batch(folder: Path, turn: int) -> None:
    """In fp32 with SGD within 1e-5; with AdamW the loss within 1e-4. In bf16 two halves of a batch are rounded apart."""
    settings = {key: value for key, value in TURNS[turn].items() if not key.startswith(("zero", "engine"))}
    alone, counts = train("client", 3, 2, dict(settings))
    first = said(folder, turn)
    for key in ("tokens", "supervised", "steps"):
        assert first[key] == counts[key]
    loss = 2e-3 if "precision" in settings else 1e-4 if "optimizer" in settings else 1e-5
    assert first["loss"] == pytest.approx(counts["loss"], abs=loss)
    assert first["last_loss"] == pytest.approx(counts["last_loss"], abs=loss)
    both = [torch.load(folder / f"{turn}.{rank}.weights", weights_only=True) for rank in range(2)]
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(both[0][name], both[1][name]) and both[0][name].shape == parameter.shape
            if "precision" not in settings:
                torch.testing.assert_close(
                    both[0][name], parameter.detach(), rtol=0, atol=1e-4 if "optimizer" in settings else 1e-5
                )


@pytest.mark.parametrize("turn", [n for n, settings in enumerate(TURNS) if "BREAKS" in settings])
def test_a_broken_turn_leaves_an_ordinary_model_and_the_next_generation(folder: Path, turn: int) -> None:
    broken = said(folder, turn)
    assert broken["fault"] == "rank 1: this member broke"
    assert broken["generation"] == sum("BREAKS" in settings for settings in TURNS[: turn + 1])
    assert broken["frozen_as_before"] and broken["clean"]


class Loses(Hook):
    """What an engine would do that forgot to gather: a tensor is empty, or is one rank's part."""

    def __init__(self, kept: int):
        self.kept = kept

    def after_step(self, step):
        parameter = next(p for p in step.model.parameters() if p.requires_grad)
        parameter.data = parameter.data.flatten()[: self.kept]


@pytest.mark.parametrize("kept", [0, 7])
def test_an_empty_or_partial_tensor_is_never_sent(kept: int) -> None:
    from inner_world_member import rows, small_model

    with pytest.raises(TrainingError, match=rf"mix.weight is \({kept},\) after training, expected \(48, 64\): it was not gathered"):
        fit(small_model(), rows(4), Config(steps=1, batch_size=2), seed=0, pad_id=0, hooks=[Loses(kept)])


def test_a_hook_that_changes_gradients_is_refused() -> None:
    from fedmpi.training.deepspeed import Zero
    from fedmpi.training.fsdp import Sharded

    class Adds(Hook):
        def after_backward(self, step):
            """Would add to gradients that are not there."""

    for engine, name in ((Zero(SimpleNamespace(), None, None), "deepspeed"), (Sharded(SimpleNamespace(), None, None), "fsdp")):
        engine.admit([Hook()])
        with pytest.raises(TrainingError, match=f"train.engine {name} keeps gradients to itself, but Adds changes them: use ddp"):
            engine.admit([Hook(), Adds()])


def config(file: Path, content: object, **settings: object) -> Config:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return Config(engine="deepspeed", deepspeed=str(file), batch_size=4, accumulation=2, **settings)


def test_a_file_adds_to_the_recipe(tmp_path: Path) -> None:
    content = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "train_batch_size": 24,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "steps_per_print": 7,
    }
    wanted = config(tmp_path / "file.json", content)
    check(wanted)
    merged = zero.settings(wanted, 3)
    assert merged["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert (merged["steps_per_print"], merged["gradient_accumulation_steps"], merged["gradient_clipping"]) == (7, 2, 1.0)
    assert zero.settings(Config(engine="deepspeed"), 2)["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("content", "settings", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, {}, ["train_micro_batch_size_per_gpu is 8", "train.batch_size is 4"]),
        ({"gradient_accumulation_steps": 1}, {}, ["gradient_accumulation_steps is 1", "train.accumulation is 2"]),
        ({"train_batch_size": 15}, {}, ["train_batch_size is 15"]),
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping is 0.5", "train.clip_norm is 1.0"]),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 3}, ["zero_optimization.stage is 2", "train.zero_stage is 3"]),
        ({"zero_optimization": {"stage": 0}}, {}, ["zero_optimization.stage is 0", "1, 2 or 3"]),
        ({"zero_optimization": 3}, {}, ["zero_optimization is 3", "object"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {"zero_offload": True},
            ["offload_optimizer.device is 'nvme'", "train.zero_offload"],
        ),
        ({"optimizer": {"type": "Adam"}}, {}, ["optimizer belongs to the recipe", "train.optimizer"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16 belongs to the recipe", "train.precision"]),
        ("{", {}, ["cannot be read as JSON"]),
        ("[]", {}, ["expected a JSON object"]),
    ],
)
def test_a_file_that_contradicts_the_recipe_names_the_key(content, settings, words, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config(tmp_path / "file.json", content, **settings))
    assert str(caught.value).startswith(f"train.deepspeed {tmp_path / 'file.json'}")
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_would_share_out_a_quantised_base_is_refused(tmp_path: Path) -> None:
    wanted = config(tmp_path / "file.json", {"zero_optimization": {"stage": 3}})
    check(wanted)
    with pytest.raises(
        ConfigError, match=r"zero_optimization.stage 3 shares out the base.*model.quantization nf4: give stage 1 or 2"
    ):
        check(wanted, "nf4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "plain", "zero_stage": 1}, "train.zero_stage is 1; allowed is nothing with train.engine plain"),
        ({"engine": "ddp", "deepspeed": "x.json"}, "train.deepspeed is 'x.json'; allowed is nothing with train.engine ddp"),
        ({"engine": "deepspeed", "zero_stage": 4}, "train.zero_stage is 4; allowed is 1, 2 or 3"),
        ({"engine": "deepspeed", "precision": "fp16"}, "train.precision is 'fp16'; allowed is fp32 or bf16"),
        ({"engine": "fsdp", "precision": "half"}, "train.precision is 'half'; allowed is fp32 or bf16 with train.engine fsdp"),
        ({"engine": "fsdp", "optimizer_state": "keep"}, "train.optimizer_state is 'keep'; allowed is fresh with train.engine fsdp"),
        ({"engine": "fsdp", "zero_stage": 2}, "train.zero_stage is 2; allowed is nothing with train.engine fsdp"),
        ({"engine": "deepspeed", "optimizer_state": "keep"}, "train.optimizer_state is 'keep'; allowed is fresh"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**settings)
    assert words in str(caught.value)
