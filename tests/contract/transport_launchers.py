"""Ways to start the ranks of the contract suite, one for each transport. Whatever a launcher started, it ends by its pid."""

import ast
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from transport_cases import CHUNK_BYTES
from transport_ranks import Report, run_cases, spawned_rank

from fedmpi.transports import in_process

HERE = Path(__file__).parent
LIMIT_S = 120
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
OVERSUBSCRIBED = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_threads(names: list[str], size: int, timeout_s: float) -> dict[int, Report]:
    """Ranks as threads of this process."""
    reports: dict[int, Report] = {}
    transports = in_process.open_all(size, timeout_s=timeout_s, chunk_bytes=CHUNK_BYTES)
    threads = []
    for t in transports:
        t._in_threads = True
        threads.append(threading.Thread(target=lambda t=t: reports.update({t.rank: run_cases(t, names)})))
        threads[-1].start()
    for thread in threads:
        thread.join(LIMIT_S)
    return reports


class Spawned:
    """Ranks as processes forked from a server that has torch imported already."""

    def __init__(self, timeout_s: float, size: int, apart: bool = False) -> None:
        self.timeout_s, self.size, self.port, self.apart = timeout_s, size, free_port(), apart
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["transport_ranks", "fedmpi.transports.torch_dist"])
        self.started: list[tuple[int, multiprocessing.Process, object]] = []

    def start(self, names: list[str], rank: int) -> None:
        """Start one rank."""
        back, to_child = self.context.Pipe(duplex=False)
        arguments = (names, rank, self.size, self.port, self.timeout_s, self.apart, to_child)
        process = self.context.Process(target=spawned_rank, args=arguments)
        process.start()
        to_child.close()
        self.started.append((rank, process, back))

    def reports(self) -> dict[int, Report]:
        """What the ranks reported; one that was killed reports nothing."""
        got: dict[int, Report] = {}
        try:
            for rank, _, back in self.started:
                try:
                    if back.poll(LIMIT_S):
                        got[rank] = back.recv()
                except EOFError:
                    continue
        finally:
            for one in self.started:
                one[1].kill()
                one[1].join()
        return got


def over_tcp(names: list[str], size: int, timeout_s: float) -> dict[int, Report]:
    """All ranks of a world over TCP, as if each were on a machine of its own."""
    return over_torch(names, size, timeout_s, apart=True)


def over_torch(names: list[str], size: int, timeout_s: float, apart: bool = False) -> dict[int, Report]:
    """All ranks of a world that meet through torch's store; on one machine they lend each other memory."""
    ranks = Spawned(timeout_s, size, apart)
    for rank in range(size):
        ranks.start(names, rank)
    return ranks.reports()


def over_mpi(names: list[str], size: int, timeout_s: float) -> dict[int, Report]:
    """All ranks of a world under mpirun, as if each were on a machine of its own."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, str(HERE / "transport_ranks.py"), ",".join(names), str(timeout_s), folder]
        paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        environ = {**os.environ, **OVERSUBSCRIBED, "PYTHONPATH": paths}
        subprocess.run([str(MPIRUN), "-n", str(size), *program], env=environ, timeout=LIMIT_S, check=False)
        return {int(path.name): ast.literal_eval(path.read_text()) for path in Path(folder).iterdir()}


LAUNCHERS = {"in_process": in_threads, "tcp": over_tcp, "shared": over_torch, "mpi": over_mpi}
