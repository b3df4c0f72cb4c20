"""What a person sees while a run goes on: a progress bar on a terminal, one plain line per round elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """The rounds of one run, on rank 0."""

    def __init__(self, title: str, first_round: int, rounds: int, quiet: bool = False) -> None:
        self.title, self.rounds, self.began, self.first, self.quiet = (
            title,
            rounds,
            time.monotonic(),
            first_round,
            quiet,
        )
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if sys.stderr.isatty() and not quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(title, total=rounds, completed=first_round, told="")

    def round(self, line: Mapping[str, Any]) -> None:
        """One more round is done."""
        if self.quiet:
            return
        told = describe(line)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=line["round"] + 1, told=told)
            return
        done = line["round"] + 1 - self.first
        left = (time.monotonic() - self.began) / max(1, done) * (self.rounds - line["round"] - 1)
        print(
            f"{self.title} round {line['round'] + 1}/{self.rounds}  {told}  {line['seconds']:.1f} s, {left:.0f} s left",
            flush=True,
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def describe(line: Mapping[str, Any]) -> str:
    """Losses and bytes of a round in one short text."""
    parts = [f"train {line['train_loss']:.3f}"] if line.get("train_loss") is not None else []
    parts += [f"held-out {line['eval_loss']:.3f}"] if line.get("eval_loss") is not None else []
    parts += [f"up {size(line['up_bytes'])} down {size(line['down_bytes'])}"]
    missing = len(line["cohort"]) - len(line["counted"])
    return "  ".join(parts) + (f"  {missing} of {len(line['cohort'])} missing" if missing else "")


def size(num_bytes: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1000
    raise AssertionError
