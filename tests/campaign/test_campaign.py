"""A short campaign of real faults, and what the checker says once a protection is switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.unprotected import PROTECTIONS

ROOT = Path(__file__).parents[2]


def campaign(out: Path, *arguments: str, code: int) -> list[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.campaign", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=out, timeout=1500, check=False)
    assert done.returncode == code, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.timeout(1600)
def test_sixty_faults_leave_no_hang_and_no_wrong_result(tmp_path: Path) -> None:
    short = ("--rounds", "5", "--deadline_s", "2", "--launchers", "in_process=7,torchrun=1", "--at_once", "2")
    said = campaign(tmp_path, "--faults", "60", "--seed", "3", *short, code=0)
    runs = [json.loads(line) for line in (tmp_path / "results.jsonl").open()]
    assert sum(len(run["made"]) for run in runs) >= 55  # the rest was overtaken: a run may end before a fault comes to its turn
    assert not any(run["wrong"] for run in runs) and {run["launcher"] for run in runs} == {"in_process", "torchrun"}
    assert "hangs: 0" in said and "wrong: 0" in said
    results = (tmp_path / "results.jsonl").read_bytes()
    again = campaign(tmp_path, "--faults", "60", "--seed", "3", *short, code=0)  # a campaign that is done is not done again
    assert (tmp_path / "results.jsonl").read_bytes() == results and again[-3:] == said[-3:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", PROTECTIONS)
def test_without_a_protection_the_checker_fails(tmp_path: Path, name: str) -> None:
    said = campaign(tmp_path, "--without", name, "--rounds", "5", "--limit_s", "60", code=1)
    told = json.loads(said[-1])
    assert told["made"] and told["wrong"] and not told["with_it"]
