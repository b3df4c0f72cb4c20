"""Commit and resume: the whole state of a run on disk, atomically, or not at all.

A checkpoint is a folder RUN_DIR/checkpoints/round-000012 with the server's tensors and a manifest that names every file by its
SHA-256, the clients' own state files included. It is written beside, synced, and renamed: a folder of that name is whole. Nothing
here is ever unpickled. This module must never know what the tensors mean.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedmpi.errors import CheckpointError
from fedmpi.tensors import Tensors, save_file

FORMAT = 1
_PREFIX = "round-"


@dataclass(frozen=True)
class Committed:
    """What the last durable round left."""

    round: int
    tensors: Tensors
    record: dict[str, Any]  # metrics, history, totals: whatever the run wants back
    owned: dict[int, str]  # client -> SHA-256 of its own state


class Checkpoints:
    """The checkpoints of one run folder, written by the server alone."""

    def __init__(self, folder: Path, experiment: str, keep: int) -> None:
        self.folder, self.experiment, self.keep = folder, experiment, keep

    def commit(self, round_index: int, tensors: Tensors, record: Mapping[str, Any], owned: Mapping[int, str]) -> None:
        """Make a round durable; when this returns it is on disk."""
        final = self.folder / f"{_PREFIX}{round_index:06d}"
        beside = self.folder / f".{final.name}"
        advice = "make room and start the run again, it continues after the last checkpoint, which is safe"
        with writing(f"round {round_index}: the checkpoint {final}", advice):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file(tensors, beside / "state.safetensors")
            manifest = {
                "format": FORMAT,
                "experiment": self.experiment,
                "round": round_index,
                "state_sha256": file_sha256(beside / "state.safetensors"),
                "owned": {str(client): sha for client, sha in sorted(owned.items())},
                "record": record,
            }
            (beside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            for path in (beside / "state.safetensors", beside / "manifest.json", beside):
                sync(path)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
            sync(self.folder)
        for old in self._rounds()[: -self.keep]:
            shutil.rmtree(self.folder / f"{_PREFIX}{old:06d}", ignore_errors=True)

    def forget(self, owned: Mapping[int, str]) -> None:
        """Remove clients' own state that neither a checkpoint nor `owned` names. While clients train, their newest has no name yet:
        this is for the time between rounds."""
        named = set(owned.values())
        for kept in self._rounds():
            path = self.folder / f"{_PREFIX}{kept:06d}" / "manifest.json"
            with suppress(OSError, ValueError, KeyError, TypeError):  # one that is broken keeps no files alive
                named.update(json.loads(path.read_text(encoding="utf-8"))["owned"].values())
        for path in (self.folder / "clients").glob("*.safetensors"):
            if path.stem.rpartition("-")[2] not in {sha[:16] for sha in named}:
                path.unlink(missing_ok=True)

    def latest(self) -> Committed | None:
        """The newest checkpoint, checked; None in a folder without any. What is broken or foreign is named, never half-loaded."""
        found = self._rounds()
        return self._load(self.folder / f"{_PREFIX}{found[-1]:06d}") if found else None

    def _rounds(self) -> list[int]:
        names = [path.name for path in self.folder.glob(f"{_PREFIX}*")] if self.folder.exists() else []
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())

    def _load(self, path: Path) -> Committed:
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            stated = {key: manifest[key] for key in ("format", "experiment", "round", "state_sha256", "owned", "record")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {path}: manifest.json is missing or broken ({error}); {_ADVICE}") from None
        if stated["format"] != FORMAT or stated["experiment"] != self.experiment:
            raise CheckpointError(
                f"checkpoint {path} is of experiment {stated['experiment']} (format {stated['format']}), this run is "
                f"{self.experiment} (format {FORMAT}): give another --run_dir"
            )
        state = path / "state.safetensors"
        if not state.exists() or (found := file_sha256(state)) != stated["state_sha256"]:
            has = f"SHA-256 {found[:12]}" if state.exists() else "nothing"
            raise CheckpointError(
                f"checkpoint {path}: state.safetensors should have SHA-256 {stated['state_sha256'][:12]}, found {has}; {_ADVICE}"
            )
        owned = {int(client): sha for client, sha in stated["owned"].items()}
        return Committed(int(stated["round"]), load_file(state), stated["record"], owned)


_ADVICE = "remove that folder to continue from the one before it"


@dataclass(frozen=True)
class Vault:
    """Clients' own state as files that are named by client and content. Written before the update leaves; counted or not, the
    server's manifest decides which file is the client's state."""

    folder: Path

    def put(self, client: int, tensors: Tensors) -> str:
        """Store the state; gives its SHA-256."""
        beside = self.folder / f".client-{client}"
        with writing(f"client {client}: its state in {self.folder}", "make room"):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside)
            sha256 = file_sha256(beside)
            sync(beside)
            os.rename(beside, self._path(client, sha256))
            sync(self.folder)
        return sha256

    def get(self, client: int, sha256: str) -> Tensors:
        """The state of that digest, and no other."""
        path = self._path(client, sha256)
        if not path.exists():
            raise CheckpointError(
                f"client {client}: its state {path} is not here; resuming on other ranks or machines needs a run folder "
                "that all of them share"
            )
        if (found := file_sha256(path)) != sha256:
            raise CheckpointError(f"client {client}: {path} should have SHA-256 {sha256[:12]}, found {found[:12]}")
        return load_file(path)

    def _path(self, client: int, sha256: str) -> Path:
        return self.folder / f"client-{client}-{sha256[:16]}.safetensors"


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _by_blocks(file.read)


def _by_blocks(read: Callable[[int], bytes]) -> str:
    state = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := read(1 << 20):
        state.update(block)
    return state.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file as a whole."""
    beside = path.with_name(f".{path.name}")
    with writing(str(path), "make room or give another --run_dir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)


@contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """One clear line where a disk is full or a folder cannot be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what} could not be written ({error}): {advice}") from error
