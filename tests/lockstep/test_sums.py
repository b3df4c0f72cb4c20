"""Updates that are added up on their way: the same bytes as the star, whoever adds; what must see single updates is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from fedmpi.errors import ConfigError
from fedmpi.tensors import num_bytes
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_failures import Fails

NOT_RECORDED = "--aggregation.record_error=false"
HOOK = "--train.hooks=[tests.lockstep.test_failures.Fails]"


@pytest.fixture(autouse=True)
def anew() -> None:
    Fails.turns, Fails.seen = set(), []


@pytest.fixture(scope="module")
def star(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of one process, where nothing travels."""
    folder = tmp_path_factory.mktemp("star")
    assert run(recipe(*plain(model_folder)), folder) == [0]
    return adapter(folder)


def plain(model_folder: Path) -> list[str]:
    """More clients than ranks, unequal, sampled."""
    train = [
        "--train.steps=1",
        "--train.batch_size=2",
        "--train.lr=0.01",
        "--peft.dropout=0.1",
        "--eval_every=0",
        "--eval.task=none",
    ]
    clients = ["--clients=9", "--clients_per_round=5", "--data.num_rows=120", "--data.splitter=dirichlet", "--data.max_length=64"]
    return [f"--model.path={model_folder}", "--rounds=3", NOT_RECORDED, *clients, *train]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line for line in lines if "event" not in line]


@pytest.mark.parametrize("way", ["sums", "collective"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_way_and_placement_gives_the_bytes_of_the_star(
    model_folder: Path, tmp_path: Path, star: bytes, way: str, size: int
) -> None:
    assert run(recipe(*plain(model_folder), f"--exchange={way}"), tmp_path, size) == [0] * size
    assert adapter(tmp_path) == star
    line = lines_of(tmp_path)[1]
    assert len(line["weights"]) == len(line["client_losses"]) == 5  # figures of each client are known
    if size > 1:
        updates_bytes = num_bytes(load(star))
        ranks = size - 1 if way == "collective" else len({client % (size - 1) for client in line["counted"]})
        assert line["up_bytes"] == 2 * updates_bytes * ranks


def test_surplus_ranks_take_part_in_collectives(model_folder: Path, tmp_path: Path) -> None:
    few = [*plain(model_folder), "--clients=2", "--clients_per_round=2", "--data.num_rows=40", "--rounds=1"]
    for size, way in ((1, "star"), (4, "collective")):
        assert run(recipe(*few, f"--exchange={way}"), tmp_path / way, size) == [0] * size
    assert adapter(tmp_path / "star") == adapter(tmp_path / "collective")


def test_a_stopped_run_may_go_on_by_another_way(model_folder: Path, tmp_path: Path, star: bytes) -> None:
    wanted = [*plain(model_folder), STOPS]
    assert run(recipe(*wanted, "--exchange=sums"), tmp_path, 3, stop_rank=2, stop_turn=6) == [75] * 3
    assert run(recipe(*wanted, "--exchange=collective"), tmp_path, 2) == [0] * 2
    assert adapter(tmp_path) == star


@pytest.mark.parametrize("way", ["sums", "collective"])
def test_a_client_that_fails_is_left_out_and_too_few_repeat_the_round(model_folder: Path, tmp_path: Path, way: str) -> None:
    """One rank, so that turns come in one order: the third turn fails, then all of a round."""
    wanted = [*plain(model_folder), HOOK, "--min_clients=2"]
    for folder, size, exchange in (("star", 2, "star"), (way, 2, way)):
        Fails.turns, Fails.seen = {2, *range(6, 11)}, []
        assert run(recipe(*wanted, f"--exchange={exchange}"), tmp_path / folder, size) == [0] * size
    assert adapter(tmp_path / "star") == adapter(tmp_path / way)
    told = [[(line["counted"], line["failures"], line["attempt"]) for line in lines_of(tmp_path / name)] for name in ("star", way)]
    assert told[0] == told[1]
    assert any(failures for _, failures, _ in told[0]) and any(attempt for _, _, attempt in told[0])


@pytest.mark.parametrize("way", ["sums", "collective"])
def test_a_rank_checks_an_update_before_it_adds_it(model_folder: Path, tmp_path: Path, way: str) -> None:
    wanted = [*plain(model_folder), "--rounds=1", "--aggregation.most_norm=1e-6", "--on_quorum_lost=stop", f"--exchange={way}"]
    assert run(recipe(*wanted), tmp_path, 3) == [1] * 3
    event = next(json.loads(line) for line in (tmp_path / "metrics.jsonl").open() if "quorum_lost" in line)
    assert "aggregation.most_norm allows" in event["message"]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["--aggregation.record_error=true"], "aggregation.record_error true"),
        (["--aggregation.rule=fedex"], "aggregation.rule fedex"),
        (["--aggregation.rule=flexlora"], "aggregation.rule flexlora"),
        (["--aggregation.robust=median", "--weights=equal"], "aggregation.robust median"),
        (["--aggregation.most_norm=adaptive"], "aggregation.most_norm adaptive"),
        (["--peft.client_ranks=[4,8]"], "peft.client_ranks 4,8"),
        (["--codec=int8"], "codec_up int8"),
        (["--codec_up=bf16"], "codec_up bf16"),
        (["--algorithm=scaffold"], "algorithm scaffold"),
        (["--ranks_per_client=2", "--train.engine=ddp"], "a client of several ranks"),
    ],
)
def test_what_must_see_single_updates_is_refused_by_name(given: list[str], key: str) -> None:
    for way in ("sums", "collective"):
        with pytest.raises(ConfigError, match=f"exchange {way} adds updates up on their way, {key}.* must see each"):
            recipe(NOT_RECORDED, *given, f"--exchange={way}")
    assert recipe(NOT_RECORDED, *given, "--exchange=auto").exchange == "auto"


def test_a_collective_broadcasts_values_as_they_are() -> None:
    assert recipe(NOT_RECORDED, "--codec_down=bf16", "--exchange=sums").exchange == "sums"
    with pytest.raises(ConfigError, match="leave codec_down bf16 out"):
        recipe(NOT_RECORDED, "--codec_down=bf16", "--exchange=collective")


@pytest.mark.parametrize(("size", "way"), [(2, "sums"), (6, "star")])
def test_auto_says_what_it_takes_and_why(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], size: int, way: str
) -> None:
    assert run(recipe(*plain(model_folder), "--rounds=1", "--exchange=auto"), tmp_path, size) == [0] * size
    told = [line for line in capfd.readouterr().out.splitlines() if "exchange auto" in line]
    assert len(told) == 1 and f"exchange auto is {way}: a round's 5 updates take 20 bytes a parameter" in told[0]


def test_auto_says_what_keeps_it_from_summing(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = [argument for argument in plain(model_folder) if argument != NOT_RECORDED]
    assert run(recipe(*wanted, "--rounds=1", "--exchange=auto"), tmp_path, 2) == [0] * 2
    assert "exchange auto is star: aggregation.record_error true must see single updates" in capfd.readouterr().out
