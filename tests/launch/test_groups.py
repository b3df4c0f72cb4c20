"""Clients of two ranks each, as the launchers start them: a member that breaks costs its client a round, and nobody else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from program import RECIPE, REPOSITORY, TORCHRUN, run
from test_mpirun import MPICH, OPEN_MPI, environment_of

pytestmark = pytest.mark.timeout(600)
HOOK = '''
import os
from fedmpi.training import Hook

RANK = int(next(os.environ[name] for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in os.environ))

class Breaks(Hook):
    """The second member of the first client raises in its second turn, while its leader waits for it in a collective."""
    turns = 0

    def before_fit(self, model):
        type(self).turns += 1

    def before_step(self, step):
        if RANK == 2 and self.turns == 2 and step.index == 1:
            raise RuntimeError("this member breaks")
'''
SETTINGS = (
    *("--config", str(RECIPE), "--run_dir", "run", "--clients=2", "--clients_per_round=2", "--data.splitter=iid"),
    *("--rounds=3", "--eval_every=0", "--timeout_s=60"),
)


def rounds(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return [line for line in lines if "event" not in line]


def command(launcher: str, ranks: int, *settings: str) -> tuple[list[str], dict[str, str]]:
    """What starts the program on so many ranks, and the environment that it needs."""
    if launcher == "torchrun":
        start = [*TORCHRUN, "--standalone", "--nproc_per_node", str(ranks), "-m", "fedmpi.run"]
        return [*start, *SETTINGS, *settings], {}
    start = ["bash", str(REPOSITORY / "launch/mpirun.sh"), str(ranks)]
    return [*start, *SETTINGS, *settings], environment_of(OPEN_MPI if launcher == "openmpi" else MPICH)


def python_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


DDP, ZERO = ("--train.engine=ddp",), ("--train.engine=deepspeed", "--train.zero_stage=3")
CASES = [
    pytest.param("torchrun", DDP, id="torchrun-ddp"),
    pytest.param("openmpi", ZERO, id="openmpi-zero", marks=pytest.mark.mpi),
    # half a minute each, and every launcher and every engine has had its turn above
    pytest.param("torchrun", ZERO, id="torchrun-zero", marks=pytest.mark.slow),
    pytest.param("openmpi", DDP, id="openmpi-ddp", marks=[pytest.mark.mpi, pytest.mark.slow]),
    pytest.param("mpich", ZERO, id="mpich-zero", marks=[pytest.mark.mpi, pytest.mark.slow]),
]


@pytest.mark.parametrize(("launcher", "engine"), CASES)
def test_a_member_that_raises_costs_its_client_one_round(launcher: str, engine: tuple[str, ...], tmp_path: Path) -> None:
    if engine == ZERO:
        pytest.importorskip("deepspeed", reason="no deepspeed here: pip install 'fedmpi[deepspeed]'")
    (tmp_path / "breaking.py").write_text(HOOK)
    start, more = command(launcher, 5, "--ranks_per_client=2", "--train.hooks=breaking.Breaks", *engine)
    output = run(start, tmp_path, PYTHONPATH=python_path(tmp_path), **more)
    first, second, third = rounds(tmp_path)
    assert first["counted"] == third["counted"] == [0, 1]
    assert second["counted"] == [1]
    assert second["failures"] == {"0": "RuntimeError: rank 2: this member breaks"}
    assert second["seconds"] < 50  # of 60: nobody waited for the timeout
    assert output.count("Traceback") == 1  # its leader fails only because of it
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
