"""Every rule, optimisers and unequal ranks: the same bytes from every placement and after a stop, exact where the paper says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedmpi import data, export, models
from fedmpi.hosting.base import Base
from fedmpi.hosting.host import Host
from tests.lockstep.ranks import STOPS, adapter, recipe, run

FAST = ("rolora", "flexlora", "unequal ranks, fedex", "flora", "krum", "adam")  # the others in the long tier
EXACT = ("ffa", "rolora", "fedex", "flora")
CHOICES = {
    "ffa": ["--aggregation.rule=ffa"],
    "rolora": ["--aggregation.rule=rolora"],
    "fedex": ["--aggregation.rule=fedex"],
    "flora": ["--aggregation.rule=flora"],
    "flexlora": ["--aggregation.rule=flexlora"],
    "unequal ranks": ["--peft.client_ranks=8,2,4"],
    "unequal ranks, fedex": ["--peft.client_ranks=8,2,4", "--aggregation.rule=fedex"],
    "unequal ranks, flora": ["--peft.client_ranks=8,2,4", "--aggregation.rule=flora"],
    "krum": ["--aggregation.robust=multi_krum", "--aggregation.mixing=true", "--weights=equal"],
    "centred clipping": ["--aggregation.robust=centred_clipping", "--weights=equal", "--aggregation.rule=ffa"],
    "adam": ["--server_optimizer=adam", "--server.lr=0.01", "--aggregation.most_norm=adaptive"],
    "avgm": ["--server_optimizer=avgm", "--aggregation.rule=rolora"],
}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if "event" not in line]


def results(folder: Path) -> tuple[bytes, bytes]:
    delta = folder / "adapter" / "base_delta.safetensors"
    return adapter(folder), delta.read_bytes() if delta.exists() else b""


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES])
def test_every_placement_and_a_stop_give_the_same_bytes(settings: list[str], tmp_path: Path, name: str) -> None:
    """With 3 of 9 clients in a round, every rank misses some: what was folded meanwhile must reach it."""
    wanted = recipe(*settings, *CHOICES[name], "--clients_per_round=3", STOPS)
    assert run(wanted, tmp_path / "1") == [0]
    assert run(wanted, tmp_path / "parts", 2, stop_rank=1, stop_turn=4) == [75, 75]
    assert run(wanted, tmp_path / "parts", 5) == [0] * 5
    expected = results(tmp_path / "1")
    assert results(tmp_path / "parts") == expected
    assert bool(expected[1]) == (wanted.aggregation.rule in ("fedex", "flora"))
    one, many = lines_of(tmp_path / "1"), lines_of(tmp_path / "parts")
    for key in ("eval_loss", "aggregation_error"):
        assert [line[key] for line in one] == [line[key] for line in many]
    errors = [line["aggregation_error"] for line in one]
    if wanted.aggregation.rule in EXACT and wanted.aggregation.robust == wanted.server_optimizer == "none":
        assert max(errors) < 1e-6
    else:
        assert max(errors) > 1e-6
    assert one[-1]["eval_loss"] < json.loads((tmp_path / "1" / "summary.json").read_text())["base"]["eval_loss"]


@pytest.mark.parametrize("rule", ["fedex", pytest.param("flora", marks=pytest.mark.slow)])
def test_the_merged_model_says_what_the_run_measured(settings: list[str], tmp_path: Path, rule: str) -> None:
    """What rounds folded into the base and the adapter after them: both are in the exported weights."""
    wanted = recipe(*settings, f"--aggregation.rule={rule}", "--rounds=2", "--train.lr=0.05", "--eval.task=none")
    assert run(wanted, tmp_path / "run") == [0]
    assert export.main([str(tmp_path / "run"), "--merge"]) == 0
    parties = data.federate(wanted.data, wanted.clients, wanted.seed)
    measured = [line["eval_loss"] for line in lines_of(tmp_path / "run")][-1]
    for folder, close in ((tmp_path / "run" / "merged", True), (Path(wanted.model.path), False)):
        base = Base(models.Config(path=str(folder)), wanted.peft, "cpu", 0)
        loss = Host(base, parties, wanted.data, wanted.train, wanted.eval).score(None)["eval_loss"]
        assert (abs(loss - measured) < 1e-4) == close
