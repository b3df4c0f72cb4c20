"""What a round waits for its exchange on a slow link: server and clients in network namespaces, with real rate limits between them.

    python benchmarks/links.py [--mbps 100] [--rtt_ms 20] [--step_s 20] [--ranks 4,2] [--codec raw --codec delta,int4,ef,zstd ...]

Needs root, `ip`, `tc` (tbf) and /dev/net/tun. Two namespaces are joined by one link whose either end is limited: all clients share
the server's rate. The link is a pair of tun devices between which this program carries packets, each after half of --rtt_ms (as
netem would, which not every kernel has), or a veth pair where that is 0. torchrun starts a node in each: the server in one, ranks
with four clients between them in the other. A client's turn is a sleep; a rank that hosts more of them sleeps as long in all, so
that its first update travels while the next client is at work. What is exposed is the time of a round beyond that sleep, seen by
the server: both ways, the mean, and waking up. Values are normally distributed and change in every round. The first round, whose
broadcast is no difference, is not counted. With `--codec auto` the chain is chosen as the program does it. One JSON line per case.
"""

import argparse
import contextlib
import fcntl
import os
import shlex
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ranks
import torch

from fedmpi import transports
from fedmpi.codecs import AUTO
from fedmpi.federation.post import Post
from fedmpi.federation.updates import Update
from fedmpi.round import SERVER
from fedmpi.sessions import choosing
from fedmpi.settings.recipe import Recipe
from fedmpi.world import from_environment

CHAINS = ("raw", "int8", "delta,int4,ef,zstd", "delta,topk:0.1,int4,ef,zstd")
CLIENTS, WARM_UP = 4, 1
SERVER_ADDRESS, CLIENT_ADDRESS, PORT = "10.213.7.1", "10.213.7.2", "29731"
TUNSETIFF, TUN_WITHOUT_HEADER, MTU = 0x400454CA, 0x1001, 9000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--mbps", type=int, default=100)
    made.add_argument("--rtt_ms", type=float, default=20)
    made.add_argument("--mib", type=float, default=16)
    made.add_argument("--step_s", type=float, default=20, help="what all turns of a rank take in a round")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--ranks", default="4,2", help="over how many ranks the four clients are spread, case by case")
    made.add_argument("--codec", action="append")
    made.add_argument("--codec_budget", type=float, default=Recipe.codec_budget, help="of auto")
    return made


# ---- one rank -----------------------------------------------------------------------------------------------------------------


def turn(client: ranks.Client, seconds: float) -> Update:
    """Make other values than in the round before, and sleep for the rest of the time."""
    began = time.perf_counter()
    for tensor in client.tensors.values():
        tensor.add_(torch.randn(tensor.shape), alpha=0.1)
    time.sleep(max(0.0, began + seconds - time.perf_counter()))
    return ranks.update(client)


def measure(asked: argparse.Namespace, transport: transports.base.Transport) -> None:
    """One rank's part; the server shows the figures."""
    rank, codec, reason = transport.rank, asked.codec[0], ""
    if codec == AUTO:
        codec, reason = chosen(asked, transport)
    fed = ranks.federation(transport, CLIENTS, WARM_UP + asked.rounds, codec=codec)
    hosted = fed.placement.hosted_by(rank) if rank != SERVER else ()
    clients = {client: ranks.Client(client, ranks.adapter(int(asked.mib * 2**20), seed=client + 1)) for client in hosted}
    held = ranks.adapter(int(asked.mib * 2**20), seed=0) if rank == SERVER else None
    work = partial(turn, seconds=asked.step_s / max(1, len(clients)))
    seconds, sent, rounds = list[float](), list[int](), fed.rounds()
    for _ in range(WARM_UP + asked.rounds):
        began = time.perf_counter()
        held = ranks.run_round(fed, next(rounds), held, clients, work)
        seconds.append(time.perf_counter() - began)
        sent.append(fed.ledger.totals["up_bytes"] + fed.ledger.totals["down_bytes"])
    if rank == SERVER:
        exposed_s = statistics.median(seconds[WARM_UP:]) - asked.step_s
        ranks.show(
            {
                **{"codec": codec, "mbps": asked.mbps, "rtt_ms": asked.rtt_ms, "ranks": transport.size - 1},
                **{"clients": CLIENTS, "mib": asked.mib},
                "mib_per_round": (sent[-1] - sent[WARM_UP - 1]) / asked.rounds / 2**20,
                **{"step_s": asked.step_s, "rounds_s": [round(one, 2) for one in seconds[WARM_UP:]]},
                **{"exposed_s": exposed_s, "exposed_share": exposed_s / (exposed_s + asked.step_s)},
                **({"auto": reason} if reason else {}),
            }
        )
    ranks.drain(fed, rounds)


