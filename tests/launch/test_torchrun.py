"""torchrun: one and several agents, signals, kills, and the same bytes from all of them."""

import signal
import subprocess
import sys
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


def standalone(ranks: int) -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc_per_node", str(ranks), *PROGRAM, "--run_dir", "run"]


@pytest.mark.parametrize(("ranks", "exchange"), [(2, "sums"), (7, "collective")])  # 4 and the star are what the quickstart starts
def test_every_number_of_ranks_and_way_gives_the_same_bytes(ranks: int, exchange: str, tmp_path: Path, expected: str) -> None:
    output = run([*standalone(ranks), "--exchange", exchange, "--aggregation.record_error=false"], tmp_path)
    assert f"{ranks} ranks from torchrun, transport torch" in output
    assert adapter_of(tmp_path / "run") == expected


def test_two_agents_meet_over_c10d(tmp_path: Path, expected: str) -> None:
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command = [*TORCHRUN, *meeting, "--rdzv-id", "two", "--nproc_per_node", "2", *PROGRAM, "--run_dir", "run"]
    with ExitStack() as stack:
        agents = [stack.enter_context(started(command, tmp_path)) for _ in range(2)]
        codes = [agent.wait(LAUNCH_S) for agent in agents]
    assert codes == [0, 0], (tmp_path / "output.txt").read_text()[-6000:]
    assert adapter_of(tmp_path / "run") == expected


def test_usr1_to_the_agent_commits_and_another_placement_goes_on(tmp_path: Path, expected: str) -> None:
    command = ["bash", str(REPOSITORY / "launch/torchrun.sh"), "3", "--config", str(RECIPE), "--run_dir", "run"]
    with started(command, tmp_path, VENV=sys.prefix) as agent:
        wait_for(lambda: rounds_of(tmp_path / "run"), agent, "a committed round")
        agent.send_signal(signal.SIGUSR1)
        agent.wait(LAUNCH_S)
    assert state_of(tmp_path / "run") == "preempted", (tmp_path / "output.txt").read_text()[-6000:]
    assert not (tmp_path / "run" / "summary.json").exists()
    run([sys.executable, *PROGRAM, "--run_dir", "run"], tmp_path)
    assert adapter_of(tmp_path / "run") == expected


def test_killed_without_warning_and_resumed_on_fewer_ranks(tmp_path: Path, expected: str) -> None:
    with started(standalone(3), tmp_path) as agent:
        wait_for(lambda: rounds_of(tmp_path / "run"), agent, "a committed round")
        kill_all(agent)
    assert state_of(tmp_path / "run") == "running"
    run(standalone(2), tmp_path)
    assert adapter_of(tmp_path / "run") == expected


def test_one_process_stopped_by_a_signal_says_so_in_its_exit_code(tmp_path: Path, expected: str) -> None:
    command = [sys.executable, *PROGRAM, "--run_dir", "run"]
    with started(command, tmp_path) as process:
        wait_for(lambda: rounds_of(tmp_path / "run"), process, "a committed round")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LAUNCH_S) == 75
    assert state_of(tmp_path / "run") == "preempted"
    run(standalone(2), tmp_path)
    assert adapter_of(tmp_path / "run") == expected


def test_a_rank_that_never_arrives_is_named(tmp_path: Path) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    output = run([sys.executable, *PROGRAM, "--run_dir", "run", "--timeout_s", "4"], tmp_path, code=1, **alone)
    (line,) = [line for line in output.splitlines() if "rank 1" in line]
    assert "Traceback" not in output and "4" in line
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_reader_that_goes_away_is_one_line_and_no_traceback(tmp_path: Path, expected: str) -> None:
    command = f"set -o pipefail; {sys.executable} {' '.join(PROGRAM)} --run_dir run | head -1"
    output = run(["bash", "-c", command], tmp_path, code=1)
    assert "Traceback" not in output and "what this prints to was closed" in output and "Exception ignored" not in output
    assert state_of(tmp_path / "run") == "failed"
    run([sys.executable, *PROGRAM, "--run_dir", "run"], tmp_path)
    assert adapter_of(tmp_path / "run") == expected


def test_two_launchers_at_once_are_refused(tmp_path: Path) -> None:
    both = {"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, *PROGRAM], cwd=tmp_path, env=both, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--transport torch or --transport mpi" in done.stderr and len(done.stderr.strip().splitlines()) == 1
