"""Ranks for launchers that start programs, without the seconds that each program takes to import what it needs.

    python -S -I warm.py SOCKET FOLDER        what mpirun and srun start: a small program that stands in for a rank

The rank is a fork of a server that is warm: with the environment, folder, output and namespaces of the program that stands in for
it. Signals are passed on to the rank, whose end is the end of the program, by the same code or signal; and where the program is
killed, so is its rank. What the launcher's library says to the launcher, the rank says itself.
"""

import atexit
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NAMESPACES = ("net", "uts", "mnt")
KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def stand_in(address: str, folder: str) -> int:
    """Ask for a rank, and end as it ends."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: line.send(bytes([number])))
        said = {"folder": folder, "here": os.getcwd(), "environ": dict(os.environ), "pid": os.getpid()}
        socket.send_fds(line, [json.dumps(said).encode() + b"\n"], [0, 1, 2])
        code = int(line.recv(16) or b"70")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def serve(address: Path, work: Callable[[Path], int]) -> int:
    """Fork a rank for each program that asks, for ever."""
    asked, watched = socket.socket(socket.AF_UNIX), selectors.DefaultSelector()
    asked.bind(str(address))
    asked.listen()
    watched.register(asked, selectors.EVENT_READ, lambda: _begin(asked, watched, work))
    while True:
        for key, _ in watched.select():
            key.data()


def _begin(asked: socket.socket, watched: selectors.BaseSelector, work: Callable[[Path], int]) -> None:
    line, _ = asked.accept()
    request, files, _, _ = socket.recv_fds(line, 1 << 20, 3)
    while not request.endswith(b"\n") and (more := line.recv(1 << 20)):
        request += more
    if (rank := os.fork()) == 0:
        asked.close()
        line.close()
        _be(json.loads(request), files, work)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(rank)

    def end() -> None:
        watched.unregister(ended)
        watched.unregister(line)
        with suppress(OSError):
            line.send(str(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])).encode())
        line.close()
        os.close(ended)

    def pass_on() -> None:
        with suppress(OSError):  # it may have ended just now
            for number in line.recv(16) or [signal.SIGKILL]:
                os.kill(rank, number)

    watched.register(ended, selectors.EVENT_READ, end)
    watched.register(line, selectors.EVENT_READ, pass_on)


def _be(said: dict[str, Any], files: list[int], work: Callable[[Path], int]) -> None:
    """The rank: in the place of the program that asked for it."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
        for number, file in enumerate(files):
            os.dup2(file, number)
        for name in NAMESPACES:
            there, here = f"/proc/{said['pid']}/ns/{name}", f"/proc/self/ns/{name}"
            if os.readlink(there) != os.readlink(here):
                ctypes.CDLL(None).setns(os.open(there, os.O_RDONLY), 0)
        os.chdir(said["here"])
        os.environ.clear()
        os.environ.update(said["environ"])
        atexit._clear()  # what the server would do at its end
        code = work(Path(said["folder"]))
        atexit._run_exitfuncs()
        if (mpi := sys.modules.get("mpi4py.MPI")) is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()  # as mpi4py does when a program ends
        sys.stdout.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(stand_in(sys.argv[1], sys.argv[2]))
