"""Federations under codec chains: the same bytes in every placement and after a kill, truth on both sides, residuals that count."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from fedmpi.errors import ConfigError
from fedmpi.tensors import num_bytes
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_failures import Fails

CHAINS = ("bf16", "delta,int8,ef,zstd", "delta,topk:0.1,int4:stochastic,ef,zstd")
HOOK = "--train.hooks=[tests.lockstep.test_failures.Fails]"


@pytest.fixture(autouse=True)
def anew() -> None:
    Fails.turns, Fails.seen = set(), []


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [line for line in lines if "event" not in line]


@pytest.mark.parametrize("chain", CHAINS)
def test_every_placement_gives_the_same_bytes(settings: list[str], tmp_path: Path, chain: str) -> None:
    for size in (1, 3):
        assert run(recipe(*settings, f"--codec={chain}", "--rounds=3"), tmp_path / str(size), size) == [0] * size
    assert adapter(tmp_path / "1") == adapter(tmp_path / "3")
    second = lines_of(tmp_path / "3")[1]
    raw_bytes = num_bytes(load(adapter(tmp_path / "1"))) * len(second["counted"])
    assert 0 < second["up_bytes"] < 0.6 * raw_bytes
    assert [line["up_bytes"] for line in lines_of(tmp_path / "1")] == [line["up_bytes"] for line in lines_of(tmp_path / "3")]


def test_a_resumed_run_ends_in_the_same_bytes(settings: list[str], tmp_path: Path) -> None:
    wanted = recipe(*settings, "--codec=delta,int4,ef,zstd", STOPS)
    assert run(wanted, tmp_path / "whole") == [0]
    assert run(wanted, tmp_path / "parts", 3, stop_rank=1, stop_turn=6) == [75] * 3
    assert run(wanted, tmp_path / "parts", 2) == [0] * 2
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "parts")


def test_a_lossless_chain_changes_no_byte(settings: list[str], tmp_path: Path) -> None:
    assert run(recipe(*settings, "--codec=shuffle,zstd"), tmp_path / "packed", 3) == [0] * 3
    assert run(recipe(*settings), tmp_path / "raw") == [0]
    assert adapter(tmp_path / "packed") == adapter(tmp_path / "raw")
    assert lines_of(tmp_path / "packed")[1]["up_bytes"] < lines_of(tmp_path / "raw")[1]["up_bytes"]


def test_a_residual_whose_update_did_not_count_is_rolled_back(settings: list[str], tmp_path: Path) -> None:
    """A round that is repeated with the same cohort finds the clients as they were: failing or not, the run ends alike."""
    every = [*settings, "--clients_per_round=9", "--min_clients=9", "--codec_up=delta,int4,ef", HOOK, "--peft.dropout=0"]
    Fails.turns = {9 + 4}
    assert run(recipe(*every), tmp_path / "repeated") == [0]
    repeated = lines_of(tmp_path / "repeated")
    assert [line["attempt"] for line in repeated] == [0, 1, 0, 0]
    assert repeated[1]["counted"] == list(range(9))


def test_each_tensor_group_has_its_own_chain(settings: list[str], tmp_path: Path) -> None:
    """SCAFFOLD's control variates are coded apart from the adapter, alike in every placement, and the bytes say so."""
    every = [*settings, "--algorithm=scaffold", "--rounds=2", "--codec_down=bf16"]
    for size in (1, 3):
        wanted = recipe(*every, "--codec_up=delta,int8,ef; control=topk:0.1,bf16")
        assert run(wanted, tmp_path / str(size), size) == [0] * size
    assert adapter(tmp_path / "1") == adapter(tmp_path / "3")
    assert run(recipe(*every, "--codec_up=delta,int8,ef"), tmp_path / "alike") == [0]
    apart, alike = (lines_of(tmp_path / name)[0] for name in ("1", "alike"))
    assert apart["up_bytes"] < 0.75 * alike["up_bytes"]


def test_a_group_that_is_not_sent_is_named(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="control is no tensor group that algorithm fedavg sends up; it has none"):
        recipe(*settings, "--codec_up=int8; control=int4")


def test_impossible_chains_are_refused_before_anything_is_loaded(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="codec_up 'int8,int4'"):
        recipe(*settings, "--codec_up=int8,int4")


def test_rules_see_what_was_decoded(settings: list[str], tmp_path: Path) -> None:
    """The recorded error is that of the rule on decoded updates, so that the codec's own loss is not counted as the rule's."""
    assert run(recipe(*settings, "--codec=int8", "--aggregation.rule=flexlora", "--rounds=2"), tmp_path, 3) == [0] * 3
    assert all(line["aggregation_error"] < 1 for line in lines_of(tmp_path))
