"""The outbox of a rank that hosts several clients: an update leaves while the next client trains. One is under way at a time.

What is sent, and how, is the caller's; so nothing that is sent may change, and the order stays. This module must never know what
an update is.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedmpi.federation.post import Post


@dataclass
class Outbox:
    """Sends in a thread of its own. What goes wrong there is raised where the next one is put, or at the end."""

    post: Post
    _thread: threading.Thread | None = None
    _error: BaseException | None = None
    _took_s: float = 0.0

    def put(self, send: Callable[[], None]) -> None:
        """Begin to send; whoever was before has left."""
        self.wait()
        self._thread = threading.Thread(target=self._send, args=(send,), name="outbox", daemon=True)
        self._thread.start()

    def wait(self) -> float:
        """Until nothing is under way; gives the seconds that it went on behind other work."""
        if self._thread is None:
            return 0.0
        began = time.monotonic()
        with self.post.apart():
            self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error
        return max(0.0, self._took_s - (time.monotonic() - began))

    def _send(self, send: Callable[[], None]) -> None:
        try:
            with self.post.transport.turn:
                began = time.monotonic()
                send()
                self._took_s = time.monotonic() - began
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits
            self._error = error
