"""Being told to stop: TERM, USR1 and Ctrl-C finish the round in hand instead of ending the process, and so does time that runs out.

It knows signals and the clock alone.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether this process has been told to stop, and by what. Set by signal handlers, read between rounds."""

    signal: str | None = None
    until: float = math.inf  # when the job ends, by this machine's monotonic clock, which no change of date moves
    time_is_up: bool = False  # what is left did not suffice for another round
    tell: Callable[[], None] | None = None  # passes it on to the other ranks; safe in a signal handler
    hear: Callable[[], bool] | None = None  # whether another rank was told

    def install(self) -> None:
        """Listen from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._noted)

    def share(self, tell: Callable[[], None], hear: Callable[[], bool]) -> None:
        """Pass signals on this way, one that came earlier too, and hear of those that came to others."""
        self.tell, self.hear = tell, hear
        if self.signal:
            tell()

    def wanted(self) -> bool:
        """Whether the job is to stop, whichever rank was told."""
        return self.signal is not None or (self.hear is not None and self.hear())

    def over(self) -> bool:
        """Whether nothing more is to be begun: the job was told to stop, or its time is over."""
        self.time_is_up = self.time_is_up or self.left_s() <= 0
        return self.time_is_up or self.wanted()

    def left_s(self) -> float:
        """Seconds that the job may still run."""
        return self.until - time.monotonic()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.signal = signal.Signals(number).name
        if self.tell is not None:
            self.tell()
