"""Being told to stop: TERM, USR1 and Ctrl-C finish the round in hand instead of ending the process. It knows signals alone."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether this process has been told to stop, and by what. Set by signal handlers, read between rounds."""

    signal: str | None = None
    tell: Callable[[], None] | None = None  # passes it on to the server; safe in a signal handler

    def install(self) -> None:
        """Listen from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._noted)

    def tell_with(self, tell: Callable[[], None]) -> None:
        """Pass signals on this way, one that came earlier too."""
        self.tell = tell
        if self.signal:
            tell()

    def _noted(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal:
            raise KeyboardInterrupt  # the second Ctrl-C means it
        self.signal = signal.Signals(number).name
        if self.tell is not None:
            self.tell()
