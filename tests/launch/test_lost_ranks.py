"""Ranks that die or are stopped under each launcher: who goes on, and how a rank that is started again comes back."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster
from program import (
    LAUNCH_S,
    PROGRAM,
    REPOSITORY,
    TORCHRUN,
    adapter_of,
    clean_environment,
    free_port,
    rounds_of,
    started,
    state_of,
    wait_for,
)

pytestmark = pytest.mark.timeout(600)
HERE = str(Path(__file__).parent)
PACED = {"PACE_S": "0.1", "PYTHONPATH": f"{REPOSITORY}:{HERE}"}
OPTIONS = (
    "--run_dir",
    "run",
    "--clients=3",
    "--clients_per_round=3",
    "--eval_every=0",
    "--eval.task=none",
    "--train.hooks=[pace.Pace]",
)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def events_of(folder: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if line.get("event") == event]


def by_hand(rank: int, size: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **PACED}


def test_a_killed_rank_is_left_behind_and_comes_back_when_it_is_started_again(tmp_path: Path) -> None:
    """Three processes; one is killed, and started again; another is stopped for longer than the deadline, and continued."""
    command = [sys.executable, *PROGRAM, *OPTIONS, "--rounds=4000", "--on_rank_lost=continue", "--timeout_s=10"]
    port = free_port()
    with ExitStack() as stack:
        ranks = [stack.enter_context(started(command, tmp_path, **by_hand(rank, 3, port))) for rank in range(3)]
        output = tmp_path / "output.txt"
        said = lambda words: wait_for(lambda: words in output.read_text(), ranks[0], words)  # noqa: E731
        wait_for(lambda: rounds_of(tmp_path / "run"), ranks[0], "a committed round")
        ranks[2].kill()
        said("rank 2 is lost")
        again = stack.enter_context(started(command, tmp_path, **by_hand(2, 3, port)))
        said("rank 2 is back")
        ranks[1].send_signal(signal.SIGSTOP)
        said("rank 1 is lost")
        ranks[1].send_signal(signal.SIGCONT)
        said("rank 1 is back")
        there = rounds_of(tmp_path / "run")
        wait_for(lambda: rounds_of(tmp_path / "run") > there + 1, ranks[0], "two more rounds")
        again.send_signal(signal.SIGTERM)
        assert [rank.wait(LAUNCH_S) for rank in (ranks[0], ranks[1], again)] == [75] * 3, output.read_text()[-6000:]
    rounds = [line for line in lines_of(tmp_path) if "event" not in line]
    assert [line["round"] for line in rounds] == list(range(len(rounds))) and all(line["cohort"] == [0, 1, 2] for line in rounds)
    assert {tuple(line["counted"]) for line in rounds} == {(0, 1, 2), (0, 2), (1,)} and rounds[-1]["counted"] == [0, 1, 2]
    assert [line["rank"] for line in events_of(tmp_path, "rank_lost")] == [2, 1]
    assert [line["rank"] for line in events_of(tmp_path, "rank_back")] == [2, 1]


@pytest.mark.parametrize("how", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["stopped", "killed"])
def test_a_rank_that_is_lost_from_collectives_ends_the_job_on_every_rank(how: signal.Signals, tmp_path: Path) -> None:
    """Whoever is inside a collective with it comes out, and says who is missing; a stopped rank ends when it goes on."""
    wanted = ("--rounds=4000", "--exchange=collective", "--aggregation.record_error=false", "--timeout_s=10")
    port, output = free_port(), tmp_path / "output.txt"
    with ExitStack() as stack:
        command = [sys.executable, *PROGRAM, *OPTIONS, *wanted]
        ranks = [stack.enter_context(started(command, tmp_path, **by_hand(rank, 3, port))) for rank in range(3)]
        wait_for(lambda: rounds_of(tmp_path / "run"), ranks[0], "a committed round")
        ranks[2].send_signal(how)
        assert [rank.wait(LAUNCH_S) for rank in ranks[:2]] == [1, 1], output.read_text()[-6000:]
        ranks[2].send_signal(signal.SIGCONT)
        assert ranks[2].wait(LAUNCH_S) in ((1,) if how == signal.SIGSTOP else (-how,))
    said = output.read_text()
    assert "Traceback" not in said and said.count("rank 2 " + ("gave no sign of life" if how == signal.SIGSTOP else "is gone")) >= 2


@pytest.mark.slow
def test_a_rank_of_offsite_tuning_is_given_the_emulator_again(tmp_path: Path) -> None:
    """It cannot read a model for itself: it gets the server's once more, and takes part in the rounds that follow."""
    small = ["--algorithm=fedbiot", "--offsite.prealign_steps=2", "--offsite.align_steps=1", "--offsite.drop_rate=0.5"]
    run_dir = ["--run_dir", str(tmp_path / "run"), "--rounds=4000", "--on_rank_lost=continue", "--timeout_s=10"]
    command = [sys.executable, *PROGRAM, *OPTIONS[2:], *small, *run_dir]
    port, back = free_port(), tmp_path / "back"
    back.mkdir()
    with ExitStack() as stack:
        ranks = [stack.enter_context(started(command, tmp_path, **by_hand(rank, 3, port))) for rank in range(3)]
        output = tmp_path / "output.txt"
        said = lambda words: wait_for(lambda: words in output.read_text(), ranks[0], words)  # noqa: E731
        wait_for(lambda: rounds_of(tmp_path / "run"), ranks[0], "a committed round")
        ranks[2].kill()
        said("rank 2 is lost, the run goes on without clients [1]")
        stack.enter_context(started(command, back, **by_hand(2, 3, port)))
        said("rank 2 is back, with clients [1]")
        there = rounds_of(tmp_path / "run")
        wait_for(lambda: rounds_of(tmp_path / "run") > there + 1, ranks[0], "two more rounds")
        ranks[0].send_signal(signal.SIGTERM)
        assert [rank.wait(LAUNCH_S) for rank in ranks[:2]] == [75] * 2, output.read_text()[-6000:]
    first, again = [event["supply_bytes"] for event in events_of(tmp_path, "supply")]
    assert first == 2 * again, "two ranks had the emulator before the first round, and one of them once more"
    assert 1 in lines_of(tmp_path)[-1]["counted"]


