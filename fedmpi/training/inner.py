"""A client's inner world: inside a client of several ranks, the default process group of torch is the client.

So DDP, FSDP and DeepSpeed work as they are, and no collective of one client waits for another. The leader hosts the
client's store; the federation carries its address to the members. It must never know who else is in the federation, and
it never reads or writes a launcher's variables.
"""

import gc
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

# Its functions have the default group of the moment as default argument. First imported inside a world (DDP does it), it
# would hold that world's connections for good, and a member that leaves would look alive to the others until the timeout.
import torch.distributed.nn.functional
from torch import distributed as dist

from fedmpi.errors import PeerLost, WorldError
from fedmpi.manifest import Manifest, Packed, manifest_of, unpack
from fedmpi.tensors import Tensors

ON_LEAVING: list[Callable[[], None]] = []  # lets go of what a library keeps of the process group


class Host:
    """The leader's side of a client's store. It lives as long as the leader keeps it, through every generation."""

    def __init__(self, towards: str | None = None) -> None:
        """Listen on a free port; `towards` is "host:port" of something that every member can reach."""
        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self.address = f"{_own_address(towards)}:{self._store.port}"


def host(towards: str | None = None) -> Host:
    """Host the store of a new inner world; send `.address` to the members and keep the value while the world lives."""
    return Host(towards)


