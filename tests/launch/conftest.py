"""Fixtures of the launch tests: one Slurm cluster, and one undisturbed run in one process, for the whole session."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, running_cluster
from program import PROGRAM, adapter_of, run


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
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of `python -m fedmpi.run` in one process: what every launcher and every placement has to reach."""
    folder: Path = tmp_path_factory.mktemp("one-process")
    run([sys.executable, *PROGRAM, "--run_dir", "run"], folder)
    return adapter_of(folder / "run")
