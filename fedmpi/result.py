"""One evaluation on disk: its records while it runs, its result when it is done. It must never know a task's name."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fedmpi.errors import CheckpointError, ConfigError
from fedmpi.record.checkpoint import write_atomically, writing
from fedmpi.record.folder import hold, read_lines, read_object

if TYPE_CHECKING:
    from fedmpi.evaluation.decoding import Speaker
    from fedmpi.evaluation.task import Task
    from fedmpi.federation.post import Post


ANEW = "remove the file, and the same command asks everything anew"


def answered(task: "Task", speaker: "Speaker", chunk: Sequence[int]) -> dict[str, Any]:
    """What a rank tells of a chunk: its records, and what they cost."""
    before = getattr(speaker, "seconds", 0.0), getattr(speaker, "cut", 0)
    records = task.ask(speaker, chunk)
    after = getattr(speaker, "seconds", 0.0), getattr(speaker, "cut", 0)
    return {"records": records, "model_seconds": after[0] - before[0], "prompts_cut": after[1] - before[1]}


@dataclass(frozen=True)
class Result:
    """One evaluation on disk: chunk by chunk in NAME.jsonl while it runs, NAME.json when it is done."""

    folder: Path
    name: str
    subject: Mapping[str, Any]
    task: "Task"

    @property
    def path(self) -> Path:
        """The finished result."""
        return self.folder / f"{self.name}.json"

    @property
    def part(self) -> Path:
        """What was told so far, a line for each chunk; the first line says of what."""
        return self.folder / f"{self.name}.jsonl"

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain values."""
        facts: dict[str, Any] = json.loads(json.dumps({"subject": self.subject, **self.task.facts()}))
        return facts

    def held(self) -> IO[str]:
        """This evaluation in this folder for this process alone, until what this gives is closed."""
        return hold(self.folder / f".{self.name}.lock", f"the evaluation {self.path}", "process", "--out")

    def discard(self) -> None:
        """Whatever is there already."""
        self.path.unlink(missing_ok=True)
        self.part.unlink(missing_ok=True)

    def finished(self) -> dict[str, Any] | None:
        """The result that is there already, if it is of the same settings."""
        if (found := read_object(self.path, "give --again to discard it")) is not None:
            self._same(found.get("settings", {}), self.path)
        return found

    def make(self, speaker: "Speaker", chunk: int, post: "Post | None" = None) -> dict[str, Any]:
        """Ask what is not answered yet, with the help of other ranks where there are any, and finish.

        A chunk is asked whole or not at all: who else is in a batch moves a loss by the noise of a forward pass.
        """
        from fedmpi.hosting.host import environment

        began, num = time.monotonic(), len(self.task.ids)
        chunks = {first: list(range(first, min(first + chunk, num))) for first in range(0, num, chunk)}
        known = self._known(chunks)
        now = self._ask(speaker, [one for first, one in chunks.items() if first not in known], post)
        told = [(known | now)[first] for first in chunks]
        records = [record for one in told for record in one["records"]]
        result = {
            "task": self.name,
            **self.task.score(records),
            "settings": self.settings(),
            "prompts_cut": sum(one["prompts_cut"] for one in told),
            "seconds": time.monotonic() - began,
            "model_seconds": sum(one["model_seconds"] for one in now.values()),
            "asked_now": sum(len(one["records"]) for one in now.values()),
            "ranks": 1 if post is None else post.transport.size,
            **environment(),
            "records": records,
        }
        write_atomically(self.path, json.dumps(result, indent=1) + "\n")
        self.part.unlink(missing_ok=True)
        return result

    def _ask(self, speaker: "Speaker", missing: Sequence[list[int]], post: "Post | None") -> dict[int, dict[str, Any]]:
        """What is told of these chunks, on disk as soon as it is told."""
        from fedmpi.federation.shards import handed_out

        now: dict[int, dict[str, Any]] = {}
        with _appending(self.part) as file:
            for chunk, told in zip(missing, handed_out(post, missing, partial(answered, self.task, speaker)), strict=True):
                now[chunk[0]] = {"first": chunk[0], **told}
                file.write(json.dumps(now[chunk[0]]) + "\n")
                file.flush()
        return now

    def _known(self, chunks: Mapping[int, Sequence[int]]) -> dict[int, dict[str, Any]]:
        """What an interrupted evaluation was told, by a chunk's first question; the file is begun where there is none."""
        lines = list(read_lines(self.part, ANEW))
        if lines and "settings" in lines[0]:
            self._same(lines[0]["settings"], self.part)
        else:
            lines = []  # nobody knows what it was told under
        told = {line["first"]: line for line in lines[1:] if "first" in line}  # others are of an older version
        for number, line in enumerate(lines[1:], start=2):
            if "first" in line and not line.keys() >= {"records", "prompts_cut"}:
                raise CheckpointError(f"{self.part}, line {number}: the records of a chunk are expected; {ANEW}")
        known = {first: line for first, line in told.items() if len(chunks.get(first, ())) == len(line["records"])}
        if len(known) < len(told):
            print(f"fedmpi: {self.part}: what was asked in batches of another size is asked again", flush=True)
        whole = [{"settings": self.settings()}, *known.values()]  # a last line that was cut short is gone from here on
        write_atomically(self.part, "".join(json.dumps(line) + "\n" for line in whole))
        return known

    def _same(self, found: Mapping[str, Any], path: Path) -> None:
        wanted = self.settings()
        if differ := sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)):
            raise ConfigError(
                f"{path} is of other settings ({', '.join(differ)} differ): give --again to discard it, or --out for another folder"
            )


def _appending(path: Path) -> Any:
    with writing(str(path), "make room or give another --out"):
        return path.open("a", encoding="utf-8")


def show(result: Mapping[str, Any], path: Path) -> None:
    """The scores, in lines."""
    interval = result.get("interval") or {}
    between = f" ({interval['low']:.4f} to {interval['high']:.4f}, {interval['method']})" if interval.get("low") is not None else ""
    score = result.get("score")
    what = ", loss" if score is not None and score == result.get("loss") else ""  # which no one is to take for a perplexity
    print(f"{result['task']}{what}: {'no score' if score is None else f'{score:.4f}'}{between}")
    for key, value in result.items():
        if isinstance(value, int | float) and key not in ("score", "seconds", "model_seconds", "asked_now", "ranks", "threads"):
            print(f"  {key}: {value:.4f}" if isinstance(value, float) else f"  {key}: {value}")
    for name, found in result.get("subtasks", {}).items():
        print(
            f"  {name}: {found['score']:.4f} ({found['metric']}, {found['num']} questions, {found['shots_dropped']} shots dropped)"
        )
    for name, why in result.get("left_out", {}).items():
        print(f"  left out of the mean: {name}, {why}")
    if worst := result.get("worst_client"):
        print(f"  worst client: {worst['client']} (loss {worst['loss']:.4f} over {worst['num_tokens']} tokens)")
    print(f"  all outputs: {path}", flush=True)
