"""Who am I: launcher, rank and store, read from the environment and from nothing else.

Pure: a mapping goes in, a frozen World comes out. It never knows torch, MPI, a socket, a file or the clients of the
federation, and it never writes to the environment (DeepSpeed asserts on launcher variables under mpirun).

Who wins when several speak: torchrun and mpirun start their ranks *inside* a Slurm allocation, so beside either of them
Slurm's variables only describe the machines. torchrun beside mpirun is two claims about one rank: an error, unless
--transport chooses.
"""

import importlib.util
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

from fedmpi.errors import WorldError

Transport = Literal["torch", "mpi", "in_process"]
Environ = Mapping[str, str]

TRANSPORTS = ("auto", "torch", "mpi", "in_process")
LAUNCHERS = {
    "torchrun": "torchrun",
    "env": "RANK and WORLD_SIZE set by hand",
    "openmpi": "mpirun of Open MPI",
    "mpich": "mpirun of MPICH",
    "srun": "srun",
    "srun-pmix": "srun with PMIx",
    "none": "no launcher",
}
FIRST_PORT, NUM_PORTS = 20000, 12000  # below Linux's ephemeral ports: no outgoing connection can already sit on ours


@dataclass(frozen=True)
class World:
    """One rank's place among the ranks. The ranks meet at `store`; the one with `hosts_store` has to open it."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    transport: Transport
    store: str | None = None
    restart: int = 0
    hosts_store: bool = False
    outlives: bool = False  # the launcher says that it leaves the other ranks alone when one is lost

    def describe(self) -> str:
        """The one log line that says what was decided."""
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        at = f", store {self.store}" if self.store and self.transport == "torch" else ""
        again = f", restart {self.restart}" if self.restart else ""
        return (
            f"{ranks} from {LAUNCHERS[self.launcher]}, transport {self.transport}{at}{again}; "
            f"this is rank {self.rank}, with local rank {self.local_rank} among {self.local_size} on its node"
        )


def mpi_installed() -> bool:
    """Whether mpi4py is there to be imported; it is not imported here."""
    return importlib.util.find_spec("mpi4py") is not None


def from_environment(environ: Environ, transport: str = "auto", has_mpi: Callable[[], bool] = mpi_installed) -> World:
    """The world that the launcher's variables describe; a `transport` other than auto overrides and settles conflicts."""
    if transport not in TRANSPORTS:
        raise WorldError(f"--transport {transport}: expected one of {', '.join(TRANSPORTS)}")
    world = _read(environ, transport)
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
        raise WorldError(
            f"{LAUNCHERS[world.launcher]} gives rank {world.rank} of {world.size}, local rank {world.local_rank} of "
            f"{world.local_size}: a rank must be below its size; start the job anew"
        )
    return _with_transport(world, transport, has_mpi)


