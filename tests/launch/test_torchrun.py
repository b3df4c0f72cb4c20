"""torchrun: one and several agents, signals, kills, and the same bytes from all of them."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from program import (
    LAUNCH_S,
    PROGRAM,
    RECIPE,
    REPOSITORY,
    TORCHRUN,
    adapter_of,
    free_port,
    kill_all,
    rounds_of,
    run,
    started,
    state_of,
    wait_for,
)

pytestmark = pytest.mark.timeout(600)


GUARDED = (str(Path(__file__).with_name("guarded.py")), *PROGRAM[2:])


def standalone(ranks: int, program: Sequence[str] = PROGRAM) -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc_per_node", str(ranks), *program, "--run_dir", "run"]


def by(exchange: str) -> list[str]:
    return ["--exchange", exchange, "--aggregation.record_error=false"]


def test_seven_ranks_give_the_same_bytes(tmp_path: Path, expected: str) -> None:  # four and the star are what the quickstart starts
    output = run([*standalone(7), *by("collective")], tmp_path)
    assert "7 ranks from torchrun, transport torch" in output
    assert adapter_of(tmp_path / "run") == expected


def test_two_ranks_give_the_same_bytes_and_neither_unpickles_anything(tmp_path: Path, expected: str) -> None:
    """No process does, whatever library it calls, from the first import on."""
    output = run(standalone(2, GUARDED), tmp_path)
    assert "2 ranks from torchrun, transport torch" in output
    assert adapter_of(tmp_path / "run") == expected


def test_two_agents_meet_over_c10d(tmp_path: Path, expected: str) -> None:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command = [*TORCHRUN, *meeting, "--rdzv-id", "two", "--nproc_per_node", "1", *PROGRAM, "--run_dir", "run", *by("sums")]
    with ExitStack() as stack:
        agents = [stack.enter_context(started(command, tmp_path)) for _ in range(2)]
        codes = [agent.wait(LAUNCH_S) for agent in agents]
    assert codes == [0, 0], (tmp_path / "output.txt").read_text()[-6000:]
    assert adapter_of(tmp_path / "run") == expected


def test_signalled_then_killed_and_each_time_another_placement_goes_on(tmp_path: Path, expected: str) -> None:
    """USR1 to the agent of three ranks commits; two ranks go on, and are killed without warning; one process ends the run."""
    run_dir = tmp_path / "run"
    command = ["bash", str(REPOSITORY / "launch/torchrun.sh"), "3", "--config", str(RECIPE), "--run_dir", "run"]
    with started(command, tmp_path, VENV=sys.prefix) as agent:
        wait_for(lambda: rounds_of(run_dir), agent, "a committed round")
        agent.send_signal(signal.SIGUSR1)
        agent.wait(LAUNCH_S)
    assert state_of(run_dir) == "preempted", (tmp_path / "output.txt").read_text()[-6000:]
    assert not (run_dir / "summary.json").exists()
    there = rounds_of(run_dir)
    with started(standalone(2), tmp_path) as agent:
        wait_for(lambda: rounds_of(run_dir) > there, agent, "another committed round")
        kill_all(agent)
    assert state_of(run_dir) == "running"
    run([sys.executable, *PROGRAM, "--run_dir", "run"], tmp_path)
    assert adapter_of(run_dir) == expected


def test_a_rank_that_never_arrives_is_named(tmp_path: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = run([sys.executable, *PROGRAM, "--run_dir", "run", "--timeout_s", "4"], tmp_path, code=1, **alone)
    (line,) = [line for line in output.splitlines() if "rank 1" in line]
    assert "Traceback" not in output and "4" in line
    assert not (tmp_path / "run" / "adapter").exists()


def test_one_process_without_a_reader_and_one_that_is_told_to_stop(tmp_path: Path, expected: str) -> None:
    """A closed pipe is one line and no traceback, a signal is an exit code; what is left, two ranks take up."""
    alone = [sys.executable, *PROGRAM, "--run_dir", "run"]
    output = run(["bash", "-c", f"set -o pipefail; {shlex.join(alone)} | head -1"], tmp_path, code=1)
    assert "Traceback" not in output and "what this prints to was closed" in output and "Exception ignored" not in output
    assert state_of(tmp_path / "run") == "failed"
    there = rounds_of(tmp_path / "run")
    with started(alone, tmp_path) as process:
        wait_for(lambda: rounds_of(tmp_path / "run") > there, process, "a committed round")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LAUNCH_S) == 75
    assert state_of(tmp_path / "run") == "preempted"
    run(standalone(2), tmp_path)
    assert adapter_of(tmp_path / "run") == expected


def test_two_launchers_at_once_are_refused(tmp_path: Path) -> None:
    both = {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, *PROGRAM], cwd=tmp_path, env=both, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--transport torch or --transport mpi" in done.stderr and len(done.stderr.strip().splitlines()) == 1