def worker(agent: subprocess.Popen[str], rank: int, variable: str) -> psutil.Process:
    """The process of a rank among those below a launcher."""
    for process in psutil.Process(agent.pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.environ().get(variable) == str(rank) and "fedmpi.run" in process.cmdline():
                return process
    raise AssertionError(f"no process has {variable}={rank}")


@pytest.mark.mpi
@pytest.mark.parametrize("options", [("--with-ft", "ulfm"), ()], ids=["ulfm", "plain"])
def test_mpirun_with_ulfm_goes_on_by_itself_and_ends_all_ranks_without(options: tuple[str, ...], tmp_path: Path) -> None:
    root = {f"OMPI_ALLOW_RUN_AS_ROOT{ending}": "1" for ending in ("", "_CONFIRM")}
    root["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    mpirun = str(Path(sys.prefix) / "bin" / "mpirun")
    command = [mpirun, *options, "-n", "3", sys.executable, *PROGRAM, *OPTIONS, "--rounds=4000"]
    output = tmp_path / "output.txt"
    with started(command, tmp_path, **root, **PACED) as job:
        wait_for(lambda: rounds_of(tmp_path / "run"), job, "a committed round")
        worker(job, 2, "OMPI_COMM_WORLD_RANK").kill()
        if not options:
            # failed where the server saw it before mpirun ended it too
            assert job.wait(LAUNCH_S) and state_of(tmp_path / "run") in ("running", "failed")
            return
        wait_for(lambda: "rank 2 is lost" in output.read_text(), job, "rank 2 to be missed")
        there = rounds_of(tmp_path / "run")
        wait_for(lambda: rounds_of(tmp_path / "run") > there + 1, job, "two more rounds")
        worker(job, 0, "OMPI_COMM_WORLD_RANK").send_signal(signal.SIGTERM)
        job.wait(LAUNCH_S)
    said = output.read_text()
    assert "transport mpi" in said and "where a rank is lost, the run goes on without it (on_rank_lost auto)" in said
    assert state_of(tmp_path / "run") == "preempted", said[-6000:]
    assert [line for line in lines_of(tmp_path) if "event" not in line][-1]["counted"] == [0, 2]


def test_torchrun_starts_all_ranks_again_and_the_bytes_are_the_same(tmp_path: Path, expected: str) -> None:
    command = [*TORCHRUN, "--standalone", "--max-restarts=3", "--nproc_per_node=2", *PROGRAM, "--run_dir", "run"]
    with started(command, tmp_path) as agent:
        wait_for(lambda: rounds_of(tmp_path / "run"), agent, "a committed round")
        worker(agent, 1, "RANK").kill()
        assert agent.wait(LAUNCH_S) == 0, (tmp_path / "output.txt").read_text()[-6000:]
    assert "restart 1" in (tmp_path / "output.txt").read_text()
    assert adapter_of(tmp_path / "run") == expected


@pytest.mark.slurm
def test_under_srun_a_rank_comes_back_as_a_step_of_its_own(slurm: Cluster, tmp_path: Path) -> None:
    """--kill-on-bad-exit=0 leaves the others alone; the new step finds the store where the first line of the log says."""
    if not slurm.separate_hosts:
        pytest.skip("nodes without host names of their own: needs root and network namespaces")
    log, job_script = tmp_path / "log.txt", tmp_path / "job.sh"
    program = shlex.join([sys.executable, *PROGRAM, *OPTIONS, "--rounds=4000", "--on_rank_lost=continue"])
    job_script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=0 {program}\n")
    more = {**clean_environment(**PACED), "OMP_NUM_THREADS": "1"}
    more = {name: value for name, value in more.items() if name not in ("PATH", "SLURM_CONF")}
    where = ("--nodes=2", "--ntasks=3", "--time=9", f"--output={log}", f"--chdir={tmp_path}")
    job = slurm.submit(*where, str(job_script), **more)
    said = lambda words: until(lambda: log.exists() and words in log.read_text(), f"{words!r} in {log}")  # noqa: E731
    until(lambda: rounds_of(tmp_path / "run") > 0, "a committed round")
    task(job, 2).kill()
    said("rank 2 is lost")
    host, port = re.findall(r"store (\S+):(\d+);", log.read_text())[0]
    seat = ["env", "RANK=2", "WORLD_SIZE=3", f"MASTER_ADDR={host}", f"MASTER_PORT={port}"]
    step = f"srun --jobid={job} --overlap --nodes=1 --ntasks=1 --chdir={tmp_path} {shlex.join(seat)} {program} >> {log} 2>&1 &"
    slurm.run("bash", "-c", step, **more)
    said("rank 2 is back")
    there = rounds_of(tmp_path / "run")
    until(lambda: rounds_of(tmp_path / "run") > there + 1, "two more rounds")
    task(job, 1).send_signal(signal.SIGTERM)
    until(lambda: state_of(tmp_path / "run") == "preempted", "the run to stop")
    assert [line for line in lines_of(tmp_path) if "event" not in line][-1]["counted"] == [0, 1, 2]
    assert [line["rank"] for line in events_of(tmp_path, "rank_back")] == [2]
    slurm.wait(job)


def task(job: str, rank: int) -> psutil.Process:
    """The process of a task of a Slurm job, on whatever node."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environ = process.environ()
            if (environ.get("SLURM_JOB_ID"), environ.get("SLURM_PROCID")) == (job, str(rank)) and "fedmpi.run" in process.cmdline():
                return process
    raise AssertionError(f"job {job} has no task {rank}")


def until(done: Callable[[], object], what: str) -> None:
    """Poll until `done()`."""
    deadline = time.monotonic() + LAUNCH_S
    while not done():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)
