"""How memory grows with clients: of a server over real links, and of one process that simulates them all.

    python benchmarks/memory.py [--server 2,8,32] [--mib 64] [--codec delta,int4,ef,zstd] [--hosted 1,10,100] [--rounds 3]

Each case is a process of its own, so that no case inherits another's high-water mark. The server's clients are threads of a
second process, each with a link of its own: the server cannot tell. Simulated clients train a tiny model for a step; with
train.optimizer_state keep each of them holds two values per adapter parameter. Prints one JSON line: peaks in MB, and the
slope per client between the smallest and the largest case.
"""

import argparse
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ranks
import torch

from fedmpi.round import SERVER
from fedmpi.tensors import Tensors, copies, num_bytes
from fedmpi.transports import torch_dist
from fedmpi.world import World


def world(rank: int, clients: int, port: int) -> World:
    """Ranks that were told by hand where to meet."""
    return World("env", rank, clients + 1, rank, clients + 1, "torch", f"127.0.0.1:{port}", 0, rank == SERVER)


def serve(clients: int, mib: float, rounds: int, codec: str, port: int) -> None:
    """The server of one case."""
    with torch_dist.open(world(SERVER, clients, port), timeout_s=300) as transport:
        fed = ranks.federation(transport, clients, rounds, codec=codec)
        held, announced = first(int(mib * 2**20)), fed.rounds()
        before = ranks.rss_mb()
        for _ in range(rounds):
            mean = ranks.run_round(fed, next(announced), held, {})
            assert mean is not None
            held = mean
        ranks.show({"peak_mb": ranks.peak_rss_mb(), "before_mb": before})
        ranks.drain(fed, announced)


def first(num_bytes: int) -> Tensors:
    """An adapter as the program takes it from a model; made in its place, so that the peak holds nothing of the benchmark's own."""
    held = copies({name: torch.zeros(()).expand(shape) for name, shape in ranks.shapes(num_bytes).items()})
    generator = torch.Generator().manual_seed(0)
    for tensor in held.values():
        tensor.normal_(generator=generator)
    return held


def be_clients(clients: int, rounds: int, codec: str, port: int) -> None:
    """All clients of one case; each sends back what it received."""

    def work(rank: int) -> None:
        with torch_dist.open(world(rank, clients, port), timeout_s=300) as transport:
            fed = ranks.federation(transport, clients, rounds, codec=codec)
            for rnd in fed.rounds():
                sent = fed.broadcast(None)
                list(fed.gather(rnd, {rank - 1: ranks.Client(rank - 1, sent)}, ranks.update))
            fed.farewell()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, clients + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def simulate(clients: int, keep: bool, per_round: int, rounds: int) -> None:
    """One process that hosts all clients."""
    import simulate as simulation  # transformers takes seconds to import: not for the other cases

    from fedmpi.algorithms import fedavg
    from fedmpi.sessions.session import Session
    from fedmpi.settings.recipe import Recipe
    from fedmpi.stop import Stop

    state = "keep" if keep else "fresh"
    recipe = Recipe(rounds=rounds, clients=clients, clients_per_round=per_round or None, eval_every=0, checkpoint_every=rounds)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        asked = argparse.Namespace(clients=clients, layers=4, hidden=256, steps=1, optimizer_state=state, rank=64)
        host = simulation.host(asked, Path(folder) / "model")
        before = ranks.rss_mb()
        Session(recipe, fedavg.Config(), fedavg, host, Path(folder) / "run", "fed", Stop()).train()
        adapter_mb = num_bytes(host.base.fresh) / 2**20
    ranks.show({"peak_mb": ranks.peak_rss_mb(), "before_mb": before, "after_mb": ranks.rss_mb(), "adapter_mb": adapter_mb})


def case(*arguments: object) -> subprocess.Popen[str]:
    """One case, started."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a case showed."""
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a case ended with {process.returncode}:\n{errors[-3000:]}")
    figures: dict[str, float] = json.loads(output.splitlines()[-1]) if output else {}
    return figures


def server_case(clients: int, mib: float, rounds: int, codec: str) -> dict[str, float]:
    """The server's peak with so many clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server, others = case("server", clients, mib, rounds, codec, port), case("clients", clients, rounds, codec, port)
    try:
        figures = result(server)
        result(others)
    finally:
        server.kill()
        others.kill()
    return figures


def slope(peaks: dict[int, float]) -> float | None:
    """MB per client, from the smallest to the largest case."""
    least, most = min(peaks), max(peaks)
    return (peaks[most] - peaks[least]) / (most - least) if most > least else None


def numbers(text: str) -> list[int]:
    """2,8,32"""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Run the cases one after the other, or be one of them."""
    if sys.argv[1:2] == ["--case"]:
        return be(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=numbers, default=[2, 8, 32])
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument("--codec", default="raw", help="of the server's cases, both ways")
    parser.add_argument("--hosted", type=numbers, default=[1, 10, 100])
    parser.add_argument("--per_round", type=int, default=0, help="simulated clients of a round; 0 = all")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    figures: dict[str, object] = {"benchmark": "memory", **vars(asked)}
    if asked.server:
        peaks = {clients: server_case(clients, asked.mib, asked.rounds, asked.codec)["peak_mb"] for clients in asked.server}
        figures |= {"server_peak_mb": peaks, "server_mb_per_client": slope(peaks)}
    for name, keep in (("stateless", 0), ("with_state", 1)) if asked.hosted else ():
        found = {n: result(case("simulate", n, keep, min(asked.per_round, n), asked.rounds)) for n in asked.hosted}
        peaks = {clients: case_["peak_mb"] for clients, case_ in found.items()}
        after = {clients: case_["after_mb"] for clients, case_ in found.items()}
        figures |= {f"{name}_peak_mb": peaks, f"{name}_peak_mb_per_client": slope(peaks)}
        figures[f"{name}_after_mb_per_client"] = slope(after)
        figures["adapter_mb"] = next(iter(found.values()))["adapter_mb"]
    ranks.show(figures)


def be(kind: str, given: list[str]) -> None:
    """One case, in this process."""
    torch.set_num_threads(1)
    if kind == "server":
        serve(int(given[0]), float(given[1]), int(given[2]), given[3], int(given[4]))
    elif kind == "clients":
        be_clients(int(given[0]), int(given[1]), given[2], int(given[3]))
    else:
        simulate(int(given[0]), given[1] == "1", int(given[2]), int(given[3]))


if __name__ == "__main__":
    main()