def _read(environ: Environ, transport: str) -> World:
    torch, mpi = _torch_variables(environ), _mpi_variables(environ)
    if torch and mpi and transport not in ("torch", "mpi"):
        raise WorldError(
            f"two launchers at once: {', '.join(torch)} say torchrun, {', '.join(mpi)} say mpirun; "
            "choose with --transport torch or --transport mpi, or unset what is left over"
        )
    if torch and not (mpi and transport == "mpi"):
        return _torchrun(environ)
    if mpi:
        return _open_mpi(environ) if "OMPI_COMM_WORLD_SIZE" in environ else _mpich(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _srun(environ)
    return World("none", 0, 1, 0, 1, "in_process", restart=_number(environ, "SLURM_RESTART_COUNT", 0))


def _torch_variables(environ: Environ) -> list[str]:
    found = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if len(found) == 1:
        other = "WORLD_SIZE" if found == ["RANK"] else "RANK"
        raise WorldError(f"{found[0]} is set without {other}: set both or unset it")
    return found + [name for name in ("TORCHELASTIC_RUN_ID",) if found and name in environ]


def _mpi_variables(environ: Environ) -> list[str]:
    """mpirun's own variables. srun --mpi=pmi2 sets PMI_RANK too, but never Hydra's MPI_LOCALNRANKS: that is srun."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return [name for name in ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE") if name in environ]
    hydra = "MPI_LOCALNRANKS" in environ or "SLURM_STEP_ID" not in environ
    return ["PMI_RANK", "PMI_SIZE"] if hydra and "PMI_RANK" in environ and "PMI_SIZE" in environ else []


def _torchrun(environ: Environ) -> World:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    elastic = "TORCHELASTIC_RUN_ID" in environ
    store = _meeting_point(environ)
    if store is None and (elastic or size > 1):
        raise WorldError(f"RANK={rank} and WORLD_SIZE={size} are set without MASTER_ADDR and MASTER_PORT: set both, or unset RANK")
    return World(
        launcher="torchrun" if elastic else "env",
        rank=rank,
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", rank),
        local_size=_number(environ, "LOCAL_WORLD_SIZE", size),
        transport="torch",
        store=store,
        restart=_number(environ, "TORCHELASTIC_RESTART_COUNT", _number(environ, "SLURM_RESTART_COUNT", 0)),
        hosts_store=rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _open_mpi(environ: Environ) -> World:
    names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
    job = environ.get("PMIX_NAMESPACE", "")
    return _mpirun("openmpi", environ, names, job)


def _mpich(environ: Environ) -> World:
    names = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"]
    return _mpirun("mpich", environ, names, environ.get("PMI_JOBID", ""))


def _mpirun(launcher: str, environ: Environ, names: list[str], job: str) -> World:
    """`names` are the variables of rank, size, local rank and local size; `job` tells two jobs of one machine apart."""
    rank, size = _number(environ, names[0]), _number(environ, names[1])
    local_size = _number(environ, names[3], size)
    here = f"127.0.0.1:{_port(launcher, job)}" if local_size == size else None
    return World(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=_number(environ, names[2], rank),
        local_size=local_size,
        transport="mpi",
        store=_meeting_point(environ) or here,
        restart=_number(environ, "SLURM_RESTART_COUNT", 0),
        hosts_store=rank == 0,
        outlives=environ.get("OMPI_MCA_mpi_ft_enable") == "1",  # what --with-ft ulfm sets
    )


def _srun(environ: Environ) -> World:
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    nodes = hostnames(environ.get("SLURM_STEP_NODELIST", ""))
    restart = _number(environ, "SLURM_RESTART_COUNT", 0)
    host = nodes[0] if len(nodes) > 1 else "127.0.0.1"
    port = _port(environ.get("SLURM_JOB_ID", ""), environ["SLURM_STEP_ID"], str(restart))
    return World(
        launcher="srun-pmix" if "PMIX_RANK" in environ else "srun",
        rank=rank,
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID", rank),
        local_size=_tasks_of_this_node(environ, size),
        transport="torch",
        store=_meeting_point(environ) or f"{host}:{port}",
        restart=restart,
        hosts_store=rank == 0,
        outlives=environ.get("SLURM_KILL_BAD_EXIT") == "0",  # srun reads it as --kill-on-bad-exit=0, which leaves no trace itself
    )


def _tasks_of_this_node(environ: Environ, size: int) -> int:
    counts = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = _number(environ, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise WorldError(f"SLURM_NODEID is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(counts)} nodes: {counts}")
    return counts[node]


def _with_transport(world: World, transport: str, has_mpi: Callable[[], bool]) -> World:
    if transport == "in_process" and world.size > 1:
        raise WorldError(f"--transport in_process is for one process, but {LAUNCHERS[world.launcher]} started {world.size}")
    if transport in ("torch", "mpi") and world.launcher == "none":
        raise WorldError(f"--transport {transport} needs a launcher, and none has set its variables: use torchrun, mpirun or srun")
    if transport == "torch" and not world.store:
        raise WorldError(
            f"--transport torch under {LAUNCHERS[world.launcher]} on several nodes has no address to meet at: "
            "export MASTER_ADDR (rank 0's node, by a name that every node resolves) and MASTER_PORT to all ranks"
        )
    if transport != "auto":
        return replace(world, transport=cast(Transport, transport))
    if world.size == 1:
        return replace(world, transport="in_process")
    return replace(world, transport="mpi") if world.launcher == "srun-pmix" and has_mpi() else world


def _meeting_point(environ: Environ) -> str | None:
    """MASTER_ADDR:MASTER_PORT, which a user may set under every launcher."""
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        return None
    return f"{environ['MASTER_ADDR']}:{_number(environ, 'MASTER_PORT')}"


def _number(environ: Environ, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        raise WorldError(f"environment variable {name}: expected a whole number, found {text!r}")
    return int(text)


def _port(*job: str) -> int:
    """The same port on every rank of one job, most likely another one for the next job."""
    return FIRST_PORT + zlib.crc32(".".join(job).encode()) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Slurm's run-length list: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise WorldError(f"SLURM_STEP_TASKS_PER_NODE: expected a list like 2(x3),1, found {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def hostnames(text: str) -> list[str]:
    """Slurm's host list, as `scontrol show hostnames` prints it: `gpu[08-09,12],login` is gpu08, gpu09, gpu12, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names += _expand(part)
    return names


def _expand(part: str) -> list[str]:
    found = re.search(r"\[([^\]]*)\]", part)
    if not found:
        return [part]
    names: list[str] = []
    for piece in found[1].split(","):
        first, _, last = piece.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise WorldError(f"SLURM_STEP_NODELIST: expected ranges like [08-10,12], found {part!r}")
        numbers = range(int(first), int(last or first) + 1)
        heads = [part[: found.start()] + str(number).zfill(len(first)) for number in numbers]
        names += [head + rest for head in heads for rest in _expand(part[found.end() :])]
    return names
