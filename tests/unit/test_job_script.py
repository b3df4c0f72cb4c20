"""slurm/job.sh decides by environment, exit code and state file; srun and scontrol here only note how they were called."""

import json
import os
import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).parents[2] / "slurm" / "job.sh"
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
mkdir -p "${@: -1}" && printf '%s' "$STATE" > "${@: -1}/state.json"
exit "$CODE"
"""


def job(folder: Path, *arguments: str, state: str = "finished", code: int = 0, time_is_up: bool = False, **more: str) -> list[str]:
    """The words that the program was started with; `requeued` as the last one where the job went back into the queue."""
    (folder / "srun").write_text(SRUN)
    (folder / "scontrol").write_text("#!/bin/bash\necho $1 > scontrol.txt\nexit 1\n")  # not killed by Slurm, it goes on at once
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    said = json.dumps({"state": state, "signal": None, "time_is_up": time_is_up})
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "CODE": str(code), "STATE": said, **more}
    done = subprocess.run(["bash", JOB, *arguments], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    requeued = (folder / "scontrol.txt").exists()
    assert done.returncode == (75 if requeued else code), done.stderr
    words = (folder / "srun.txt").read_text().splitlines()
    return words[words.index("fedmpi.run") + 1 :] + ["requeued"] * requeued


def test_a_job_finds_its_folder_again(tmp_path: Path) -> None:
    assert job(tmp_path, "--rounds", "3") == ["--rounds", "3", "--run_dir", "runs/slurm-17"]
    assert job(tmp_path, "--run_dir=mine")[-2:] == ["--run_dir", "mine"]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ([], "runs/slurm-{job}-{task}"),
        (["--run_dir", "mine"], "mine/{task}"),
        (["--run_dir=mine"], "mine/{task}"),
        (["--run_dir", "seed-%a/run"], "seed-{task}/run"),
    ],
)
def test_tasks_of_an_array_never_share_a_folder(tmp_path: Path, given: list[str], folder: str) -> None:
    for task in ("0", "11"):
        number = f"4{task}"
        words = job(tmp_path, "--seed", "%a", *given, SLURM_JOB_ID=number, SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID=task)
        assert words[:2] == ["--seed", task] and "%a" not in " ".join(words)
        assert words[-2:] == ["--run_dir", folder.format(job=number, task=task)]


@pytest.mark.parametrize(
    ("state", "code", "time_is_up", "again"),
    [
        ("preempted", 75, True, True),
        ("preempted", 1, True, True),  # a torchrun agent makes 1 of every code
        ("preempted", 75, False, False),  # somebody stopped it by hand, and not through Slurm
        ("failed", 1, False, False),
        ("finished", 0, False, False),
    ],
)
def test_a_run_that_is_out_of_time_goes_back_into_the_queue(
    tmp_path: Path, state: str, code: int, time_is_up: bool, again: bool
) -> None:
    assert (job(tmp_path, state=state, code=code, time_is_up=time_is_up)[-1] == "requeued") == again
