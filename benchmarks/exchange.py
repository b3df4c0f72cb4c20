"""What a round's exchange costs beside the bare library: broadcast, gather and exact mean of an adapter; nobody trains.

    python benchmarks/exchange.py --clients 4 --rounds 20 --mib 16 [--launcher torchrun|mpirun|in_process] [--exchange collective]

It starts its ranks (one server, the clients) and prints one JSON line. The floor moves the same bytes in one flat buffer
per peer, in the same processes, round by round in turn with ours: gloo's broadcast and send/recv with a weighted mean, the
same with bare mpi4py, or copies in memory where the ranks are threads. With --exchange collective it is the library's broadcast of
the adapter and its reduce of the same float64 sums.

--checked adds a second floor: the same library, and what no round of ours may leave out, in its plainest form: a checksum of every
message at both ends, a look at the values of every update, and the exact mean in the place of the float32 one. What ours takes
beyond that is the program's own.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import ranks
import torch
import xxhash

from fedmpi import transports
from fedmpi.aggregation.mean import Sums, grid_scale, largest
from fedmpi.federation.updates import Update
from fedmpi.round import SERVER
from fedmpi.tensors import Tensors, copies
from fedmpi.transports.base import Transport
from fedmpi.world import from_environment

WARM_UP = 3


class Way(Protocol):
    """What is done with the bytes, beside moving them."""

    def look(self, flat: torch.Tensor) -> None:
        """At what is sent, and at what has come."""

    def add(self, flat: torch.Tensor, client: int) -> None:
        """An update that has come."""

    def mean(self) -> torch.Tensor:
        """Of those that were added."""


class Bare:
    """The weighted mean in float32."""

    def __init__(self, flat: torch.Tensor, weights: list[int]) -> None:
        self.shares, self.sum = shares_of(weights), torch.zeros_like(flat)

    def look(self, flat: torch.Tensor) -> None:
        """Nobody does."""

    def add(self, flat: torch.Tensor, client: int) -> None:
        """By its share."""
        self.sum.add_(flat, alpha=self.shares[client])

    def mean(self) -> torch.Tensor:
        """The sum is it."""
        mean, self.sum = self.sum, torch.zeros_like(self.sum)
        return mean


class Checked:
    """What a round of ours promises."""

    def __init__(self, flat: torch.Tensor, weights: list[int]) -> None:
        self.weights, self.like = weights, {"flat": torch.empty_like(flat, device="meta")}
        self.sums: Sums | None = None

    def look(self, flat: torch.Tensor) -> None:
        """A checksum."""
        xxhash.xxh3_64_intdigest(flat.numpy().data)

    def add(self, flat: torch.Tensor, client: int) -> None:
        """Exactly, once it is known to be finite."""
        self.sums = self.sums or Sums.of(self.like, grid_scale(sum(self.weights), 1.0))
        self.sums.take(Update(client, {"flat": flat}, {}, self.weights[client]), client, largest({"flat": flat}))

    def mean(self) -> torch.Tensor:
        """The quotient."""
        assert self.sums is not None
        mean, self.sums = self.sums.mean()["flat"], None
        return mean


class Floor(Protocol):
    """The bare library on the same work."""

    flat: torch.Tensor  # the server's adapter, or what a client sends

    def meet(self) -> None:
        """Wait for all ranks."""

    def round(self, way: Way) -> None:
        """Server to all, all to the server, weighted mean."""

    def collective_round(self) -> None:
        """The same by a broadcast and a reduce in float64."""

    def total(self, value: float) -> float:
        """The sum over all ranks."""


class Gloo:
    """One gloo group of all ranks: broadcast, and a buffer per peer to receive in."""

    def __init__(self, flat: torch.Tensor, rank: int, weights: list[int]) -> None:
        from torch import distributed

        distributed.init_process_group("gloo")
        self.flat, self.rank, self.shares, self.library = flat, rank, shares_of(weights), distributed
        self.buffers = [torch.empty_like(flat) for _ in (weights if rank == SERVER else weights[:1])]
        self.sums = torch.zeros_like(flat, dtype=torch.float64)

    def meet(self) -> None:
        """Wait for all ranks."""
        self.library.barrier()

    def round(self, way: Way) -> None:
        """Server to all, all to the server, weighted mean."""
        way.look(self.flat)
        if self.rank != SERVER:
            self.library.broadcast(self.buffers[0], SERVER)
            way.look(self.buffers[0])
            self.library.send(self.flat, SERVER)
            return
        self.library.broadcast(self.flat, SERVER)
        works = [self.library.irecv(buffer, peer) for peer, buffer in enumerate(self.buffers, start=1)]
        for client, (work, buffer) in enumerate(zip(works, self.buffers, strict=True)):
            work.wait()
            way.look(buffer)
            way.add(buffer, client)
        self.flat = way.mean()

    def collective_round(self) -> None:
        """The same by a broadcast and a reduce in float64."""
        if self.rank != SERVER:
            self.library.broadcast(self.buffers[0], SERVER)
            self.library.reduce(torch.mul(self.flat, self.shares[self.rank - 1], out=self.sums), SERVER)
            return
        self.library.broadcast(self.flat, SERVER)
        self.library.reduce(self.sums.zero_(), SERVER)
        self.flat.copy_(self.sums)

    def total(self, value: float) -> float:
        """The sum over all ranks."""
        there = torch.tensor([value], dtype=torch.float64)
        self.library.all_reduce(there)
        return there.item()


class Mpi:
    """A communicator of its own: Bcast, and a buffer per peer to receive in."""

    def __init__(self, flat: torch.Tensor, rank: int, weights: list[int]) -> None:
        from mpi4py import MPI  # the one import of it outside the package's transport: this is the bare library

        self.flat, self.rank, self.shares, self.library, self.world = flat, rank, shares_of(weights), MPI, MPI.COMM_WORLD.Dup()
        self.buffers = [torch.empty_like(flat) for _ in (weights if rank == SERVER else weights[:1])]
        self.sums = torch.zeros_like(flat, dtype=torch.float64)

    def meet(self) -> None:
        """Wait for all ranks; asleep, since MPI's own waiting would take the cores from whoever still computes."""
        all_here = self.world.Ibarrier()
        while not all_here.Test():
            time.sleep(1e-4)

    def round(self, way: Way) -> None:
        """Server to all, all to the server, weighted mean."""
        way.look(self.flat)
        if self.rank != SERVER:
            self.world.Bcast(self.buffers[0].numpy(), SERVER)
            way.look(self.buffers[0])
            self.world.Send(self.flat.numpy(), SERVER)
            return
        self.world.Bcast(self.flat.numpy(), SERVER)
        requests = [self.world.Irecv(buffer.numpy(), peer) for peer, buffer in enumerate(self.buffers, start=1)]
        for _ in requests:
            client = self.library.Request.Waitany(requests)
            way.look(self.buffers[client])
            way.add(self.buffers[client], client)
        self.flat = way.mean()

    def collective_round(self) -> None:
        """The same by a broadcast and a reduce in float64."""
        if self.rank != SERVER:
            self.world.Bcast(self.buffers[0].numpy(), SERVER)
            torch.mul(self.flat, self.shares[self.rank - 1], out=self.sums)
            self.world.Reduce(self.sums.numpy(), None, self.library.SUM, SERVER)
            return
        self.world.Bcast(self.flat.numpy(), SERVER)
        self.world.Reduce(self.library.IN_PLACE, self.sums.zero_().numpy(), self.library.SUM, SERVER)
        self.flat.copy_(self.sums)

    def total(self, value: float) -> float:
        """The sum over all ranks."""
        return float(self.world.allreduce(value))


