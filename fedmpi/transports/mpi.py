"""Links over MPI: pieces of bytes on a duplicate of COMM_WORLD, with a tag per generation of a link.

What MPI taught (Open MPI 5 and MPICH, run):
- A blocking Recv burns a core. So one thread asks after all operations (see `progress`).
- Leaving with an exception hangs in MPI_Finalize while a peer is stuck. So the last thing such a rank does is Abort.

This is the only module that imports mpi4py. It must never know messages or clients.
"""

import atexit
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import monotonic, sleep
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fedmpi.errors import PeerSilent, WorldError
from fedmpi.messages import CHUNK_BYTES
from fedmpi.transports import shared
from fedmpi.transports.base import GRACE_S, Transport
from fedmpi.transports.link import Wire
from fedmpi.transports.progress import MAX_PAUSE_S, Operation, Progress, nothing
from fedmpi.world import World

if TYPE_CHECKING:
    import torch

ARRIVAL, VERDICT = 1, 2  # tags on COMM_WORLD
NEAR = 1  # a tag on its duplicate, where links have their own from 2 on
MAX_VERDICT_BYTES = 1024
MAX_NAME_BYTES = 64
EXIT_CODE = 1


class MpiWire:
    """One generation of a link. A second tag tells the other side that this one was closed."""

    def __init__(self, mpi: ModuleType, comm: Any, progress: Progress, peer: int, generation: int) -> None:
        self._byte, self._comm, self._progress, self._peer = mpi.BYTE, comm, progress, peer
        self._failed = mpi.Exception
        self._tag, self._cut_tag = 2 * generation, 2 * generation + 1
        self._state = threading.Lock()
        self._closed = ""
        self._operations: set[Operation] = set()
        space = bytearray(1)
        cut = partial(comm.Irecv, [space, mpi.BYTE], peer, self._cut_tag)
        self._operations.add(progress.start(lambda: [cut()], True, lambda: self._break("it closed the link")))

    def write(self, *parts: memoryview) -> None:
        """Post all parts, then wait for them."""
        self._do(lambda: [self._comm.Isend([part, self._byte], self._peer, self._tag) for part in parts], False)

    def flush(self) -> None:
        """Nothing to wait for: `write` has waited."""

    def read(self, *parts: memoryview, heard: Callable[[int], None]) -> None:
        """Post all parts, then wait for them."""
        self._do(lambda: [self._comm.Irecv([part, self._byte], self._peer, self._tag) for part in parts], True)
        heard(sum(map(len, parts)))

    def close(self) -> None:
        """Tell the other side, and give up all that is pending on this one."""
        if not self._closed:
            post = [self._comm.Isend, [b"", self._byte], self._peer, self._cut_tag]
            with suppress(self._failed):  # nobody is there to be told
                self._progress.start(lambda: [post[0](*post[1:])], False, nothing)
        self._break("this side closed the link")

    def _do(self, post: Callable[[], Sequence[Any]], receives: bool) -> None:
        done = threading.Event()
        with self._state:
            if self._closed:
                raise ConnectionError(self._closed)
            try:
                operation = self._progress.start(post, receives, done.set)
            except self._failed as error:  # of a peer that is known to be gone, at once
                raise ConnectionError(str(error)) from None
            self._operations.add(operation)
        done.wait()
        with self._state:
            self._operations.discard(operation)
        if operation.error:
            raise ConnectionError(operation.error)

    def _break(self, reason: str) -> None:
        with self._state:
            self._closed = self._closed or reason
            operations = set(self._operations)
        self._progress.cancel(operations, self._closed)


class MpiTogether:
    """Collectives on a communicator of their own. Whoever waits is told by the thread that asks after all operations."""

    def __init__(self, mpi: ModuleType, progress: Progress, timeout_s: float) -> None:
        self._mpi, self._progress, self._timeout_s = mpi, progress, timeout_s
        self._current: Operation | None = None
        self._closed = False

        def duplicate() -> list[Any]:
            self._comm, request = mpi.COMM_WORLD.Idup()
            return [request]

        self._do(duplicate, timeout_s)

    def broadcast(self, data: "torch.Tensor") -> None:
        """Rank 0's bytes to all."""
        self._do(lambda: [self._comm.Ibcast([data.numpy(), self._mpi.BYTE], 0)])

    def add(self, data: "torch.Tensor") -> None:
        """The sum of all to rank 0."""
        values = [data.numpy(), self._mpi.DOUBLE]
        mine = self._mpi.IN_PLACE if self._comm.rank == 0 else values
        self._do(lambda: [self._comm.Ireduce(mine, values if self._comm.rank == 0 else None, self._mpi.SUM, 0)])

    def close(self) -> None:
        """Give up what is pending: MPI cannot take it back, but nobody waits for it."""
        self._closed = True
        if self._current is not None:
            self._progress.cancel([self._current], "this side left the collective")

    def _do(self, post: Callable[[], Sequence[Any]], limit_s: float | None = None) -> None:
        done = threading.Event()
        self._current = operation = self._progress.start(post, False, done.set)
        if self._closed:  # while it was begun
            self.close()
        if not done.wait(limit_s):
            self.close()
        if operation.error:
            raise ConnectionError(operation.error)