@dataclass
class InnerWorld:
    """This rank's place in its client; while it is joined, torch's default process group is the client."""

    address: str
    rank: int
    size: int
    role: str
    restart: int
    generation: int
    timeout_s: float
    device: str
    _turns: int = 0  # of this generation
    _board: Any = field(default=None, repr=False)  # where members write how a turn ended; it outlives a broken process group

    def settle(self, fault: str | None) -> str | None:
        """Say how this member's turn ended and learn how the client's did: its first fault, the same on every member.

        A fault breaks the process group, since the others may wait for this member inside a collective; once all have
        said how they ended, they meet again on the next generation.
        """
        turn, self._turns = f"turn{self._turns}", self._turns + 1
        if fault is not None:
            self._board.compare_set(f"{turn}/fault", "", fault)  # the first to write wins: the other faults follow from it
            self.leave()
        self._board.set(f"{turn}/ended{self.rank}", "")
        self._wait_for([f"{turn}/ended{member}" for member in range(self.size)])
        if not self._board.check([f"{turn}/fault"]):
            return None
        first: bytes = self._board.get(f"{turn}/fault")
        self.rebuild(self.generation + 1)
        return first.decode()

    def _wait_for(self, ended: list[str]) -> None:
        # NCCL does not see that a member left: who waits for it inside a collective needs that timeout to give up, and then comes.
        timeout_s = self.timeout_s if self.device == "cpu" else 2 * self.timeout_s
        try:
            self._board.wait(ended, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            silent = [member for member, key in enumerate(ended) if not self._board.check([key])]
            raise PeerLost(f"{self}: members {silent} did not end their turn within {timeout_s} s of this one") from error

    def rebuild(self, generation: int) -> None:
        """Leave what is broken and meet the other members again; all of them must ask for the same, new generation."""
        self.leave()
        self.generation = generation
        _connect(self)

    def leave(self) -> None:
        """Let go of the process group; a member that waits in a collective sees it at once, with NCCL at its deadline."""
        for let_go in ON_LEAVING:
            let_go()
        gc.collect()  # what an engine leaves behind after a failure may hold the group as well
        if dist.is_initialized():
            if self.device != "cpu" and dist.group.WORLD is not None:  # NCCL would wait for what is under way
                dist.group.WORLD._get_backend(torch.device("cuda")).abort()
            dist.destroy_process_group()

    def share(self, tensors: Mapping[str, torch.Tensor] | None) -> Tensors:
        """The leader's tensors on every member: CPU, same names, shapes, dtypes and bytes. Members give None."""
        manifest = manifest_of(tensors, group="inner") if tensors is not None else None
        text = self.share_bytes(manifest.to_json() if manifest is not None else None)
        agreed = manifest or Manifest.from_json(text)
        num = agreed.num_bytes
        buffer = torch.empty(num, dtype=torch.uint8) if tensors is None else Packed(tensors, agreed).buffer(0, num)
        self._broadcast(buffer)
        return unpack(buffer, agreed)

    def share_bytes(self, data: bytes | None) -> bytes:
        """The leader's bytes on every member. Members give None."""
        length = torch.tensor([len(data) if data is not None else 0])
        self._broadcast(length)
        buffer = torch.empty(int(length), dtype=torch.uint8)
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._broadcast(buffer)
        return buffer.numpy().tobytes()

    def _broadcast(self, buffer: torch.Tensor) -> None:
        if not buffer.numel():
            return
        try:
            dist.broadcast(buffer, src=0)
        except RuntimeError as error:
            raise PeerLost(f"{self}: a broadcast of {buffer.nbytes} bytes failed: {_first_line(error)}") from error

    def __str__(self) -> str:
        return f"inner world of {self.role}, generation {self.generation}, member {self.rank} of {self.size}"


def join(
    address: str,
    rank: int,
    size: int,
    generation: int,
    timeout_s: float,
    *,
    role: str,
    restart: int = 0,
    device: str = "cpu",
) -> InnerWorld:
    """Meet the other members at `address` and make torch's default process group the client. Rank 0 is the leader.

    `role` (the client's name), `restart` and `generation` keep the keys of this world apart from those of any other.
    """
    if dist.is_initialized():
        raise WorldError(f"{role}: torch's default process group is taken; it must be free for the client")
    world = InnerWorld(address, rank, size, role, restart, generation, timeout_s, device)
    _connect(world)
    return world


def _connect(world: InnerWorld) -> None:
    name, _, port = world.address.rpartition(":")
    timeout = timedelta(seconds=world.timeout_s)
    prefix = f"inner/{world.role}/restart{world.restart}/generation{world.generation}"
    try:
        # Clients of their own for each generation: one that still waits for a key of the last would hold its lock.
        store, board = (
            dist.PrefixStore(prefix, dist.TCPStore(name, int(port), is_master=False, timeout=timeout))  # type: ignore[attr-defined]
            for _ in range(2)
        )
        if world.device != "cpu":
            _require_own_gpus(world, board)
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a deadline raises, where by default it kills the process
        dist.init_process_group(
            backend="gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
        world._turns, world._board = 0, board
    except RuntimeError as error:
        where = f"could not meet the others at {world.address} within {world.timeout_s} s"
        raise PeerLost(f"{world} {where}: {_first_line(error)}") from error


def _require_own_gpus(world: InnerWorld, board: Any) -> None:
    """Two ranks of a client on one GPU are more than NCCL can do."""
    keys = [f"gpu{member}" for member in range(world.size)]
    board.set(keys[world.rank], _gpu(world.device))
    board.wait(keys, timedelta(seconds=world.timeout_s))
    gpus = [board.get(key) for key in keys]
    if sharing := [member for member, gpu in enumerate(gpus) if gpus.count(gpu) > 1]:
        raise WorldError(
            f"{world.role}: members {', '.join(map(str, sharing))} of one client would share a GPU: start at most one rank for "
            "each GPU of a machine, or give --device cpu"
        )


def _gpu(device: str) -> str:
    """Which one it is, of all that there are."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _own_address(towards: str | None) -> str:
    """This machine as seen from `towards` (nothing is sent), else what its own name resolves to."""
    if towards is None:
        return _resolved(socket.gethostname())
    peer, _, port = towards.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, int(port)))
        own = str(probe.getsockname()[0])
    # Where the peer is this machine, members on other machines need the name that it has outside.
    return _resolved(socket.gethostname()) if own.startswith("127.") else own


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return "127.0.0.1"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