class Copies:
    """Threads share memory, so the least is to copy: down into each client's buffer, up into the server's. The server does it."""

    def __init__(self, flat: torch.Tensor, transport: Transport, weights: list[int], barrier: threading.Barrier) -> None:
        self.flat, self.transport, self.barrier = flat, transport, barrier
        self.buffers = [(torch.empty_like(flat), torch.empty_like(flat)) for _ in weights] if transport.rank == SERVER else []
        self.sent = [ranks.adapter(flat.numel() * 4, seed=client + 1) for client in range(len(weights))] if self.buffers else []

    def meet(self) -> None:
        """Wait for all ranks, with the turn to compute given away meanwhile."""
        self.transport.turn.__exit__(None, None, None)
        self.barrier.wait()
        self.transport.turn.__enter__()

    def collective_round(self) -> None:
        """Threads have no library that could do it."""
        raise NotImplementedError

    def round(self, way: Way) -> None:
        """Server to all, all to the server, weighted mean."""
        if not self.buffers:
            return
        way.look(self.flat)
        for client, ((down, up), tensors) in enumerate(zip(self.buffers, self.sent, strict=True)):
            down.copy_(self.flat)
            way.look(down)
            torch.cat([tensor.view(-1) for tensor in tensors.values()], out=up)
            for _ in range(2):  # who sends it, who gets it
                way.look(up)
            way.add(up, client)
        self.flat = way.mean()

    def total(self, value: float) -> float:
        """All ranks are one process, whose clock has counted for all."""
        return value


def shares_of(weights: list[int]) -> list[float]:
    """The weights of a mean."""
    return [weight / sum(weights) for weight in weights]


