"""Slurm for real: a cluster of virtual nodes, srun with and without PMIx, and a job that is signalled and requeued."""

import re
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from program import FEDBIOT, LAUNCH_S, PROGRAM, RECIPE, REPOSITORY, adapter_of, clean_environment, rounds_of, state_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
PYTHON = sys.executable
JOB = str(REPOSITORY / "slurm/fedavg.sh")


def of_the_program() -> dict[str, str]:
    kept = clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", FEDMPI_PYTHON=PYTHON)
    return {name: value for name, value in kept.items() if name not in ("PATH", "SLURM_CONF")}


def srun(slurm: Cluster, run_dir: Path, *options: str) -> str:
    where = ("--nodes=2", "--time=9", *options)
    command = ("srun", *where, PYTHON, *PROGRAM, "--run_dir", str(run_dir))
    return slurm.run(*command, timeout_s=LAUNCH_S, **of_the_program())


def test_the_cluster_runs_a_step_on_two_nodes(slurm: Cluster) -> None:
    names = slurm.run("srun", "--nodes=2", "--time=1", "bash", "-c", "echo $SLURMD_NODENAME").split()
    assert sorted(names) == ["node1", "node2"]


def test_srun_gives_the_same_bytes(slurm: Cluster, tmp_path: Path, expected: str) -> None:
    if not slurm.separate_hosts:
        pytest.skip("nodes without host names of their own: needs root and network namespaces")
    output = srun(slurm, tmp_path / "run", "--ntasks-per-node=2")
    assert re.search(r"4 ranks from srun, transport torch, store node\d:", output)  # on the first node that was free
    assert adapter_of(tmp_path / "run") == expected


def test_srun_with_pmix_gives_the_same_bytes_over_mpi(slurm: Cluster, tmp_path: Path, expected: str) -> None:
    if not slurm.separate_hosts:
        pytest.skip("Slurm's pmix plugin needs nodes that are separate hosts: needs root and network namespaces")
    if "pmix" not in slurm.run("srun", "--mpi=list"):
        pytest.skip("this Slurm has no pmix plugin (Debian: slurm-client)")
    if "can not load PMIx library" in slurm.run("bash", "-c", "srun --mpi=pmix --time=1 true 2>&1 || true"):
        pytest.skip("Slurm's pmix plugin finds no libpmix.so (Debian: libpmix-dev)")
    output = srun(slurm, tmp_path / "run", "--ntasks-per-node=1", "--mpi=pmix")
    assert "2 ranks from srun with PMIx, transport mpi" in output
    assert adapter_of(tmp_path / "run") == expected


def test_a_job_knows_how_long_it_may_run(slurm: Cluster) -> None:
    ask = "import os; from fedmpi import timeleft; print(timeleft.seconds(None, os.environ))"
    assert 420 < float(slurm.run("srun", "--time=9", PYTHON, "-c", ask, **of_the_program())) <= 540


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_signalled_job_commits_is_requeued_and_ends_in_the_same_bytes(
    launcher: str, slurm: Cluster, tmp_path: Path, expected: str
) -> None:
    if not slurm.separate_hosts:
        pytest.skip("nodes without host names of their own: needs root and network namespaces")
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    options = (f"--output={log}", "--time=9", "--ntasks-per-node=1", f"--chdir={tmp_path}")
    wanted = ("--config", str(RECIPE), "--run_dir", str(run_dir))
    job = slurm.submit(*options, JOB, *wanted, **of_the_program(), FEDMPI_LAUNCHER=launcher)
    deadline = time.monotonic() + LAUNCH_S
    while not rounds_of(run_dir):
        state = slurm.job(job)["JobState"]
        assert time.monotonic() < deadline and state in ("PENDING", "CONFIGURING", "RUNNING"), (state, log.read_text())
        time.sleep(0.02)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait(job, timeout_s=LAUNCH_S)
    said = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said[-6000:]
    assert f"{run_dir}/state.json says preempted" in said
    assert state_of(run_dir) == "finished"
    assert adapter_of(run_dir) == expected


def test_fedbiot_as_a_job_gives_the_bytes_of_one_process(slurm: Cluster, tmp_path: Path, fedbiot_alone: Path) -> None:
    if not slurm.separate_hosts:
        pytest.skip("nodes without host names of their own: needs root and network namespaces")
    log, run_dir = tmp_path / "log.txt", tmp_path / "run"
    options = (f"--output={log}", "--time=9", "--ntasks-per-node=1", f"--chdir={tmp_path}")
    wanted = ("--config", str(RECIPE), *FEDBIOT, "--run_dir", str(run_dir))
    number = slurm.submit(*options, str(REPOSITORY / "slurm/fedbiot.sh"), *wanted, **of_the_program())
    ended = slurm.wait(number, timeout_s=LAUNCH_S)
    assert ended["JobState"] == "COMPLETED", log.read_text()[-6000:]
    assert adapter_of(run_dir) == adapter_of(fedbiot_alone / "run")
