"""What a round takes when there is next to nothing to send: a 1 KiB adapter, no training, with and without a checkpoint.

    python benchmarks/latency.py [--ranks 4] [--rounds 200] [--bytes 1024] [--launcher torchrun|mpirun|in_process]

It starts its ranks (one server, a client on each other rank) and prints one JSON line. Every second round is committed to disk
the way a run does it: state, manifest and metrics line, synced.

"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import ranks
import torch

from fedmpi import transports
from fedmpi.record.folder import RunFolder
from fedmpi.round import SERVER
from fedmpi.tensors import Tensors
from fedmpi.transports.base import Transport
from fedmpi.world import from_environment

WARM_UP = 10


def measure(asked: argparse.Namespace, transport: Transport, folder: Path) -> None:
    """One rank's part; the server shows the figures."""
    rank, num_clients = transport.rank, transport.size - 1
    fed = ranks.federation(transport, num_clients, WARM_UP + asked.rounds)
    mine = ranks.adapter(asked.bytes, seed=rank)
    held = mine if rank == SERVER else None
    clients = {} if rank == SERVER else {client: ranks.Client(client, mine) for client in fed.placement.hosted_by(rank)}
    run = RunFolder(folder, "benchmark", keep=2)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    rounds = fed.rounds()
    for index in range(WARM_UP + asked.rounds):
        began = time.perf_counter()
        held = ranks.run_round(fed, next(rounds), held, clients)
        with_commit = index % 2 == 1
        if held is not None and with_commit:
            commit(run, index, held)
        if index >= WARM_UP:
            seconds[with_commit].append(time.perf_counter() - began)
    ranks.drain(fed, rounds)
    if rank == SERVER:
        report(asked, seconds)


def commit(run: RunFolder, index: int, held: Tensors) -> None:
    """What a run does after a round: state first, then the line that tells of it."""
    run.pending.append({"round": index, "train_loss": 0.0})
    lines = run.take()
    run.checkpoints.commit(index, held, {"lines": lines}, {})
    run.publish(lines)


def report(asked: argparse.Namespace, seconds: dict[bool, list[float]]) -> None:
    """Medians in milliseconds."""
    spread = sorted(seconds[False])
    ranks.show(
        {
            "benchmark": "latency",
            **vars(asked),
            "ms_per_round": 1e3 * statistics.median(spread),
            "ms_per_round_quartiles": [round(1e3 * spread[(len(spread) * part) // 4], 3) for part in (1, 3)],
            "ms_per_round_min": 1e3 * spread[0],
            "ms_per_round_with_checkpoint": 1e3 * statistics.median(seconds[True]),
        }
    )


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=1024)
    parser.add_argument("--launcher", choices=("torchrun", "mpirun", "in_process"), default="torchrun")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    world = from_environment(os.environ)
    if world.size == 1 and asked.launcher != "in_process":
        arguments = [f"--{key}={value}" for key, value in vars(asked).items()]
        return ranks.start(asked.launcher, asked.ranks, str(Path(__file__).resolve()), arguments)
    with tempfile.TemporaryDirectory() as folder:
        if world.size == 1:
            return ranks.in_threads(asked.ranks, lambda transport: measure(asked, transport, Path(folder)))
        with transports.open(world, timeout_s=120) as transport:
            measure(asked, transport, Path(folder))


if __name__ == "__main__":
    main()