def flat_of(tensors: Tensors) -> torch.Tensor:
    """One buffer."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def measure(asked: argparse.Namespace, transport: Transport, make_floor: Callable[[torch.Tensor, list[int]], Floor]) -> None:
    """One rank's part: warm up, then ours and the floor in turns; the server shows the figures."""
    rank, num_clients = transport.rank, transport.size - 1
    weights = [ranks.weight_of(client) for client in range(num_clients)]
    fed = ranks.federation(transport, num_clients, WARM_UP + asked.rounds, asked.exchange)
    started_s = ranks.seconds_since_start()
    mine = copies(ranks.adapter(int(asked.mib * 2**20), seed=rank))  # as what is taken out of a model lies
    held = mine if rank == SERVER else None
    clients = {client: ranks.Client(client, mine) for client in fed.placement.hosted_by(rank)} if rank != SERVER else {}
    rounds = fed.rounds()

    def ours() -> None:
        nonlocal held
        held = ranks.run_round(fed, next(rounds), held, clients)

    for _ in range(WARM_UP):
        ours()
    peak = ranks.peak_rss_mb()  # before the floor takes its buffers
    floor = make_floor(flat_of(mine), weights)
    rounds_of: dict[str, Callable[[], None]] = {"ours": ours}
    rounds_of["floor"] = (
        floor.collective_round if asked.exchange == "collective" else partial(floor.round, Bare(floor.flat, weights))
    )
    if asked.checked:
        rounds_of["checked"] = partial(floor.round, Checked(floor.flat, weights))
    for _ in range(WARM_UP):
        for name in list(rounds_of)[1:]:
            rounds_of[name]()
    seconds: dict[str, list[float]] = {name: [] for name in rounds_of}
    cpu = dict.fromkeys(seconds, 0.0)
    for index in range(asked.rounds):
        for name in rounds_of if index % 2 else reversed(rounds_of):
            floor.meet()
            began, cpu_began = time.perf_counter(), time.process_time()
            rounds_of[name]()
            seconds[name].append(time.perf_counter() - began)
            floor.meet()  # what our threads do after the round is ours too
            cpu[name] += time.process_time() - cpu_began
    cpu = {name: floor.total(spent) / asked.rounds for name, spent in cpu.items()}
    if held is not None:
        report(asked, num_clients, seconds, cpu, started_s, peak, float((flat_of(held) - floor.flat).abs().max()))
    ranks.drain(fed, rounds)


def report(
    asked: argparse.Namespace,
    clients: int,
    seconds: dict[str, list[float]],
    cpu: dict[str, float],
    started_s: float,
    peak: float,
    difference: float,
) -> None:
    """The figures; both means must be the same up to the floor's own rounding."""
    if difference > 1e-5:
        raise SystemExit(f"our mean and the floor's differ by {difference}")
    ours, floor = statistics.median(seconds["ours"]), statistics.median(seconds["floor"])
    pairs = sorted(a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True))
    checked = {}
    if asked.checked:
        promised = statistics.median(seconds["checked"])
        checked = {
            "checked_floor_sec_per_round_median": promised,
            "checked_floor_ratio_to_floor": promised / floor,
            "checked_floor_cpu_s_all_ranks": cpu["checked"],
            "ratio_to_checked_floor": ours / promised,
        }
    ranks.show(
        {
            "system": "fedmpi",
            "launcher": asked.launcher,
            "exchange": asked.exchange,
            "clients": clients,
            "mib": asked.mib,
            "rounds": asked.rounds,
            "sec_per_round_median": ours,
            "sec_per_round_min": min(seconds["ours"]),
            "floor_sec_per_round_median": floor,
            "floor_sec_per_round_min": min(seconds["floor"]),
            "ratio_to_floor": ours / floor,
            "ratio_quartiles": [round(pairs[len(pairs) // 4], 3), round(pairs[(3 * len(pairs)) // 4], 3)],
            "ratio_of_minima": min(seconds["ours"]) / min(seconds["floor"]),
            "cpu_s_all_ranks": cpu["ours"],
            "floor_cpu_s_all_ranks": cpu["floor"],
            "cpu_ratio": cpu["ours"] / cpu["floor"],
            **checked,
            "startup_s": started_s,
            "server_peak_rss_mb": peak,
        }
    )


def in_threads(asked: argparse.Namespace) -> None:
    """All ranks in this process."""
    barrier = threading.Barrier(asked.clients + 1)
    ranks.in_threads(
        asked.clients + 1, lambda transport: measure(asked, transport, lambda flat, w: Copies(flat, transport, w, barrier))
    )


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mib", type=float, default=16)
    parser.add_argument("--launcher", choices=("torchrun", "mpirun", "in_process"), default="torchrun")
    parser.add_argument("--exchange", choices=("star", "collective"), default="star")
    parser.add_argument("--apart", type=int, default=0, help="1: as if each rank were on a machine of its own")
    parser.add_argument("--checked", type=int, default=0, help="1: a second floor, which checks and is exact too")
    asked = parser.parse_args()
    if asked.checked and asked.exchange == "collective":
        parser.error("--checked: the floor of collectives adds up in float64 already; leave it out")
    if asked.exchange == "collective" and asked.launcher == "in_process":
        parser.error("--exchange collective: threads have no library to compare with; give --launcher torchrun or mpirun")
    torch.set_num_threads(1)
    world = from_environment(os.environ)
    if world.size > 1:
        kind = Mpi if world.transport == "mpi" else Gloo
        with transports.open(world, timeout_s=120, apart=bool(asked.apart)) as transport:
            measure(asked, transport, lambda flat, weights: kind(flat, world.rank, weights))
    elif asked.launcher == "in_process":
        in_threads(asked)
    else:
        arguments = [f"--{key}={value}" for key, value in vars(asked).items()]
        ranks.start(asked.launcher, asked.clients + 1, str(Path(__file__).resolve()), arguments)


if __name__ == "__main__":
    main()
