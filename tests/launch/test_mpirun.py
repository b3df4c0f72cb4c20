"""mpirun of Open MPI and of MPICH: the same bytes, and a rank that fails ends the job on all of them."""

import os
import sys
from pathlib import Path

import pytest
from program import FEDBIOT, RECIPE, REPOSITORY, adapter_of, run

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(600)]
WANTED = ("--config", str(RECIPE), "--run_dir", "run")
OPEN_MPI = Path(sys.prefix)
MPICH = Path(os.environ.get("FEDMPI_TEST_MPICH", f"{sys.prefix}-mpich"))
COLLECTIVE, SUMS = (("--exchange", exchange, "--aggregation.record_error=false") for exchange in ("collective", "sums"))


def environment_of(mpi: Path) -> dict[str, str]:
    if not (mpi / "bin" / "mpirun").exists():
        pytest.skip(f"no {mpi / 'bin' / 'mpirun'}: launch/test.sh makes this environment")
    return {"VENV": str(mpi)}


def mpirun(ranks: int, *more: str) -> list[str]:
    return ["bash", str(REPOSITORY / "launch/mpirun.sh"), str(ranks), *WANTED, *more]


# MPICH's ranks spin while they wait: more of them than cores take minutes
@pytest.mark.parametrize(
    ("mpi", "name", "ranks", "more"),
    [(OPEN_MPI, "Open MPI", 4, COLLECTIVE), (MPICH, "MPICH", 2, ())],
    ids=["openmpi-collective", "mpich-star"],
)
def test_mpirun_gives_the_same_bytes(
    mpi: Path, name: str, ranks: int, more: tuple[str, ...], tmp_path: Path, expected: str
) -> None:
    output = run(mpirun(ranks, *more), tmp_path, **environment_of(mpi))
    assert f"{ranks} ranks from mpirun of {name}, transport mpi" in output
    assert adapter_of(tmp_path / "run") == expected


def test_torch_links_and_sums_under_mpirun(tmp_path: Path, expected: str) -> None:
    output = run(mpirun(3, *SUMS, "--transport", "torch"), tmp_path, **environment_of(OPEN_MPI))
    assert "3 ranks from mpirun of Open MPI, transport torch" in output
    assert adapter_of(tmp_path / "run") == expected


def test_fedbiot_gives_the_bytes_of_one_process(tmp_path: Path, fedbiot_alone: Path) -> None:
    run(mpirun(4, *FEDBIOT), tmp_path, **environment_of(OPEN_MPI))
    assert adapter_of(tmp_path / "run") == adapter_of(fedbiot_alone / "run")


@pytest.mark.parametrize("mpi", [OPEN_MPI, MPICH], ids=["openmpi", "mpich"])
def test_a_data_file_that_is_not_there_ends_every_rank(mpi: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    command = mpirun(2, "--data.name", "json", "--data.path", str(missing), "--data.splitter", "iid")
    output = run(command, tmp_path, code=None, **environment_of(mpi))
    assert str(missing) in output and "Traceback" not in output
