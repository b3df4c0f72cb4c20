"""What a run folder says, whole or so far, as one value. It reads files and judges their form; it never draws and never writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.record.folder import read_metrics, read_object
from fedmpi.report.results import rows_of
from fedmpi.settings.recipe import short

Line = dict[str, Any]
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """Everything the page shows. Rounds carry the numbers of metrics.jsonl: the first is 0, the evaluation before it -1."""

    path: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]  # what was known before the first round
    state: str | None  # running, finished, preempted, failed: as state.json says
    lines: Sequence[Line]
    summary: Mapping[str, Any] | None  # None until the run is finished
    alone: Mapping[int, Mapping[str, Any]]  # summaries of the clients alone, as far as they are finished
    pooled: Mapping[str, Any] | None  # summary of all data in one place
    compared: Mapping[str, Mapping[str, Any]]  # summaries of other algorithms' federations, as far as they are finished
    traces: Mapping[int, Points]  # training loss by client

    @property
    def rounds(self) -> list[Line]:
        """The lines that tell of rounds."""
        return [line for line in self.lines if "event" not in line]

    @property
    def scenario(self) -> str:
        """What was trained: a folder below a run's own says so in its summary only."""
        asked = str(self.settings.get("scenario", "fed"))
        return asked if asked == "all" else str((self.summary or {}).get("scenario", asked))

    @property
    def federated(self) -> bool:
        """Whether the clients of the rounds are the parties of the data."""
        return self.scenario in ("fed", "all")

    @property
    def data(self) -> Mapping[str, Any]:
        """Who had which rows: in the record from the start, in the summaries of finished runs."""
        known = [self.record, self.summary, self.pooled, *self.alone.values()]
        return next((summary["data"] for summary in known if summary and "data" in summary), {})

    def points(self, key: str) -> Points:
        """The rounds in which a figure is there, with its values."""
        return [(line["round"], value) for line in self.lines if (value := number(line.get(key))) is not None]

    def score(self, key: str) -> tuple[float | None, float | None]:
        """A figure before the first round, and the newest one."""
        points = self.points(key)
        first = next((value for index, value in points if index == -1), None)
        newest = number((self.summary or {}).get("final", {}).get(key))
        return first, newest if newest is not None else next((v for i, v in reversed(points) if i >= 0), None)

    def rows(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The final table; while the federation goes on, its last row says how far it is."""
        if self.summary and not self.federated:
            name = "all data in one place" if self.scenario == "global" else f"{self.scenario} alone"
            return [("nothing (the base model)", self.summary.get("base", {})), (name, self.summary.get("final", {}))]
        rows = rows_of(self._results())
        if rows and rows[-1][0] == "the federation" and not self.summary:
            newest = self.points("eval_loss")[-1][0]
            rows[-1] = (f"the federation so far (round {newest})", rows[-1][1])
            rows = rows if newest >= 0 else rows[:-1]
        return rows

    def _results(self) -> dict[str, Any]:
        results: dict[str, Any] = {}
        scored = [line for line in self.lines if number(line.get("eval_loss")) is not None]
        if self.alone:
            results["local"] = {client: summary.get("final", {}) for client, summary in self.alone.items()}
        if self.pooled:
            results["global"] = {0: self.pooled.get("final", {})}
        if self.summary:
            results["fed"] = {"base": self.summary.get("base", {}), "final": self.summary.get("final", {})}
        elif self.federated and scored:
            results["fed"] = {"base": scored[0] if scored[0]["round"] == -1 else {}, "final": scored[-1]}
        return results | (dict(self.compared) if self.summary else {})


def number(value: object) -> float | None:
    """A finite number, or None for anything else: a diverged loss leaves a gap in a plot, not a broken page."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read(path: Path) -> Run:
    """Read a run folder; what is not one, or is broken, is named in one line."""
    if not path.is_dir():
        raise ConfigError(f"run_dir {path} is not a folder: give the folder of a run, such as runs/fedavg-0123456789ab")
    if not (path / "record.json").exists() or not (path / "config.yaml").exists():
        raise ConfigError(f"run_dir {path} holds no fedmpi run (no record.json and config.yaml in it): give the folder of a run")
    try:
        return _read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"run_dir {path} cannot be read ({error}): check the files and their permissions") from error


def _read(path: Path) -> Run:
    settings = _settings(path / "config.yaml")
    solos = path / "local" / "clients" if (path / "local").is_dir() else path / "clients"
    numbered = sorted(int(folder.name) for folder in solos.glob("*") if folder.name.isdecimal())
    found = {client: read_object(solos / str(client) / "summary.json") for client in numbered}
    alone = {client: summary for client, summary in found.items() if summary is not None}
    lines = list(read_metrics(path))
    solo_only = not lines and not (path / "summary.json").exists()
    traces = {client: _own_trace(solos / str(client)) for client in numbered} if solo_only else traces_of(lines)
    return Run(
        path=path,
        settings=settings,
        record=read_object(path / "record.json") or {},
        state=(read_object(path / "state.json") or {}).get("state"),
        lines=lines,
        summary=read_object(path / "summary.json"),
        alone=alone,
        pooled=read_object(path / "global" / "summary.json"),
        compared=_compared(path, settings),
        traces=traces,
    )


def _compared(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = [short(str(name)) for name in settings.get("compare") or ()]
    found = {name: read_object(path / name / "summary.json") for name in names}
    return {name: summary for name, summary in found.items() if summary is not None}


def traces_of(lines: Sequence[Line]) -> dict[int, Points]:
    """Every client's training loss over the rounds that it took part in."""
    traces: dict[int, Points] = {}
    for line in lines:
        for client, loss in line.get("client_losses", {}).items():
            if (value := number(loss)) is not None:
                traces.setdefault(int(client), []).append((line["round"], value))
    return dict(sorted(traces.items()))


def _own_trace(folder: Path) -> Points:
    return [(line["round"], value) for line in read_metrics(folder) if (value := number(line.get("train_loss"))) is not None]


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is not YAML ({' '.join(str(error).split())}): restore the file") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no settings: restore the file")
    return found