def chosen(asked: argparse.Namespace, transport: transports.base.Transport) -> tuple[str, str]:
    """What auto takes, and why."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Recipe(codec=AUTO, codec_budget=asked.codec_budget)
        found = choosing.codec(wanted, int(asked.mib * 2**18), CLIENTS, Path(folder), Post(transport))
    return found.chain, found.reason


# ---- the links ----------------------------------------------------------------------------------------------------------------


def run(command: str) -> None:
    """A command of the system; what it says where it fails."""
    ended = subprocess.run(shlex.split(command), check=False, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{command}: {ended.stderr.strip() or ended.returncode}")


def tun(space: str) -> int:
    """A new tun device in a namespace, as a file of packets."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0x", TUN_WITHOUT_HEADER))
    run(f"ip link set eth0x netns {space} name eth0")
    return device


def carry(source: int, sink: int, delay_s: float) -> None:
    """Packets from one device to the other, each so much later, in their order."""
    waiting: deque[tuple[float, bytes]] = deque()
    came = threading.Semaphore(0)

    def deliver() -> None:
        while came.acquire():
            due, packet = waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                os.write(sink, packet)

    threading.Thread(target=deliver, daemon=True).start()
    with contextlib.suppress(OSError):
        while packet := os.read(source, MTU + 64):
            waiting.append((time.monotonic() + delay_s, packet))
            came.release()


def join(server: str, clients: str, rtt_ms: float, stack: contextlib.ExitStack) -> None:
    """One link, called eth0 at either end."""
    if not rtt_ms:
        run(f"ip link add eth0 netns {server} type veth peer name eth0 netns {clients}")
        return
    ends = tun(server), tun(clients)
    for source, sink in (ends, ends[::-1]):
        threading.Thread(target=carry, args=(source, sink, rtt_ms / 2000), daemon=True).start()
    for end in ends:
        stack.callback(os.close, end)


@contextlib.contextmanager
def namespaces(mbps: int, rtt_ms: float) -> Iterator[tuple[str, str]]:
    """Two network namespaces and a limited link between them, gone at the end however it comes."""
    tag = f"fl{os.getpid()}"
    server, clients = f"{tag}s", f"{tag}c"
    with contextlib.ExitStack() as stack:
        for space in (server, clients):
            run(f"ip netns add {space}")
            stack.callback(subprocess.run, ["ip", "netns", "del", space], check=False)
        join(server, clients, rtt_ms, stack)
        for space, address in ((server, SERVER_ADDRESS), (clients, CLIENT_ADDRESS)):
            run(f"ip -n {space} addr add {address}/24 dev eth0")
            run(f"ip -n {space} link set lo up")
            run(f"ip -n {space} link set eth0 up" + (f" mtu {MTU} txqueuelen 1000" if rtt_ms else ""))
            run(f"tc -n {space} qdisc add dev eth0 root tbf rate {mbps}mbit burst {max(256, mbps)}kb latency 100ms")
        yield server, clients


def case(asked: argparse.Namespace, num_ranks: int, codec: str) -> None:
    """One torchrun of two nodes, each in its namespace."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ranks.LAUNCHER_VARIABLES)}
    given = [
        *(f"--{key}={getattr(asked, key)}" for key in ("mbps", "rtt_ms", "mib", "step_s", "rounds", "codec_budget")),
        f"--codec={codec}",
    ]
    with namespaces(asked.mbps, asked.rtt_ms) as spaces, contextlib.ExitStack() as stack:
        nodes = []
        for number, (space, here) in enumerate(zip(spaces, (1, num_ranks), strict=True)):
            torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={number}", f"--nproc_per_node={here}"]
            meet = [f"--master_addr={SERVER_ADDRESS}", f"--master_port={PORT}"]
            command = ["ip", "netns", "exec", space, sys.executable, *torchrun, *meet, str(Path(__file__).resolve()), *given]
            nodes.append(subprocess.Popen(command, env=kept | {"OMP_NUM_THREADS": "1"}))
            stack.callback(nodes[-1].terminate)
        if sum(abs(node.wait()) for node in nodes):
            sys.exit(f"{codec} over {num_ranks} ranks failed")


def main() -> None:
    """Start the ranks, or be one of them."""
    asked = parser().parse_args()
    torch.set_num_threads(1)
    world = from_environment(os.environ)
    if world.size > 1:
        with transports.open(world, timeout_s=120) as transport:
            measure(asked, transport)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for codec in asked.codec or CHAINS:
        for num_ranks in map(int, asked.ranks.split(",")):
            case(asked, num_ranks, codec)


if __name__ == "__main__":
    main()
