"""How the launch tests start the real program, as a user does, and end what they started by its process id."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("tiny.yaml")
PROGRAM = ("-m", "fedmpi.run", "--config", str(RECIPE))
HERE = str(Path(__file__).parent)
FEDBIOT = (
    *("--algorithm=fedbiot", "--clients=3", "--clients_per_round=3", "--data.num_rows=60", "--rounds=2", "--eval.task=none"),
    *("--offsite.drop_rate=0.5", "--offsite.prealign_steps=2", "--offsite.align_steps=1"),
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LAUNCH_S = 280  # ten times what an idle machine of two cores needs
LAUNCHERS = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "HYD")
BY_HAND = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k not in BY_HAND}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


@contextmanager
def started(command: Sequence[str], folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A command that is running; whatever is left of it and of its children at the end is killed."""
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(**more), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            text=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the process and everything below it, as when a machine goes down."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=20)
    process.wait(20)


def run(command: Sequence[str], folder: Path, code: int | None = 0, seconds: float = LAUNCH_S, **more: str) -> str:
    """Run to the end and give what was printed; the exit code must be `code`, or any but zero when that is None."""
    folder.mkdir(parents=True, exist_ok=True)
    with started(command, folder, **more) as process:
        found = process.wait(seconds)
    output = (folder / "output.txt").read_text()
    right = found == code if code is not None else found != 0
    assert right, f"{' '.join(command)} exited {found}, expected {'an error' if code is None else code}\n{output[-6000:]}"
    return output


def adapter_of(run_dir: Path) -> str:
    """SHA-256 of the adapter file, the one thing that no placement and no launcher may change."""
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def state_of(run_dir: Path) -> str:
    """What state.json says, or nothing while there is none."""
    with suppress(FileNotFoundError):
        return str(json.loads((run_dir / "state.json").read_text())["state"])
    return ""


def rounds_of(run_dir: Path) -> int:
    """Committed rounds so far."""
    with suppress(FileNotFoundError):
        lines: list[Mapping[str, object]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
        return len({line["round"] for line in lines if "event" not in line})
    return 0


def wait_for(done: Callable[[], object], process: subprocess.Popen[str], what: str) -> None:
    """Poll until `done()`, and fail at once when the process ends before."""
    deadline = time.monotonic() + LAUNCH_S
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"waited for {what}: process {process.args} has code {process.poll()}")
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