def _load() -> ModuleType:
    """mpi4py with a library under it, good enough for a thread of ours."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise WorldError(f"--transport mpi needs mpi4py and an MPI: pip install 'fedmpi[mpi]' ({reason})") from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise WorldError(f"MPI gives thread level {MPI.Query_thread()}, but SERIALIZED is needed: unset MPI4PY_RC_THREAD_LEVEL")
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
    return MPI


def _finish(mpi: ModuleType, requests: Sequence[Any], timeout_s: float) -> list[int]:
    """Wait for requests without burning a core; the indices of those that are not done in time."""
    deadline = monotonic() + timeout_s
    while (late := [index for index, request in enumerate(requests) if not request.Test()]) and monotonic() < deadline:
        sleep(MAX_PAUSE_S)
    return late


def _meet(mpi: ModuleType, world: World, timeout_s: float) -> None:
    """Wait until every rank has arrived. All ranks get the same verdict, which names who is missing."""
    everyone, space = mpi.COMM_WORLD, bytearray(MAX_VERDICT_BYTES)
    others = range(1, world.size)
    if world.rank:
        arrival = everyone.Isend([b"", mpi.BYTE], 0, ARRIVAL)
        late = _finish(mpi, [everyone.Irecv([space, mpi.BYTE], 0, VERDICT), arrival], timeout_s + GRACE_S)
        verdict = space.rstrip(b"\0").decode()
        if late:
            verdict = f"rank 0 of {world.size} did not arrive within {timeout_s:g} s; see its output"
    else:
        late = _finish(mpi, [everyone.Irecv([bytearray(1), mpi.BYTE], rank, ARRIVAL) for rank in others], timeout_s)
        verdict = _complaint([others[index] for index in late], world.size, timeout_s)
        text = verdict.encode()[:MAX_VERDICT_BYTES]
        _finish(mpi, [everyone.Isend([text, mpi.BYTE], rank, VERDICT) for rank in others], GRACE_S)
    if verdict:
        _abort_at_exit(mpi)
        raise PeerSilent(verdict)


def _complaint(missing: list[int], size: int, timeout_s: float) -> str:
    if not missing:
        return ""
    here = ", ".join(str(rank) for rank in range(size) if rank not in missing)
    who = ", ".join(map(str, missing))
    return f"rank {who} of {size} did not arrive within {timeout_s:g} s; arrived: {here}; see the output of those missing"


def _abort_at_exit(mpi: ModuleType) -> None:
    """After the program has shown its error, end the job instead of waiting in MPI_Finalize for who will not come."""
    atexit.register(mpi.COMM_WORLD.Abort, EXIT_CODE)


def _near(mpi: ModuleType, comm: Any, world: World, timeout_s: float, apart: bool) -> dict[int, Wire]:
    """Links to the ranks that find the server on their own machine, by peer; each says whether it did."""

    def wait(requests: Sequence[Any], what: str) -> None:
        if _finish(mpi, requests, timeout_s):
            _abort_at_exit(mpi)
            raise PeerSilent(f"rank {world.rank} of {world.size}: {what} did not finish within {timeout_s:g} s")

    listener = shared.Listener() if world.rank == 0 and world.local_size > 1 and not apart else None
    space = bytearray((listener.name if listener is not None else "").encode().ljust(MAX_NAME_BYTES, b"\0"))
    wait([comm.Ibcast([space, mpi.BYTE], 0)], "the broadcast of the server's name")
    name = space.rstrip(b"\0").decode()
    if not name:
        return {}
    if world.rank:
        wire = shared.call(name, world.rank, 1)
        wait([comm.Isend([b"n" if wire is None else b"y", mpi.BYTE], 0, NEAR)], "its answer whether the server is near")
        return {} if wire is None else {0: wire}
    assert listener is not None
    said = {peer: bytearray(1) for peer in range(1, world.size)}
    wait([comm.Irecv([one, mpi.BYTE], peer, NEAR) for peer, one in said.items()], "the clients' answer whether they are near")
    return {peer: listener.link(peer, 1) for peer, one in said.items() if one == b"y"}


def open(world: World, *, timeout_s: float, chunk_bytes: int = CHUNK_BYTES, apart: bool = False) -> Transport:
    """Meet the other ranks and link up: the server to every client rank, a client rank to the server.

    Ranks of one machine lend each other memory, unless they are to behave as if they were apart.
    """
    mpi = _load()
    if (mpi.COMM_WORLD.rank, mpi.COMM_WORLD.size) != (world.rank, world.size):
        found = f"MPI says rank {mpi.COMM_WORLD.rank} of {mpi.COMM_WORLD.size}"
        raise WorldError(f"expected rank {world.rank} of {world.size}, {found}: was this started by the mpirun of this MPI?")
    _meet(mpi, world, timeout_s)
    comm, duplicated = mpi.COMM_WORLD.Idup()
    if _finish(mpi, [duplicated], timeout_s):
        _abort_at_exit(mpi)
        raise PeerSilent(f"rank {world.rank} of {world.size}: MPI_Comm_idup did not finish within {timeout_s:g} s")
    near = _near(mpi, comm, world, timeout_s, apart)
    progress = Progress(mpi)
    atexit.register(progress.stop)
    generations = dict.fromkeys([0] if world.rank else range(1, world.size), 0)

    def connect(peer: int) -> Wire:
        generations[peer] += 1
        if peer in near:
            return near.pop(peer)  # one that is made anew goes by MPI
        return MpiWire(mpi, comm, progress, peer, generations[peer])

    return Transport(
        world.rank,
        world.size,
        {peer: connect(peer) for peer in generations},
        connect,
        timeout_s=timeout_s,
        chunk_bytes=chunk_bytes,
        last_resort=lambda: _abort_at_exit(mpi),
        gather_all=lambda generation: MpiTogether(mpi, progress, timeout_s),
    )
