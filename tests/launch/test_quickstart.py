"""The first command of a newcomer, and the second time he gives it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from program import LAUNCH_S, RECIPE, REPOSITORY, adapter_of, run

QUICKSTART_S = 1200
pytestmark = pytest.mark.timeout(2 * QUICKSTART_S)
NO_PIP = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}  # with this, pip could install nothing


def test_the_second_quickstart_installs_nothing(tmp_path: Path, expected: str) -> None:
    if not (Path(sys.prefix) / ".fedmpi-mpi").exists():
        pytest.skip("this environment was not made by launch/setup.sh: run launch/test.sh")
    run(["bash", "-c", f". {REPOSITORY}/launch/setup.sh; setup mpi"], tmp_path / "first", VENV=sys.prefix)
    command = ["bash", str(REPOSITORY / "launch/quickstart.sh"), "--config", str(RECIPE), "--run_dir", "run"]
    output = run(command, tmp_path, VENV=sys.prefix, **NO_PIP)
    assert "installing" not in output
    assert "4 ranks from torchrun" in output
    assert adapter_of(tmp_path / "run") == expected


@pytest.mark.slow
def test_quickstart_from_a_fresh_copy(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout: no list of the files that belong to a fresh copy")
    for name in listed.stdout.splitlines():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, tmp_path / "copy" / name)
    command = ["bash", str(tmp_path / "copy/launch/quickstart.sh")]
    (tmp_path / "home").mkdir()
    output = run(command, tmp_path, HOME=str(tmp_path / "home"), seconds=QUICKSTART_S)
    assert "installing fedmpi[mpi]" in output and "federation" in output
    again = run([*command, "--help"], tmp_path / "again", HOME=str(tmp_path / "home"), seconds=LAUNCH_S, **NO_PIP)
    assert "installing" not in again and "--rounds" in again
