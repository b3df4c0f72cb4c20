"""Fixtures of the launch tests: a Slurm cluster, shared by the whole session."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not found (Debian: munge slurmctld slurmd slurm-client)")
    with running_cluster() as cluster:
        yield cluster
