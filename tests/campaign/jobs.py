"""Starting a job under each launcher, and ending all of it. What a job costs is mostly getting ready: this process does it once.

in_process   a fork of this process, in which the ranks are threads
torchrun     a fork of this process becomes torchrun's elastic agent (torch.distributed.launcher), whose workers are its forks;
             the agent restarts them, so one job takes many faults
mpirun       Open MPI's own command, for programs that stand in for forks of this process (warm.py)
srun         the same under a real Slurm of three virtual nodes, which the first job starts (tests/launch/cluster.py)
"""

import ctypes
import importlib
import json
import os
import pkgutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import transformers

import fedmpi
from fedmpi import models
from fedmpi.settings import recipe
from tests.campaign import rank, warm
from tests.campaign.faults import DEADLINE_S
from tests.campaign.plan import NUM_RANKS
from tests.lockstep.conftest import write_model

LAUNCHERS = ("in_process", "torchrun", "mpirun", "srun")
ARGUMENTS = (
    *("--model.path", "../model", "--data.name", "json", "--data.path", "../rows.jsonl", "--data.max_length", "32"),
    *("--train.steps", "2", "--train.batch_size", "2", "--train.optimizer_state", "keep", "--eval.task", "none"),
    *("--keep", "3", "--run_dir", "run"),
)
MPI_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
VARIABLES = ("SLURM_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
ALONE_WITHIN_S = 30.0
KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def write_inputs(out: Path) -> None:
    """What all runs of a campaign read: a model and rows."""
    write_model(out / "model", 2)
    rows = ({"instruction": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(60))
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def warm_up(out: Path, arguments: Sequence[str]) -> None:
    """Do what every rank does alike: import, read the settings, open a model. A process that is forked must have one thread."""
    for module in pkgutil.walk_packages(fedmpi.__path__, "fedmpi."):
        if not module.name.endswith(("__main__", ".mpi")):
            importlib.import_module(module.name)
    os.chdir(out / "model")  # as far from the model as a run is
    transformers.utils.logging.disable_progress_bar()  # it has a thread
    known = recipe.read(arguments, "campaign", "")
    recipe.read = lambda *_: known
    models.load_model(known[0].model)
    ends = time.monotonic() + ALONE_WITHIN_S
    while len(os.listdir("/proc/self/task")) > 1:  # those that loaded the model are about to end
        if time.monotonic() > ends:
            raise SystemExit("more than one thread in a process that is to be forked")
        time.sleep(0.05)


def forked(work: Callable[[], int], folder: Path | None = None, log: str | None = None) -> int:
    """Begin it in a process of its own; gives its id."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        _become(folder or Path.cwd(), work, log)
    return child


def in_a_fork(work: Callable[[], object]) -> None:
    """Do it in a process of its own, which is waited for."""

    def done() -> int:
        work()
        return 0

    if code := os.waitstatus_to_exitcode(os.waitpid(forked(done), 0)[1]):
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
    _server: Path | None = None

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

    def prepare(self, launcher: str) -> None:
        """Start what all jobs of a launcher share; those who are forked later have it."""
        if launcher in ("mpirun", "srun"):
            self.server()
        if launcher == "srun":
            self.slurm()

    def _forked(self, folder: Path, work: Callable[[], int]) -> int | None:
        child = forked(work, folder, "output.txt")
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
        more = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        start: Sequence[str]
        if launcher == "mpirun":
            beside = Path(sys.executable).with_name("mpirun")
            start, environment = [str(beside) if beside.exists() else "mpirun", "-n", str(NUM_RANKS)], kept | more | MPI_ENVIRONMENT
        else:
            beyond = f"--time={2 + int(self.limit_s // 60)}"  # a job that hangs is ended by us, not by Slurm as if it had failed
            start = ["srun", f"--nodes={NUM_RANKS}", f"--ntasks={NUM_RANKS}", "--kill-on-bad-exit=0", beyond]
            environment = kept | self.slurm().environ | more
        command = [*start, sys.executable, "-S", "-I", warm.__file__, str(self.server()), str(folder)]
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

    def server(self) -> Path:
        """Where programs that launchers start ask for their ranks; it is there from its first use on."""
        if self._server is None:
            self._server = Path(self._held.enter_context(tempfile.TemporaryDirectory())) / "ranks"
            child = forked(lambda: warm.serve(self._server, lambda folder: rank.run(folder, self.arguments)))
            self._held.callback(os.kill, child, signal.SIGKILL)
            while not self._server.exists():
                time.sleep(0.01)
        return self._server

    def close(self) -> None:
        """Take down what was started for several jobs."""
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
