"""What all commands have in common: exit codes, and one clear line instead of a traceback. It never knows what is run."""

import os
import sys
from collections.abc import Callable

from fedmpi.errors import Aborted, ConfigError, DataError, FedmpiError, ModelError, WorldError

NOT_POSSIBLE = (ConfigError, WorldError, ModelError, DataError)  # until settings, model or data are others
FINISHED, FAILED, IMPOSSIBLE, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


def guarded(work: Callable[[], int], where: str) -> int:
    """The exit code of `work`; `where` says who speaks when it fails."""
    try:
        return work()
    except FedmpiError as error:
        fail(error, where)
        kind = error.kind if isinstance(error, Aborted) else type(error).__name__  # on whichever rank it was
        return IMPOSSIBLE if kind in {one.__name__ for one in NOT_POSSIBLE} else FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered would be the next such error
        fail(BrokenPipeError("what this prints to was closed (head, or a terminal that went away): give it a file"), where)
        return FAILED
    except KeyboardInterrupt:
        fail(FedmpiError("interrupted, and left at once; what was written to disk is kept"), where)
        return INTERRUPTED


def fail(error: Exception, where: str) -> None:
    """The one clear line that a user gets instead of a traceback."""
    place = f"{where}: " if where else ""
    print(f"fedmpi: {place}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
