"""Federations under codec chains: the same bytes in every placement and after a kill, truth on both sides, residuals that count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from fedmpi.codecs import parse
from fedmpi.errors import ProtocolError
from fedmpi.federation import coding
from fedmpi.federation.coding import Downlink, decode, encode, fingerprint
from fedmpi.manifest import manifest_of
from fedmpi.round import Round, Verdict
from fedmpi.tensors import Tensors, num_bytes
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_failures import Fails

CHAINS = ("bf16", "delta,int8,ef,zstd", "delta,topk:0.1,int4:stochastic,ef,zstd")
HOOK = "--train.hooks=[tests.lockstep.test_failures.Fails]"


@pytest.fixture(autouse=True)
def anew() -> None:
    Fails.turns, Fails.seen = set(), []


def some(seed: int, num: int = 700) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num, 3, generator=generator) for name in ("b", "a")}


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


def test_what_is_lost_is_sent_later() -> None:
    """With error feedback the sum of all that was decoded stays near the sum of all that was meant; without it drifts away."""
    meant, told, told_without = torch.zeros(700, 3), torch.zeros(700, 3), torch.zeros(700, 3)
    lost: Tensors = {}
    for seed in range(40):
        now = {"a": torch.full((700, 3), 0.01) + 0.05 * torch.randn(700, 3, generator=torch.Generator().manual_seed(seed))}
        coded = encode(parse("topk:0.05,int4,ef"), now, 0, {}, lost)
        told_without += encode(parse("topk:0.05,int4"), now, 0, {}, {}).tensors["a"]
        lost = coded.lost
        meant, told = meant + now["a"], told + coded.tensors["a"]
    assert torch.allclose(meant - told, lost["a"], atol=1e-4)
    assert (meant - told).norm() < 0.6 * (meant - told_without).norm()


def test_both_sides_have_the_same_bits() -> None:
    before, now = some(1), {name: tensor + 0.01 for name, tensor in some(1).items()}
    chain = parse("delta,int4:stochastic,zstd")
    coded = encode(chain, now, 7, before, {})
    there = decode(chain, memoryview(coded.body), manifest_of(now), before, coded.against)
    assert fingerprint(there) == fingerprint(coded.tensors) != fingerprint(now)
    assert len(coded.body) < num_bytes(now) / 4
    assert len(coded.body) <= coding.most_bytes(chain, manifest_of(now))


def test_a_difference_from_another_state_is_refused() -> None:
    coded = encode(parse("delta,int8"), some(1), 0, some(2), {})
    with pytest.raises(ProtocolError, match="cannot be used"):
        decode(parse("delta,int8"), memoryview(coded.body), manifest_of(some(1)), some(3), coded.against)


@pytest.mark.parametrize("cut", [0, 3, 40, -1])
def test_messages_that_lie_about_their_chunks_are_refused(cut: int) -> None:
    coded = encode(parse("int8"), some(1), 0, {}, {})
    for body in (coded.body[:cut], coded.body + b"more", b"\xff" * 9 + coded.body[9:]):
        with pytest.raises(ProtocolError):
            decode(parse("int8"), memoryview(body), manifest_of(some(1)), {}, 0)


def test_who_missed_a_broadcast_gets_the_values_as_they_are() -> None:
    link = Downlink(parse("delta,int8"))

    def rnd(index: int, verdict: Verdict = Verdict.COUNTED) -> Round:
        return Round(index=index, attempt=0, cohort=(0,), seed=index, scale=1, num_clients=3, verdict=verdict)

    first = link.encode(some(1), rnd(0))
    assert link.readers([1, 2]) == set()  # nobody holds anything yet
    link.settle(rnd(1))
    second = link.encode(some(2), rnd(1))
    assert second.against == fingerprint(first.tensors) and link.readers([1]) == {1}
    link.settle(rnd(2))
    link.encode(some(3), rnd(2))
    assert link.readers([1, 2]) == {1}  # 2 still holds the first
    link.settle(rnd(3, Verdict.REPEAT))
    again = link.encode(some(3), rnd(2))
    assert again.against == fingerprint(second.tensors) and link.readers([1, 2]) == set()  # they hold what did not count


def test_impossible_chains_are_refused_before_anything_is_loaded(settings: list[str]) -> None:
    from fedmpi.errors import ConfigError

    with pytest.raises(ConfigError, match="codec_up 'int8,int4'"):
        recipe(*settings, "--codec_up=int8,int4")


def test_rules_see_what_was_decoded(settings: list[str], tmp_path: Path) -> None:
    """The recorded error is that of the rule on decoded updates, so that the codec's own loss is not counted as the rule's."""
    assert run(recipe(*settings, "--codec=int8", "--aggregation.rule=flexlora", "--rounds=2"), tmp_path, 3) == [0] * 3
    assert all(line["aggregation_error"] < 1 for line in lines_of(tmp_path))
