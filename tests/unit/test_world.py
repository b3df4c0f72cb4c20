"""The environment decides: recorded variables of each launcher in, one World out."""

import pytest

from fedmpi.errors import WorldError
from fedmpi.world import World, from_environment, hostnames, tasks_per_node

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-host-5513@1",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"}
BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
SRUN = BATCH | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NODEID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node[07-08]",
}  # fmt: skip
PMIX = SRUN | {"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.17.0"}
PMI2 = SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_FD": "9"}


def yes() -> bool:
    return True


def no() -> bool:
    return False


def test_torchrun() -> None:
    assert from_environment(TORCHRUN) == World("torchrun", 3, 4, 1, 2, "torch", "node1:29400", restart=2)


def test_torchrun_agent_hosts_the_store_and_plain_env_does_not() -> None:
    first = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}
    assert not from_environment(first).hosts_store
    assert from_environment({k: v for k, v in first.items() if not k.startswith("TORCHELASTIC")}).hosts_store


def test_variables_set_by_hand_are_read_like_torchrun() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert from_environment(by_hand) == World("env", 1, 2, 1, 2, "torch", "10.0.0.1:29500")


def test_open_mpi_and_mpich() -> None:
    for environ, launcher, rank in ((OPEN_MPI, "openmpi", 1), (MPICH, "mpich", 2)):
        world = from_environment(environ)
        assert (world.launcher, world.rank, world.size, world.local_size) == (launcher, rank, 4, 4)
        assert world.transport == "mpi"


def test_mpirun_with_torch_links_meets_on_its_one_node_or_where_told() -> None:
    world = from_environment(OPEN_MPI, "torch")
    assert world.transport == "torch" and world.store is not None and world.store.startswith("127.0.0.1:")
    assert world.store == from_environment(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}, "torch").store
    two_nodes = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(WorldError, match="MASTER_ADDR"):
        from_environment(two_nodes, "torch")
    told = two_nodes | {"MASTER_ADDR": "node1", "MASTER_PORT": "2000"}
    assert from_environment(told, "torch").store == "node1:2000"


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_mpirun_inside_slurm_is_mpirun(mpirun: dict[str, str]) -> None:
    assert from_environment(BATCH | mpirun).rank == from_environment(mpirun).rank
    assert from_environment(SRUN | mpirun).launcher == from_environment(mpirun).launcher


@pytest.mark.parametrize("slurm", [BATCH, SRUN, PMIX, PMI2])
def test_torchrun_inside_slurm_is_torchrun(slurm: dict[str, str]) -> None:
    assert from_environment(slurm | TORCHRUN) == from_environment(TORCHRUN)


def test_srun() -> None:
    world = from_environment(SRUN)
    assert (world.launcher, world.rank, world.size, world.local_rank, world.local_size) == ("srun", 2, 4, 0, 2)
    assert world.transport == "torch" and world.store is not None and world.store.startswith("node07:")


def test_srun_ranks_agree_on_a_port_that_changes_with_step_and_restart() -> None:
    def store(**changes: str) -> str | None:
        return from_environment(SRUN | changes).store

    assert store(SLURM_PROCID="0", SLURM_NODEID="0") == store()
    assert len({store(), store(SLURM_STEP_ID="1"), store(SLURM_RESTART_COUNT="1"), store(SLURM_JOB_ID="18")}) == 4
    assert store(MASTER_ADDR="10.0.0.9", MASTER_PORT="2000") == "10.0.0.9:2000"


def test_srun_on_one_node_needs_no_name_to_resolve() -> None:
    one = SRUN | {"SLURM_STEP_NODELIST": "node7", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert str(from_environment(one).store).startswith("127.0.0.1:")


def test_pmix_uses_mpi_where_mpi4py_is_and_torch_where_it_is_not() -> None:
    assert from_environment(PMIX, has_mpi=yes).transport == "mpi"
    assert from_environment(PMIX, has_mpi=no).transport == "torch"
    assert from_environment(PMIX, "torch", has_mpi=yes).transport == "torch"


def test_pmi2_of_srun_is_srun_and_not_mpich() -> None:
    assert from_environment(PMI2).launcher == "srun"


def test_a_batch_script_and_an_empty_environment_are_one_process() -> None:
    for environ in ({}, BATCH, SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}):
        assert from_environment(environ) == World("none", 0, 1, 0, 1, "in_process")


def test_one_rank_of_a_launcher_needs_no_links() -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert from_environment(TORCHRUN | alone).transport == "in_process"
    assert from_environment(TORCHRUN | alone, "torch").transport == "torch"


@pytest.mark.parametrize("mpirun", [OPEN_MPI, MPICH])
def test_two_launchers_are_an_error_that_names_both_and_the_way_out(mpirun: dict[str, str]) -> None:
    both = TORCHRUN | mpirun
    with pytest.raises(WorldError) as caught:
        from_environment(both)
    for word in ("WORLD_SIZE", next(iter(mpirun)), "--transport torch", "--transport mpi"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert from_environment(both, "torch").launcher == "torchrun"
    assert from_environment(both, "mpi").launcher == from_environment(mpirun).launcher


@pytest.mark.parametrize(
    ("environ", "transport", "words"),
    [
        ({}, "gloo", "auto, torch, mpi, in_process"),
        ({}, "torch", "needs a launcher"),
        ({}, "mpi", "needs a launcher"),
        (TORCHRUN, "in_process", "one process"),
        (TORCHRUN | {"RANK": "4"}, "auto", "rank 4 of 4"),
        (TORCHRUN | {"RANK": "x"}, "auto", "RANK: expected a whole number, found 'x'"),
        ({"RANK": "0"}, "auto", "without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "auto", "without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "auto", "MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "auto", "OMPI_COMM_WORLD_RANK"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "two"}, "auto", "SLURM_STEP_TASKS_PER_NODE"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "auto", "SLURM_NODEID"),
        (SRUN | {"SLURM_STEP_NODELIST": "node[a-b]"}, "auto", "SLURM_STEP_NODELIST"),
    ],
)
def test_bad_environments_say_what_was_found(environ: dict[str, str], transport: str, words: str) -> None:
    with pytest.raises(WorldError) as caught:
        from_environment(environ, transport)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_describe_is_one_line_with_every_decision() -> None:
    decided, who = from_environment(TORCHRUN).describe().split("; ")
    assert decided == "4 ranks from torchrun, transport torch, store node1:29400, restart 2"
    assert who == "this is rank 3, with local rank 1 among 2 on its node"
    assert from_environment({}).describe().startswith("1 rank from no launcher, transport in_process; ")


def test_host_lists_as_scontrol_prints_them() -> None:
    assert hostnames("gpu[08-10,12],login") == ["gpu08", "gpu09", "gpu10", "gpu12", "login"]
    assert hostnames("r[1-2]n[1-2]") == ["r1n1", "r1n2", "r2n1", "r2n2"]
    assert hostnames("node1") == ["node1"]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
