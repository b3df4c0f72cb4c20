"""A client of two ranks beside one of one rank, under each launcher: a member that breaks costs its client a round, nobody else."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from program import LAUNCH_S, RECIPE, REPOSITORY, TORCHRUN, run
from test_mpirun import MPICH, OPEN_MPI, environment_of
from test_slurm import of_the_program

from fedmpi.plan import figures
from fedmpi.plan.figures import Plan
from fedmpi.settings import recipe

pytestmark = pytest.mark.timeout(600)
HOOK = '''
import os
from fedmpi.training import Hook

RANK = int(next(os.environ[name] for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID") if name in os.environ))

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


def planned(asked: Sequence[str]) -> Plan:
    """What is planned for four ranks, two for the first client."""
    wanted, own = recipe.read([*SETTINGS, *(setting for setting in asked if "hooks" not in setting)], "test", "")
    plan = figures.build(wanted, own, ranks=4)
    assert plan.placement == {0: (), 1: (0,), 2: (0,), 3: (1,)}
    return plan


def start(launcher: str, slurm: Callable[[], Cluster], folder: Path, *settings: str) -> str:
    """Run the program on four ranks, two for one client and one for another; gives what was printed."""
    (folder / "breaking.py").write_text(HOOK)
    wanted = [*SETTINGS, *settings]
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    if launcher == "torchrun":
        command = [*TORCHRUN, "--standalone", "--nproc_per_node", "4", "-m", "fedmpi.run", *wanted]
        return run(command, folder, PYTHONPATH=path)
    if launcher == "srun":
        command = ["srun", "--ntasks=4", "--overcommit", "--time=9", f"--chdir={folder}", sys.executable, "-m", "fedmpi.run"]
        return slurm().run(*command, *wanted, timeout_s=LAUNCH_S, **of_the_program() | {"PYTHONPATH": path})
    command = ["bash", str(REPOSITORY / "launch/mpirun.sh"), "4", *wanted]
    return run(command, folder, PYTHONPATH=path, **environment_of(OPEN_MPI if launcher == "openmpi" else MPICH))


ENGINES = {
    "ddp": ("--train.engine=ddp",),
    "fsdp": ("--train.engine=fsdp",),
    "zero": ("--train.engine=deepspeed", "--train.zero_stage=3"),
}
FAST = ("torchrun-ddp", "openmpi-zero")  # every launch takes half a minute
MARKS = {"torchrun": [], "openmpi": [pytest.mark.mpi], "mpich": [pytest.mark.mpi], "srun": [pytest.mark.slurm]}
CASES = [
    pytest.param(launcher, engine, id=name, marks=marks if name in FAST else [*marks, pytest.mark.slow])
    for launcher, marks in MARKS.items()
    for engine in ENGINES
    for name in [f"{launcher}-{engine}"]
]


@pytest.mark.parametrize(("launcher", "engine"), CASES)
def test_a_member_that_raises_costs_its_client_one_round(
    launcher: str, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if engine == "zero":
        pytest.importorskip("deepspeed", reason="no deepspeed here: pip install 'fedmpi[deepspeed]'")
    asked = ("--groups=2,1", "--train.hooks=breaking.Breaks", *ENGINES[engine])
    output = start(launcher, lambda: request.getfixturevalue("slurm"), tmp_path, *asked)
    first, second, third = rounds(tmp_path)
    assert first["counted"] == third["counted"] == [0, 1]
    assert second["counted"] == [1]
    assert second["failures"] == {"0": "RuntimeError: rank 2: this member breaks"}
    plan = planned(asked)
    for line in (first, second, third):  # a whole adapter of each client, whoever held it in parts; down a copy for each leader
        assert (line["up_bytes"], line["down_bytes"]) == (len(line["counted"]) * plan.up_bytes, 2 * plan.down_bytes)
    assert second["seconds"] < 50  # of 60: nobody waited for the timeout
    assert output.count("Traceback") == 1  # its leader fails only because of it
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
