"""Finds the links that gave no sign of life for too long. It must never know what a message means."""

import threading
from collections.abc import Callable, Collection
from time import monotonic

from fedmpi.errors import PeerSilent
from fedmpi.transports.link import Link

LOOK_S = 0.02  # between two looks, at least


class Watchdog:
    """A thread of its own, until `over`."""

    def __init__(
        self,
        links: Callable[[], Collection[Link]],
        lost: Callable[[Link, PeerSilent], None],
        over: threading.Event,
        timeout_s: float,
        period_s: float,
    ) -> None:
        self._links, self._lost, self._over, self._timeout_s, self._period_s = links, lost, over, timeout_s, period_s
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        before = monotonic()
        while not self._over.wait(self._until_late()):
            now = monotonic()
            if now - before > self._timeout_s / 2:  # it is we who were stopped: give the others time to be heard
                for link in self._links():
                    link.heard = now
            before = now
            for link in self._links():
                self.look(link, now)

    def _until_late(self) -> float:
        """Seconds until the first link may have been silent for too long, so that nobody gets more time than was said."""
        first = min((link.heard for link in self._links() if link.may_be_late), default=monotonic())
        return min(self._period_s, max(LOOK_S, first + self._timeout_s - monotonic()))

    def look(self, link: Link, now: float) -> None:
        """Give a link up that has been silent for too long."""
        if link.may_be_late and now - link.heard > self._timeout_s:
            after = f" after {link.coming}" if link.coming else ""
            what = f"rank {link.peer} gave no sign of life for {self._timeout_s:g} s{after}"
            self._lost(link, PeerSilent(f"{what}; it hangs, is stopped or cut off (--timeout_s sets how long to wait)"))
