"""What stands in examples/ runs as a user would run it: a hook and an algorithm of one's own. With it, what robust rules bear."""

import json
from pathlib import Path

import pytest

from fedmpi.errors import ConfigError
from fedmpi.run import Program
from fedmpi.settings.recipe import read
from fedmpi.stop import Stop
from fedmpi.world import World
from tests.lockstep import ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
ATTACKS = ("sign_flip", "inner_product", "alie", "noise", "label_poison")
TASK = ["--clients=8", "--clients_per_round=8", "--data.splitter=iid", "--weights=equal", "--train.lr=0.03", "--eval.task=none"]


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def loss(settings: list[str], folder: Path, attack: str, *more: str) -> float:
    """The held-out loss of a run with two hostile clients of eight."""
    arguments = [*settings, *TASK, "--algorithm=hostile", f"--hostile.attack={attack}", f"--run_dir={folder}", *more]
    world = World(launcher="none", rank=0, size=1, local_rank=0, local_size=1, transport="none")
    assert Program(*read(arguments, "test", ""), world, Stop(), None).run() == 0
    return float(json.loads((folder / "summary.json").read_text())["final"]["eval_loss"])


def test_a_hook_of_ones_own(settings: list[str], tmp_path: Path) -> None:
    for size in (1, 3):
        wanted = ranks.recipe(*settings, "--rounds=2", "--train.hooks=noise.Noise")
        assert ranks.run(wanted, tmp_path / str(size), size) == [0] * size
    ranks.run(ranks.recipe(*settings, "--rounds=2"), tmp_path / "plain")
    assert ranks.adapter(tmp_path / "1") == ranks.adapter(tmp_path / "3") != ranks.adapter(tmp_path / "plain")


def test_an_algorithm_of_ones_own(settings: list[str], tmp_path: Path) -> None:
    wanted = ranks.recipe(*settings, "--rounds=2", "--algorithm=hostile")
    for size in (1, 3):
        assert ranks.run(wanted, tmp_path / str(size), size) == [0] * size
    assert ranks.adapter(tmp_path / "1") == ranks.adapter(tmp_path / "3")


def test_its_settings_are_options(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"hostile\.attack"):
        read([*settings, "--algorithm=hostile", "--hostile.attack=bribe"], "test", "")


def test_robust_rules_keep_a_quarter_of_hostile_clients_from_doing_harm(settings: list[str], tmp_path: Path) -> None:
    """Of what a clean run gains in held-out loss, nine tenths are kept under every attack; one takes it all from the plain mean."""
    clean = loss(settings, tmp_path / "clean", "none")
    gain = json.loads((tmp_path / "clean" / "summary.json").read_text())["base"]["eval_loss"] - clean
    assert gain > 0.05
    for attack in ATTACKS:
        robust = ["--aggregation.robust=trimmed_mean", "--aggregation.mixing=true"]
        assert loss(settings, tmp_path / attack, attack, *robust) - clean < 0.1 * gain, attack
    assert loss(settings, tmp_path / "mean", "inner_product") - clean > 0.9 * gain
