"""Rounds on their way to disk, behind the training that goes on: one at a time, in their order, each whole before its successor.

So training runs ahead of the disk by one checkpoint at most, and a disk that fails ends the run before the checkpoint after that.
This module must never know what the state means.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fedmpi.record.folder import RunFolder
from fedmpi.tensors import Tensors


@dataclass
class Commits:
    """The checkpoints of one training. Used as a context: leaving it waits for the one that is being written, and lets it count."""

    folder: RunFolder
    durable: Callable[[int], None]  # told of each round once it is on disk
    slowest_s: float = 0.0  # of the writes so far
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "commit"))
    _under_way: "Future[None] | None" = None

    def begin(
        self, round_index: int, state: Tensors, record: Mapping[str, Any], owned: Mapping[int, str], between_rounds: bool = True
    ) -> None:
        """Hand a round over as it stands: nothing of it may change from now on. The folder's pending lines go with it.

        Where clients train already, what they have just written has no name yet: `tidy` is for between rounds.

        What this call takes, training stands still: for whatever is left of the write before, and next to nothing else.
        """
        began = time.monotonic()
        self.wait()
        if between_rounds:
            self.folder.checkpoints.forget(owned)
        lines = self.folder.take()
        lines[-1]["blocked_s"] = time.monotonic() - began
        self._under_way = self._writer.submit(self._write, round_index, state, {**record, "lines": lines}, owned)

    def tidy(self, owned: Mapping[int, str]) -> None:
        """Remove clients' state that nothing names any more, once the checkpoint that is being written has its names on disk."""
        self.wait()
        self.folder.checkpoints.forget(owned)

    def check(self) -> None:
        """Raise what a write has failed with; a write that goes on is left alone."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Until all that was handed over is on disk."""
        if self._under_way is not None:
            done, self._under_way = self._under_way, None
            done.result()

    def _write(self, round_index: int, state: Tensors, record: Mapping[str, Any], owned: Mapping[int, str]) -> None:
        """State first, then the metrics lines: a line that is there tells of a round that cannot be lost."""
        began = time.monotonic()
        self.folder.checkpoints.commit(round_index, state, record, owned)
        self.folder.publish(record["lines"])
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.durable(round_index)

    def __enter__(self) -> "Commits":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.shutdown()
        if error is None:
            self.wait()
