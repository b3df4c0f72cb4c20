"""What the benchmarks share: an adapter of a given size, one round of the real federation, and starting ranks.

The rounds here are those of the program (Federation, Post, Conductor, exact mean) with a client that does not train.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fedmpi import aggregation, codecs
from fedmpi.federation.conductor import Conductor
from fedmpi.federation.lockstep import Federation
from fedmpi.federation.post import Post
from fedmpi.federation.sums import Terms
from fedmpi.federation.updates import Update
from fedmpi.round import SERVER, Round, place
from fedmpi.tensors import Tensors
from fedmpi.transports import in_process
from fedmpi.transports.base import Transport

RANK, WIDTH = 8, 4096  # of one LoRA pair: 8 x 4096 and 4096 x 8 in fp32 are 256 KiB
EXAMPLES = 100
STARTED = "FEDMPI_BENCH_STARTED"
LAUNCHER_VARIABLES = ("SLURM_", "PMI", "OMPI_", "MPI_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
MPI_ENVIRONMENT = {  # as root, and with more ranks than cores; elsewhere these change nothing
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@dataclass(frozen=True)
class Client:
    """A client that always sends the same tensors."""

    id: int
    tensors: Tensors
    owned: Tensors | None = None


def adapter(num_bytes: int, seed: int) -> Tensors:
    """Pairs of LoRA factors that take `num_bytes` together; below one pair's size, one smaller pair."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(num_bytes).items()}


def shapes(num_bytes: int) -> dict[str, tuple[int, ...]]:
    """Of its tensors, by name."""
    pairs, width = divmod(num_bytes, 8 * RANK * WIDTH)[0], WIDTH
    if not pairs:
        pairs, width = 1, max(1, num_bytes // (8 * RANK))
    return {f"layer{pair:05d}.{side}": (RANK, width)[:: -1 if side == "b" else 1] for pair in range(pairs) for side in "ab"}


def weight_of(client: int) -> int:
    """Unequal, so that a mean without weights would be noticed."""
    return EXAMPLES + client


def federation(
    transport: Transport | None, clients: int, rounds: int, exchange: str = "star", codec: str = codecs.RAW
) -> Federation:
    """One rank's view, greeted and welcomed, as a session does it."""
    chains = codecs.chains(codec)
    rank, size = (SERVER, 1) if transport is None else (transport.rank, transport.size)
    placement, post = place(clients, size), None if transport is None else Post(transport)
    own = {client: weight_of(client) for client in placement.hosted_by(rank)}
    terms = None if exchange == "star" else Terms("examples", own, lambda sent, rnd: partial(looked_at, sent))
    fed = Federation(placement, rank, post, up=chains, down=chains, terms=terms, collective=exchange == "collective")
    fed.greet("benchmark", own)
    if rank == SERVER:
        fed.conductor = Conductor([weight_of(client) for client in range(clients)], rounds, 0, clients)
    fed.welcome({}, 1 << 34)
    return fed


def looked_at(sent: Tensors, client: int, like: Tensors) -> "Callable[[int, torch.Tensor], float]":
    """As a rank looks at its clients' updates before it adds them up."""
    return aggregation.begin(aggregation.Wanted(sent), like)


def update(client: Client) -> Update:
    """A turn without training."""
    return Update(client.id, client.tensors, {"examples": 1.0})


def run_round(
    fed: Federation, rnd: Round, held: Tensors | None, clients: Mapping[int, Client], work: Callable[[Client], Update] = update
) -> Tensors | None:
    """Broadcast, gather, checks, exact mean, and what the server's bookkeeping does with the result; nobody trains."""
    fed.broadcast(held)
    received = fed.gather(rnd, clients, work, None if held is None else check(held))
    if held is None or fed.conductor is None:
        return None
    start = aggregation.Start(held, {}, rnd.scale, aggregation.Config(record_error=False))
    mean = aggregation.aggregate(received, start).adapter
    fed.conductor.largest = aggregation.largest(mean)
    fed.close_books()
    return mean


def check(held: Tensors) -> aggregation.Check:
    """What the program looks at in every update."""
    wanted = aggregation.Wanted(held, aggregation.most_of(aggregation.largest(held)))
    return lambda client, like: aggregation.begin(wanted, like)


def drain(fed: Federation, rounds: Iterator[Round]) -> None:
    """Read the last header and say goodbye."""
    if next(rounds, None) is not None:
        raise RuntimeError("expected no further round")
    fed.farewell()


def peak_rss_mb() -> float:
    """The high-water mark of this program's own memory. (ru_maxrss would begin with that of the process that started it.)"""
    return _status("VmHWM") / 1024


def rss_mb() -> float:
    """Memory in use now."""
    return _status("VmRSS") / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def seconds_since_start() -> float:
    """Since the command that started these ranks was given, imports included."""
    return time.time() - float(os.environ.get(STARTED, "nan"))


def start(launcher: str, num_ranks: int, script: str, arguments: Sequence[str]) -> None:
    """Run `script` on that many ranks of this machine and show what it prints; leave with its exit code if that is not 0."""
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    else:
        beside = Path(sys.executable).with_name("mpirun")
        command = [str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun", "-n", str(num_ranks), sys.executable]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    environment = kept | {"OMP_NUM_THREADS": "1", STARTED: str(time.time())} | (MPI_ENVIRONMENT if launcher == "mpirun" else {})
    ended = subprocess.run([*command, script, *arguments], env=environment, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def in_threads(size: int, work: Callable[[Transport], None]) -> None:
    """Run `work` for each of `size` ranks that are threads of this process; the first error is raised."""
    os.environ.setdefault(STARTED, str(time.time()))
    errors: list[BaseException] = []

    def rank(transport: Transport) -> None:
        try:
            with transport, transport.turn:
                work(transport)
        except BaseException as error:  # noqa: BLE001  a thread's error would otherwise be lost
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(transport,)) for transport in in_process.open_all(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def show(figures: Mapping[str, object]) -> None:
    """One JSON line."""
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in figures.items()}
    print(json.dumps(rounded), flush=True)
