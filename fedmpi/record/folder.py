"""The run folder: what a run leaves behind, and what a restart finds. Only the server writes here (clients' own state aside)."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from fedmpi import config
from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.record.checkpoint import Checkpoints, Committed, write_atomically, writing


@dataclass
class RunFolder:
    """One run's folder. `metrics.jsonl` holds committed rounds only; `pending` lines wait for the checkpoint that commits them."""

    path: Path
    experiment: str
    keep: int
    pending: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run."""
        return Checkpoints(self.path / "checkpoints", self.experiment, self.keep)

    def claim(self, resume: str, settings: Mapping[str, Any]) -> None:
        """Take the folder for this experiment, or say why it cannot be had; nothing in a foreign folder is touched."""
        if self.check(resume, settings):
            return
        # the record comes last: with it the folder is taken
        write_atomically(self.path / "config.yaml", config.to_yaml(settings))
        self.describe({})

    def check(self, resume: str, settings: Mapping[str, Any]) -> bool:
        """Whether the folder is this experiment's already; an error where it cannot become so. Reads only."""
        try:
            there = {path.name for path in self.path.iterdir() if not path.name.startswith(".")} if self.path.exists() else set()
        except OSError as error:
            raise ConfigError(f"run_dir {self.path} cannot be used ({error}): give a folder") from None
        ours = "record.json" in there
        begun = ours and self._begun()
        if resume == "never" and (begun or (there and not ours)):
            raise ConfigError(f"run_dir {self.path} is not empty and --resume is never: give an empty folder or --resume auto")
        if not there and resume == "must":
            raise ConfigError(f"run_dir {self.path} is empty and --resume is must: nothing to continue; check the path")
        if not ours and there - {"config.yaml"}:
            raise ConfigError(f"run_dir {self.path} is not empty and holds no fedmpi run: give another --run_dir")
        found = self._experiment() if ours else None
        if begun and found != self.experiment:
            raise ConfigError(
                f"run_dir {self.path} belongs to experiment {found}, this configuration is {self.experiment}"
                f"{self._what_differs(settings)}: give another --run_dir, or the settings in its config.yaml"
            )
        return found == self.experiment

    def _begun(self) -> bool:
        """Whether a round was ever committed below: a start that failed before, over a misspelt path say, holds nothing."""
        return any(self.path.rglob("checkpoints/round-*")) or any(self.path.rglob("summary.json"))

    def lock(self) -> IO[str]:
        """Hold the folder for this process; a second run in it is refused. Close what this gives to let go."""
        return hold(self.path / ".lock", f"run_dir {self.path}", "run", "--run_dir")

    def _experiment(self) -> object:
        record = self.path / "record.json"
        try:
            return json.loads(record.read_text(encoding="utf-8"))["experiment"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{record} cannot be read ({error!r}): restore it, or give another --run_dir") from None

    def _what_differs(self, settings: Mapping[str, Any]) -> str:
        try:
            there = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return ""
        different = config.differences(there, settings) if isinstance(there, dict) else []
        different = [text for text in different if not text.startswith(("run_dir ", "resume "))]
        return f" ({'; '.join(different[:4])})" if different else ""

    def same_data(self, data: Mapping[str, Any]) -> None:
        """Refuse to continue on other rows than the run began with: its results would be of neither."""
        there = json.loads((self.path / "record.json").read_text(encoding="utf-8")).get("data")
        here = json.loads(json.dumps(data, default=_plain))
        if there is not None and there != here:
            found = "; ".join(config.differences(there, here)[:3])
            raise CheckpointError(
                f"run_dir {self.path} began with other data ({found}): bring those back, or give another --run_dir"
            )

    def describe(self, facts: Mapping[str, Any]) -> None:
        """What is known of the run before its first round, in record.json: launcher, world, who has which data."""
        self.write("record.json", {"experiment": self.experiment, **facts})

    def resume(self) -> Committed | None:
        """The last committed round, or None for a start."""
        committed = self.checkpoints.latest()
        self._mend(committed)
        return committed

    def _mend(self, committed: Committed | None) -> None:
        """Bring metrics.jsonl back to what the checkpoint says: lines of lost rounds go, lines that a crash withheld come."""
        last = committed.round if committed else -2
        lines = [line for line in self.metrics() if line["round"] <= last or _tells_why(line, last + 1)]
        known = {(line["round"], line.get("event"), line.get("attempt")) for line in lines}
        withheld = committed.record["lines"] if committed else []
        lines += [line for line in withheld if (line["round"], line.get("event"), line.get("attempt")) not in known]
        write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if missing := sorted(set(range(last + 1)) - {line["round"] for line in lines if "event" not in line}):
            said = f"{len(missing)} committed rounds (from round {missing[0]} on)"
            print(f"fedmpi: {self.path}/metrics.jsonl lacks the lines of {said}: they cannot be made again", flush=True)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return list(read_metrics(self.path))

    def take(self) -> list[dict[str, Any]]:
        """The pending lines, for who makes them durable."""
        lines, self.pending = self.pending, []
        return lines

    def publish(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """These lines are committed: write them out."""
        path = self.path / "metrics.jsonl"
        with writing(str(path), "make room and start the run again"), path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def finished(self, committed: Committed | None) -> dict[str, Any] | None:
        """The summary of a finished run; None where its end is still to come, or to be made again."""
        done = read_object(self.path / "summary.json")
        if done is None or any((self.path / "adapter").glob("*.safetensors")):
            return done
        if committed is None:
            raise CheckpointError(
                f"{self.path}/adapter is gone, and without checkpoints it cannot be made again: "
                "restore it, or give another --run_dir"
            )
        print(f"fedmpi: {self.path}/adapter is gone: it is made again from the checkpoint of round {committed.round}", flush=True)
        return None

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """A small JSON file: summary.json, state.json."""
        write_atomically(self.path / name, json.dumps(value, indent=2, default=_plain) + "\n")


def hold(file: Path, what: str, who: str, option: str) -> IO[str]:
    """Lock a file until what this gives is closed, or the process is gone, however it ended; a second one like us is refused."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} cannot be used ({error}): give a folder that can be written to") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(lock)
        raise ConfigError(f"{what} is in use by another {who}{holder}: wait for it, or give another {option}") from None
    except OSError as error:
        print(f"fedmpi: {what} cannot be locked on this file system ({error}): start no second {who} there", flush=True)
    with suppress(OSError):  # on a full disk nobody reads who it is
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())  # nothing is left for close to flush
    return lock


def _holder(lock: IO[str]) -> str:
    """What the one who has it wrote about itself."""
    with lock:
        lock.seek(0)
        said = lock.read(200)
    return f" ({said})" if said else ""


def _tells_why(line: Mapping[str, Any], round_index: int) -> bool:
    """Whether this says why a run that ended could not do its next round."""
    return bool(line.get("event") == "quorum_lost" and line["round"] == round_index)


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, each of which tells its round."""
    path = folder / "metrics.jsonl"
    for number, line in enumerate(read_lines(path), start=1):
        if not isinstance(line.get("round"), int):
            raise CheckpointError(f"{path}, line {number}: an object with a round number is expected; restore the file")
        yield line


def read_lines(path: Path, advice: str = "restore the file or give another --run_dir") -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that a crash cut short is left out."""
    lines: Sequence[bytes] = _read(path, advice).splitlines(keepends=True) if path.exists() else ()
    for number, line in enumerate(lines, start=1):
        try:
            found = json.loads(line)
        except ValueError:
            if line.endswith(b"\n"):
                raise CheckpointError(f"{path}, line {number}: not JSON; {advice}") from None
            return
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{path}, line {number}: an object is expected, found {line[:40].decode(errors='replace').strip()}; {advice}"
            )
        yield found


def read_object(path: Path, advice: str = "restore it, or remove it and start the run again") -> dict[str, Any] | None:
    """What a small JSON file says; None where there is no such file."""
    if not path.exists():
        return None
    try:
        found = json.loads(_read(path, advice))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): {advice}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected an object: {advice}")
    return found


def _read(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}): {advice}") from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | set) else str(value)
