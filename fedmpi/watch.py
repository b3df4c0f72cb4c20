"""Whether a piece of work goes on: the loops inside it tick, and a watching thread finds the one that has not ticked for too long.

A step may take its time as long as steps follow one another: what counts as too long is the limit, and ten times the step before on
top; before anything has ticked in this process, when models are loaded and programs compiled, ten times the limit. Work in the main
thread is interrupted by a signal, which ends a sleep, a lock or a read in a `Stuck` at its place. What cannot be interrupted (code
that is not Python, another thread) is reported instead, again and again. This module must never know what the work is.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType

from fedmpi.errors import Stuck

INTERRUPT = signal.SIGUSR2
PATIENCE = 10  # steps like the one before, and limits before the first
_here = threading.local()  # the watched work of this thread
_seen = threading.Event()  # something has ticked in this process


def tick() -> None:
    """A step is done. Cheap, and nothing where nobody watches."""
    work: Work | None = getattr(_here, "work", None)
    if work is not None:
        work.tick()


@dataclass
class Work:
    """What one thread does at the moment."""

    limit_s: float
    report: Callable[[str], None]  # from the watching thread, while nothing helps
    thread: threading.Thread = field(default_factory=threading.current_thread)
    last: float = field(default_factory=monotonic)
    step_s: float = 0.0
    over: bool = False
    wanted: str = ""  # why it is to be interrupted
    reporting: threading.Lock = field(default_factory=threading.Lock)  # work does not end in the middle of a report

    def tick(self) -> None:
        """Called by the work itself."""
        now = monotonic()
        self.step_s, self.last = now - self.last, now
        if not _seen.is_set():  # to look is cheaper than to set
            _seen.set()

    def patience_s(self) -> float:
        """How long no tick is no harm."""
        return self.limit_s + PATIENCE * self.step_s if _seen.is_set() else PATIENCE * self.limit_s

    def look(self, now: float, passed_s: float) -> None:
        """The watching thread, so long after it looked before."""
        if passed_s > self.limit_s / 2:  # it is the process that was stopped
            self.last = now
        if self.wanted:
            with self.reporting:
                if not self.over:
                    self.report(self.wanted)
        elif now - self.last > self.patience_s():
            self.wanted = f"no step for {now - self.last:.0f} s, in {place(self.thread)}"
            if self.thread is threading.main_thread():
                signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)


@dataclass
class Watcher:
    """The thread that looks at the work of another, as long as that lives: to start one for each turn costs as much as a step."""

    watched: threading.Thread = field(default_factory=threading.current_thread)
    work: Work | None = None
    period_s: float = 1.0
    sooner: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Begin."""
        self.own = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.own.start()

    def turn_to(self, work: Work | None) -> None:
        """Look at this from now on."""
        self.work = work
        if work is not None and work.limit_s / 4 < self.period_s:
            self.period_s = work.limit_s / 4
            self.sooner.set()

    def watch(self) -> None:
        """The thread itself."""
        before = monotonic()
        while self.watched.is_alive():
            if self.sooner.wait(self.period_s):
                self.sooner.clear()
            now, work = monotonic(), self.work
            if work is not None:
                work.look(now, now - before)
            before = now


def _interrupt(number: int, frame: FrameType | None) -> None:
    """The signal's handler, in the main thread: whatever waits there ends with this. It stays, since a signal may be late."""
    work: Work | None = getattr(_here, "work", None)
    if work is not None and work.wanted and not work.over:
        raise Stuck(work.wanted)


@contextmanager
def over(limit_s: float | None, report: Callable[[str], None]) -> Iterator[None]:
    """Watch over what this thread does inside; None is not to. `report` is told while work is stuck for good."""
    if limit_s is None:
        yield
        return
    work, outer = Work(limit_s, report), getattr(_here, "work", None)
    if work.thread is threading.main_thread():
        signal.signal(INTERRUPT, _interrupt)
    watcher: Watcher | None = getattr(_here, "watcher", None)
    if watcher is None or not watcher.own.is_alive():  # a process that was forked has this thread alone
        watcher = _here.watcher = Watcher()
    _here.work = work
    watcher.turn_to(work)
    try:
        yield
    finally:
        with work.reporting:
            work.over = True
        _here.work = outer
        watcher.turn_to(outer)


def place(thread: threading.Thread) -> str:
    """Where a thread is: file, line and function of the innermost frame, and of who called it."""
    frame = sys._current_frames().get(thread.ident or 0)
    found: list[str] = []
    while frame is not None and len(found) < 3:
        found.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " called by ".join(found) or "a place that is unknown"
