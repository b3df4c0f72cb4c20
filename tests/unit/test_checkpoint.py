"""Commit and resume: whole or not at all; what is broken or foreign is named and refused."""

import json
from pathlib import Path

import pytest
import torch

from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.record import checkpoint
from fedmpi.record.checkpoint import Checkpoints, Vault
from fedmpi.record.folder import RunFolder

TENSORS = {"adapter/a": torch.arange(6.0).reshape(2, 3), "adapter/b": torch.ones(2)}


def committed(folder: Path, rounds: int = 3, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, "exp", keep)
    for index in range(rounds):
        checkpoints.commit(index, TENSORS, {"lines": [], "n": index}, {})
    return checkpoints


def test_the_newest_comes_back_and_the_last_few_are_kept(tmp_path: Path) -> None:
    found = committed(tmp_path).latest()
    assert found is not None and found.round == 2 and found.record["n"] == 2
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000001", "round-000002"]


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", "exp", 2).latest() is None


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path)
    (tmp_path / "round-000002").rename(tmp_path / ".round-000003")  # the name before the rename that makes it whole
    (tmp_path / ".round-000003" / "manifest.json").unlink()
    found = checkpoints.latest()
    assert found is not None and found.round == 1
    checkpoints.commit(3, TENSORS, {}, {})
    assert not (tmp_path / ".round-000003").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: (path / "state.safetensors").write_bytes(b"short"), "should have SHA-256"),
        (lambda path: (path / "state.safetensors").unlink(), "found nothing"),
        (lambda path: (path / "manifest.json").write_text("{"), "missing or broken"),
        (lambda path: (path / "manifest.json").unlink(), "missing or broken"),
        (lambda path: (path / "manifest.json").write_text("{}"), "missing or broken"),
    ],
)
def test_a_broken_checkpoint_is_named_and_refused(tmp_path: Path, harm, words: str) -> None:
    checkpoints = committed(tmp_path)
    harm(tmp_path / "round-000002")
    with pytest.raises(CheckpointError, match=f"round-000002.*{words}.*remove that folder"):
        checkpoints.latest()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    committed(tmp_path)
    with pytest.raises(CheckpointError, match="of experiment exp .*this run is other"):
        Checkpoints(tmp_path, "other", 2).latest()


def test_a_full_disk_is_one_clear_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = committed(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left.*start the run again"):
        checkpoints.commit(3, TENSORS, {}, {})
    found = checkpoints.latest()
    assert found is not None and found.round == 2


def test_a_client_state_is_found_by_its_content_alone(tmp_path: Path) -> None:
    vault = Vault(tmp_path)
    sha = vault.put(3, TENSORS)
    assert torch.equal(vault.get(3, sha)["adapter/a"], TENSORS["adapter/a"])
    with pytest.raises(CheckpointError, match="client 4.*not here.*share"):
        vault.get(4, sha)
    next(tmp_path.glob("client-3-*")).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="client 3.*should have SHA-256"):
        vault.get(3, sha)


def test_client_states_live_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    vault, checkpoints = Vault(tmp_path / "clients"), Checkpoints(tmp_path, "exp", 2)
    shas = []
    for index in range(4):
        shas.append(vault.put(0, {"x": torch.full((1,), float(index))}))
        checkpoints.forget({0: shas[-1]})
        checkpoints.commit(index, TENSORS, {}, {0: shas[-1]})
    for sha in shas[-2:]:
        vault.get(0, sha)
    with pytest.raises(CheckpointError):
        vault.get(0, shas[0])


def folder_of(path: Path, experiment: str = "exp") -> RunFolder:
    return RunFolder(path, experiment, 2)


def test_whose_folder_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="is empty and --resume is must"):
        folder_of(run).claim("must", {})
    folder_of(run, "misspelt").claim("never", {"rounds": 2})
    folder_of(run).claim("never", {"rounds": 3})  # a start that came to no round holds nothing that could be lost
    assert (run / "config.yaml").read_text() == "rounds: 3\n"
    folder_of(run).checkpoints.commit(0, TENSORS, {"lines": []}, {})
    with pytest.raises(ConfigError, match="not empty and --resume is never"):
        folder_of(run).claim("never", {})
    with pytest.raises(ConfigError, match="belongs to experiment exp, this configuration is other"):
        folder_of(run, "other").claim("auto", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="holds no fedmpi run"):
        folder_of(tmp_path / "foreign").claim("auto", {})
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_metrics_follow_the_checkpoint(tmp_path: Path) -> None:
    """Lines of rounds that were lost go, lines that a crash withheld come."""
    folder = folder_of(tmp_path)
    folder.claim("auto", {})
    folder.pending = [{"round": 0, "x": 1}]
    lines = folder.take()
    folder.checkpoints.commit(0, TENSORS, {"lines": lines}, {})
    folder.publish(lines)
    folder.checkpoints.commit(1, TENSORS, {"lines": [{"round": 1, "x": 2}]}, {})  # and here the power went
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"round": 2}) + '\n{"round": 3, "cut')
    found = folder_of(tmp_path).resume()
    assert found is not None and found.round == 1
    assert folder.metrics() == [{"round": 0, "x": 1}, {"round": 1, "x": 2}]
