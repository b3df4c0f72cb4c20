"""Fixtures of the launch tests: one Slurm cluster, and the undisturbed runs in one process, for the whole session."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, running_cluster
from program import FEDBIOT, HERE, PROGRAM, adapter_of, run


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found (Debian: munge slurmctld slurmd slurm-client)")
    # pytest leaves no fixture when it is terminated; interrupted it does, and the daemons and namespaces go
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running_cluster() as cluster:
            yield cluster
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def expected_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m fedmpi.run` leaves in one process."""
    folder: Path = tmp_path_factory.mktemp("one-process")
    run([sys.executable, *PROGRAM, "--run_dir", "run"], folder)
    return folder / "run"


@pytest.fixture(scope="session")
def expected(expected_run: Path) -> str:
    """The adapter of that run: what every launcher and every placement has to reach."""
    return adapter_of(expected_run)


@pytest.fixture(scope="session")
def fedbiot_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with FedBiOT's run in one process, and what a hook saw in there (client-alone.json)."""
    folder: Path = tmp_path_factory.mktemp("fedbiot")
    paths = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *PROGRAM, *FEDBIOT, "--train.hooks=[probe.Probe]", "--run_dir", "run"]
    run(command, folder, PROBE=str(folder), PYTHONPATH=paths)
    return folder
