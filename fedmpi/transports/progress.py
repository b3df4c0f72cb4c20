"""What goes on inside MPI: one thread asks after all operations, and sleeps longer the longer nothing comes.

Every call of MPI is made under one lock, so MPI.THREAD_SERIALIZED is enough. MPI itself is handed over: this module must never
import it, or know what is sent to whom.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from types import ModuleType
from typing import Any

MIN_PAUSE_S, MAX_PAUSE_S = 20e-6, 2e-3
PATIENCE = 0.1  # a pause is this share of the time that nothing has come


@dataclass(eq=False)
class Operation:
    """Requests that somebody waits for: `then` is called once, when all are done or given up."""

    requests: Sequence[Any]
    receives: bool
    then: Callable[[], None]
    error: str = ""


class Progress:
    """The one thread that asks MPI how the pending operations stand."""

    def __init__(self, mpi: ModuleType) -> None:
        self.lock = threading.Lock()  # around every call of MPI
        self._mpi = mpi
        self._pending: list[Operation] = []
        self._posted = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="mpi-progress", daemon=True)
        self._thread.start()

    def start(self, post: Callable[[], Sequence[Any]], receives: bool, then: Callable[[], None]) -> Operation:
        """Post requests and watch over them, unless they are done at once."""
        with self.lock:
            operation = Operation(post(), receives, then)
            done = self._test(operation)
            if not done:
                self._pending.append(operation)
        if done:
            then()
        else:
            self._posted.set()
        return operation

    def cancel(self, operations: Iterable[Operation], error: str) -> None:
        """Give operations up. The requests stay with us, for they keep the memory that MPI may still touch."""
        with self.lock:
            given_up = [one for one in operations if one in self._pending and not one.error]
            for operation in given_up:
                operation.error = error
                if operation.receives:  # a send cannot be cancelled; it is just not waited for
                    for request in operation.requests:
                        request.Cancel()
        for operation in given_up:
            then, operation.then = operation.then, nothing
            then()

    def stop(self) -> None:
        """End the thread: nobody may call MPI after MPI_Finalize."""
        self._over = True
        self._posted.set()
        self._thread.join()

    def _run(self) -> None:
        last = monotonic()
        while True:
            posted = self._posted.is_set()
            self._posted.clear()  # before looking at what it announces, or a stop in between would be slept through
            if self._over:
                return
            with self.lock:
                finished = [operation for operation in self._pending if self._test(operation)]
                self._pending = [operation for operation in self._pending if operation not in finished]
            for operation in finished:
                operation.then()
            now = monotonic()
            last = now if finished or posted else last
            self._posted.wait(min(MAX_PAUSE_S, max(MIN_PAUSE_S, PATIENCE * (now - last))) if self._pending else None)

    def _test(self, operation: Operation) -> bool:
        try:
            return bool(self._mpi.Request.Testall(operation.requests))
        except self._mpi.Exception as error:
            operation.error = operation.error or str(error)
            return True


def nothing() -> None:
    """What follows on an operation that was given up before."""
