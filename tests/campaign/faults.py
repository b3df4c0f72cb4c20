"""Which faults there are, where each is possible and why not elsewhere, and how it is made inside a rank's own process."""

import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SERVER = ("announce", "broadcast", "gather", "aggregate", "evaluate", "commit", "committed")  # phases of a round, on the server
CLIENT = ("announced", "train", "upload")  # and on a client
DEADLINE_S = 4.0  # of the runs, unless they are told another
PAUSE, LONG_PAUSE, HANG = 0.15, 1.6, 3.0  # deadlines: before the others give up, after, and beyond a slow step


_stopping = threading.Lock()


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong once: when the given rank comes to this phase of this round."""

    kind: str
    phase: str
    round: int
    rank: int

    @property
    def name(self) -> str:
        """Also the name of the file that tells a restarted process that this has happened."""
        return f"{self.kind}-{self.phase}-{self.round}-{self.rank}"


EVERYWHERE = SERVER + CLIENT
PHASES: Mapping[str, tuple[str, ...]] = {
    "kill": EVERYWHERE,  # SIGKILL; where ranks are threads, of all of them
    "pause": EVERYWHERE,  # SIGSTOP, and SIGCONT before the others give up; of a thread, nothing leaves it for so long
    "freeze": EVERYWHERE,  # the same for longer than the deadline
    "term": EVERYWHERE,
    "usr1": EVERYWHERE,
    "reset": EVERYWHERE,  # every connection of the process is shut down; of a thread, every link
    "slow": EVERYWHERE,  # the next writes to a link take their time
    "clock": EVERYWHERE,  # the time of day jumps by a day: time.time is another from now on
    "again": ("upload",),  # the update is delivered twice
    "flip": ("broadcast", "upload"),  # one bit of the next large piece on a link
    "exception": ("train", "upload"),
    "hang": ("train",),  # no step follows; of a thread, which nothing can interrupt, none for longer than the deadline
    "memory": ("train",),  # as when an allocation fails
    "nan": ("train", "upload"),  # in the weights while training; in the update behind all of the client's own checks
    "full": ("commit",),  # no file may grow beyond 64 bytes (RLIMIT_FSIZE): the kernel refuses the write, as on a full disk
    "truncate": ("committed",),  # the newest checkpoint loses its second half, and the process is killed
}
WHY_NOT = {
    "exception": "only a client's work is caught; elsewhere an exception ends the job, as a kill does",
    "memory": "allocations are large in training alone",
    "hang": "what a client's turn does is watched, and what takes long in it is training; a peer without a word is `freeze`",
    "nan": "only training makes numbers",
    "again": "only updates are delivered",
    "flip": "large pieces travel in these phases alone",
    "full": "only the checkpoint is large",
    "truncate": "there is no other moment at which a checkpoint is new",
}


def kill_self() -> None:
    """As when a machine goes down."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_self(seconds: float) -> None:
    """Stop this process; a child of nobody lets it go on later. Threads do so one after the other, each with a child of its own."""
    with _stopping:
        subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def reset_connections() -> None:
    """Shut every connection of this process down, to other machines and on this one, under the feet of whoever uses it."""
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as one:
                listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if one.type == socket.SOCK_STREAM and not listens:
                    one.shutdown(socket.SHUT_RDWR)
        except OSError:  # not a socket, or not connected
            continue


def fill_disk() -> None:
    """From now on this process can write no file of more than a few bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def jump_clock() -> None:
    """A day passes at once, for all who ask for the time of day."""
    today = time.time
    time.time = lambda: today() + 86400.0


def fail() -> None:
    """An error in a client's work."""
    raise RuntimeError("a fault of the campaign")


def out_of_memory() -> None:
    """What Python says when an allocation fails."""
    raise MemoryError("a fault of the campaign: out of memory")


DONE_AT_ONCE: Mapping[str, Callable[[], None]] = {
    "kill": kill_self,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "reset": reset_connections,
    "clock": jump_clock,
    "exception": fail,
    "hang": lambda: time.sleep(1e6),
    "memory": out_of_memory,
    "full": fill_disk,
}
