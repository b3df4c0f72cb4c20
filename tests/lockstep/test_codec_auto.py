"""--codec auto: the choice from figures, measured over links, kept by the run that made it, and equal to the chain it names."""

import json
from pathlib import Path

import pytest
import yaml

from fedmpi.codecs import RAW, choice
from fedmpi.codecs.choice import CANDIDATES, Cost, Way, best, exposed, within
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.federation import probe
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_sums import plain

FAST, SLOW = Way(0.0, 1e-12, 4), Way(0.0, 8e-6 / 100, 4)
COSTS = {RAW: Cost(0, 0, 4.0), "bf16": Cost(1e-9, 1e-9, 2.0), "int8": Cost(3e-9, 3e-9, 1.02)}


def test_the_least_exposed_time_wins_and_raw_where_coding_costs_more() -> None:
    assert best(4 << 20, COSTS, SLOW, SLOW)[0] == "int8"
    assert best(4 << 20, COSTS, FAST, FAST)[0] == RAW
    assert exposed(10, Cost(1.0, 2.0, 3.0), Way(5.0, 0.1, 2), Way(7.0, 0.1, 4)) == 10 * 3 + 5 + 6 + 10 * (1 + 8) + 7 + 12


def test_what_is_hardly_better_than_raw_is_not_chosen() -> None:
    costs = {RAW: Cost(0, 0, 4.0), "bf16": Cost(0, 0, 3.95)}
    assert best(1000, costs, SLOW, SLOW)[0] == RAW


def test_candidates_keep_to_the_budget_and_to_their_documented_bounds() -> None:
    assert within(0.0) == (RAW, "shuffle,zstd") and "int8" in within(0.004) and "delta,int4,ef" not in within(0.004)
    import torch

    from fedmpi.codecs import parse
    from fedmpi.codecs.coder import Coder

    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    for one in CANDIDATES:
        coder = Coder(parse(one.chain))
        lost = (coder.decode(coder.encode(values), len(values)) - values).abs().max() / values.abs().max()
        assert lost <= one.bound * 1.001, one


def test_a_round_waits_for_the_slowest_rank() -> None:
    assert choice.slowest([{"a": Cost(1, 5, 2)}, {"a": Cost(3, 4, 2)}]) == {"a": Cost(3, 5, 2)}


def test_measured_over_links_written_down_and_kept(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The links here are memory, so the choice is made for them: what matters is that everybody goes by it, and keeps to it."""
    monkeypatch.setattr(choice, "best", lambda num, costs, down, up: ("int8", dict.fromkeys(costs, 1.0)))
    wanted = [*plain(model_folder), "--codec=auto", STOPS]
    assert run(recipe(*wanted), tmp_path / "auto", 3, stop_rank=1, stop_turn=5) == [75] * 3
    assert "codec auto is int8: ms that" in capfd.readouterr().out
    monkeypatch.setattr(choice, "best", lambda num, costs, down, up: (RAW, dict.fromkeys(costs, 1.0)))
    assert run(recipe(*wanted), tmp_path / "auto", 2) == [0] * 2
    assert "codec auto is int8: as this run began" in capfd.readouterr().out
    assert json.loads((tmp_path / "auto" / "record.json").read_text())["codec"]["reason"].startswith("ms that")
    manifests = list((tmp_path / "auto" / "checkpoints").glob("round-*/manifest.json"))
    assert manifests and all(json.loads(one.read_text())["record"]["codec_chosen"] == "int8" for one in manifests)
    settings = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert (settings["codec"], settings["codec_chosen"]) == ("auto", "int8")
    assert run(recipe(*wanted, "--codec=int8"), tmp_path / "named") == [0]
    assert adapter(tmp_path / "auto") == adapter(tmp_path / "named")
    again = recipe(f"--config={tmp_path / 'auto' / 'config.yaml'}")
    assert run(again, tmp_path / "again") == [0]
    assert adapter(tmp_path / "again") == adapter(tmp_path / "auto")
    with pytest.raises(ConfigError, match="codec_chosen bf16: the run in .* began with int8"):
        run(recipe(*wanted, "--codec_chosen=bf16"), tmp_path / "auto")
    (tmp_path / "auto" / "config.yaml").write_text(yaml.safe_dump({**settings, "codec_chosen": "bf16"}))
    with pytest.raises(CheckpointError, match="has checkpoints under codec_chosen int8, its config.yaml leads to bf16"):
        run(recipe(*wanted), tmp_path / "auto")


def test_the_speed_of_a_link_is_what_more_bytes_take() -> None:
    """A burst that passes at once and a latency are no speed."""
    way = probe._grown(lambda size: 0.1 + max(0.0, 4 * size - 250_000) / 12.5e6, 4)
    assert way.latency_s == pytest.approx(0.1) and way.byte_s == pytest.approx(1 / 12.5e6)
    assert probe._grown(lambda size: 0.01, 4) == Way(0.01, 0.0, 4)


def test_one_process_goes_by_the_speed_that_it_is_told(
    model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = [*plain(model_folder), "--rounds=1", "--codec=auto"]
    assert run(recipe(*short), tmp_path / "unknown") == [0]
    assert "codec auto is raw: nothing travels in one process, and --link_mbps tells no speed" in capfd.readouterr().out
    assert run(recipe(*short, "--link_mbps=0.01"), tmp_path / "slow") == [0]
    assert "codec auto is int8: ms that" in capfd.readouterr().out.replace("delta,int8,ef", "int8")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--codec_budget=1.5", "--codec=auto"], "codec_budget 1.5: give a share"),
        (["--codec_budget=0.1"], "codec_budget 0.1 belongs to codec auto"),
        (["--codec_chosen=int8"], "codec_chosen int8 belongs to codec auto"),
        (["--codec=auto", "--codec_chosen=int9"], "codec_chosen 'int9'"),
        (["--codec_up=auto"], "codec_up 'auto'"),
        (["--codec=auto", "--exchange=sums", "--aggregation.record_error=false"], "codec_up auto must see each"),
    ],
)
def test_impossible_settings_are_refused(given: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe(*given)
