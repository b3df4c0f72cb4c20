"""Starting a job under each launcher, and ending all of it. What a job costs is mostly importing torch: this process imports once.

in_process   a fork of this process, in which the ranks are threads
torchrun     a fork of this process becomes torchrun's elastic agent (torch.distributed.launcher), whose workers are its forks;
             the agent restarts them, so one job takes many faults
mpirun       Open MPI's own command, ranks are new programs
srun         the same under a real Slurm of three virtual nodes, which the first job starts (tests/launch/cluster.py)
"""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.campaign import rank
from tests.campaign.faults import DEADLINE_S
from tests.campaign.plan import NUM_RANKS

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("in_process", "torchrun", "mpirun", "srun")
ARGUMENTS = (
    *("--model.path", "../model", "--data.num_rows", "60", "--data.max_length", "64", "--train.steps", "2"),
    *("--train.batch_size", "2", "--eval.rows", "2", "--eval.task", "none", "--keep", "3", "--train.optimizer_state", "keep"),
    *("--run_dir", "run"),
)
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
VARIABLES = ("SLURM_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def warm_up() -> None:
    """Import what a rank imports, and compute nothing: a process that is forked must have one thread."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import tests.campaign.probe  # noqa: F401


def in_a_fork(work: Callable[[], object]) -> None:
    """Do it in a process of its own, which is waited for."""
    child = os.fork()
    if child == 0:
        _become(Path.cwd(), lambda: 0 if work() else 1, None)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"exit code {code}")


@dataclass
class Jobs:
    """Starts jobs, one at a time."""

    limit_s: float  # of one start; what takes longer hangs
    max_restarts: int
    rounds: int
    clients: int = 4
    deadline_s: float = DEADLINE_S
    _held: ExitStack = field(default_factory=ExitStack)
    _slurm: Any = None

    @property
    def arguments(self) -> list[str]:
        """The program's."""
        own = {"rounds": self.rounds, "clients": self.clients, "timeout_s": self.deadline_s}
        return [*(f"--{key}={value}" for key, value in own.items()), *ARGUMENTS]

    def start(self, launcher: str, folder: Path) -> tuple[int | None, float]:
        """One start: its exit code, None for a hang, and how long it took. Nothing of it is left behind."""
        began = time.monotonic()
        sys.stdout.flush()
        if launcher == "in_process":
            code = self._forked(folder, lambda: rank.run(folder, self.arguments, NUM_RANKS))
        elif launcher == "torchrun":
            code = self._forked(folder, lambda: self._agent(folder))
        else:
            code = self._command(launcher, folder)
        return code, time.monotonic() - began

    def _forked(self, folder: Path, work: Callable[[], int]) -> int | None:
        child = os.fork()
        if child == 0:
            _become(folder, work, "output.txt")
        deadline = time.monotonic() + self.limit_s
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if found[0] == 0:
            os.waitpid(child, 0)
            return None
        return os.waitstatus_to_exitcode(found[1])

    def _agent(self, folder: Path) -> int:
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        config = LaunchConfig(
            1, 1, NUM_RANKS, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=self.max_restarts,
            monitor_interval=0.05, start_method="fork",
        )  # fmt: skip
        try:
            elastic_launch(config, _worker)(str(folder), self.arguments)
        except ChildFailedError:
            return 1
        return 0

    def _command(self, launcher: str, folder: Path) -> int | None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(VARIABLES)}
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        start: Sequence[str]
        if launcher == "mpirun":
            beside = Path(sys.executable).with_name("mpirun")
            start, environment = [str(beside) if beside.exists() else "mpirun", "-n", str(NUM_RANKS)], kept | more | MPI_ENVIRONMENT
        else:
            start = ["srun", f"--nodes={NUM_RANKS}", f"--ntasks={NUM_RANKS}", "--kill-on-bad-exit=0", "--time=9"]
            environment = kept | self.slurm().environ | more
        command = [*start, sys.executable, "-m", "tests.campaign.rank", str(folder), *self.arguments]
        with (folder / "output.txt").open("a") as output:
            job = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            with suppress(subprocess.TimeoutExpired):
                job.wait(self.limit_s)
            _end_all_in(folder)
        hangs = job.returncode is None
        job.wait()
        return None if hangs else job.returncode

    def slurm(self) -> Any:
        """The cluster, from its first use on."""
        if self._slurm is None:
            from tests.launch.cluster import running_cluster

            self._slurm = self._held.enter_context(running_cluster())
        return self._slurm

    def close(self) -> None:
        """Take the cluster down."""
        self._held.close()


def _become(folder: Path, work: Callable[[], int], log: str | None) -> None:
    """In a forked process: a job of its own, that dies with the campaign."""
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
        os.chdir(folder)
        if log is not None:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        code = work()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001  whatever it is, it ends here and is written down
        traceback.print_exc()
    finally:
        os._exit(code)


def _worker(folder: str, arguments: list[str]) -> None:
    """A rank under the agent, whose sockets a program started anew would not have."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.close(int(name))
    ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
    if code := rank.run(Path(folder), arguments):
        sys.exit(code)


def _end_all_in(folder: Path) -> None:
    """Kill whoever works in a run's folder."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(folder) in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
