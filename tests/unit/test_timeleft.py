"""The end of a job: from the user, from Slurm's variable, from squeue; and what is not known is said."""

import math
import os
import time
from pathlib import Path

import pytest

from fedmpi import timeleft


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0:09", 9), ("1:02", 62), ("3:04:05", 11045), ("2-03:04:05", 183845), ("10-00:00:00", 864000), ("UNLIMITED", math.inf)],
)
def test_slurms_way_to_write_a_time(text: str, seconds: float) -> None:
    assert timeleft.parse(text) == seconds


def test_the_user_is_heard_first_then_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    job = {"SLURM_JOB_ID": "5"}
    assert timeleft.seconds(None, {}) == math.inf
    assert timeleft.seconds(7.0, {**job, "SLURM_JOB_END_TIME": "0"}) == 7.0
    assert timeleft.seconds(None, {**job, "SLURM_JOB_END_TIME": str(time.time() + 100)}) == pytest.approx(100, abs=5)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for answer, known in (("echo 1:30", 90), ("echo INVALID", math.inf), ("exit 1", math.inf)):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / "squeue").chmod(0o755)
        assert timeleft.seconds(None, job) == known
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("time limit of job 5 is not known" in line and "--time_left_s" in line for line in said)
