"""Ranks that meet at the store of torch.distributed: links between them, and gloo's collectives of all of them.

- A store client that blocks holds a lock. So the rendezvous polls. Later only new links and collectives need it.
- A wait for gloo that times out closes the pair, for good and on both sides, while abort() and shutdown() wake nobody. So the group
  of the collectives is closed by a receive that times out.

The default process group is left alone: it belongs to the clients. This module must never know messages or clients.
"""

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from time import monotonic, sleep
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, ReduceOp, Store, TCPStore, Work  # type: ignore[attr-defined]

from fedmpi.command import FAILED
from fedmpi.errors import LinkError, PeerLost, PeerSilent
from fedmpi.messages import CHUNK_BYTES
from fedmpi.transports import shared, sockets
from fedmpi.transports.base import GRACE_S, Transport
from fedmpi.transports.link import Wire
from fedmpi.world import World

FOREVER = timedelta(days=365)
POLL_S = 0.01
POISON = 1  # a tag with which nothing is ever sent
_CPP_PLACE = re.compile(r"\[\S*:\d+\] ")


class GlooTogether:
    """A process group of all ranks. A step that one of them does not take ends after the deadline."""

    def __init__(self, store: Store, rank: int, size: int, device: ProcessGroupGloo.Device, timeout_s: float) -> None:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._threads, options._timeout = [device], 1, timedelta(seconds=timeout_s)
        self._group = gloo(store, rank, size, options)
        self._other = 0 if rank else size - 1

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's bytes to all."""
        self._do(lambda: self._group.broadcast(data, 0))

    def add(self, data: torch.Tensor) -> None:
        """The sum of all to rank 0."""
        self._do(lambda: self._group.reduce(data, 0, ReduceOp.SUM))

    def close(self) -> None:
        """Let a receive time out, which closes the pairs and wakes everyone."""
        with suppress(RuntimeError):
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, POISON).wait(timedelta(milliseconds=1))

    def _do(self, begin: Callable[[], Work]) -> None:
        try:
            begin().wait(FOREVER)
        except RuntimeError as error:
            raise ConnectionError(_reason(error)) from None


def _reason(error: Exception) -> str:
    """gloo's message without the place in its source and the advice after the first sentence."""
    return _CPP_PLACE.sub("", str(error).splitlines()[0]).split(". ")[0]


class Asking:
    """A store whose answers do not take for ever: they are waited for inside C++, where neither deadlines nor signals reach.

    So a process that is not answered ends.
    """

    def __init__(self, store: Store, who: str, limit_s: float) -> None:
        self._store, self._limit_s = store, limit_s
        self._line = f"fedmpi: {who} got no answer from the job's store for {limit_s:g} s: whoever keeps it hangs or is cut off"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        ask = getattr(self._store, name)

        def asked(*given: object) -> Any:
            alarm = threading.Timer(self._limit_s, self._end)
            alarm.daemon = True
            alarm.start()
            try:
                return ask(*given)
            finally:
                alarm.cancel()

        return asked

    def _end(self) -> None:
        print(self._line, file=sys.stderr, flush=True)
        os._exit(FAILED)


class Rendezvous:
    """How ranks find each other: keys in a store, under a prefix that carries the restart count of the job."""

    def __init__(self, world: World, timeout_s: float, apart: bool = False) -> None:
        self.world, self.timeout_s = world, timeout_s
        self._generations: dict[int, int] = {}
        host, _, port = str(world.store).rpartition(":")
        deadline = timedelta(seconds=timeout_s)
        try:
            tcp = TCPStore(host, int(port), None, world.hosts_store, deadline, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            does = "cannot open its store" if world.hosts_store else f"found no store of rank 0 within {timeout_s:g} s"
            kind = LinkError if world.hosts_store else PeerSilent
            raise kind(f"rank {world.rank} of {world.size} {does} at {world.store} ({_reason(error)})") from None
        self._prefixed = PrefixStore(f"fedmpi/{world.restart}", tcp)
        self._store = Asking(self._prefixed, f"rank {world.rank} of {world.size}", timeout_s + GRACE_S)
        self._host = host
        self._near = shared.Listener() if world.rank == 0 and world.local_size > 1 and not apart else None
        self._far: sockets.Listener | None = None
        if world.rank == 0:
            self._store.set("listener", self._near.name if self._near is not None else "")
            self._listen()

    def _listen(self) -> None:
        """Say where the server can be called, besides where its store is: by its address on the way to that, or by its name."""
        self._far = sockets.Listener()
        said = {"port": self._far.port, "secret": self._far.secret, "hosts": [self._address(), socket.gethostname()]}
        self._store.set("server", json.dumps(said))

    def _address(self) -> str:
        """Of the interface that reaches the store."""
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self._host, 9))  # sends nothing, only chooses its own address
            return str(probe.getsockname()[0])
        return ""

    @cached_property
    def _device(self) -> ProcessGroupGloo.Device:
        """For collectives: the interface that reaches the store reaches the peers; GLOO_SOCKET_IFNAME overrides, as in torch."""
        address = self._address()
        if "GLOO_SOCKET_IFNAME" in os.environ or not address:
            return ProcessGroupGloo.create_default_device()
        if address.startswith("127.") and self.world.local_size < self.world.size:
            return ProcessGroupGloo.create_default_device()
        return ProcessGroupGloo.create_device(hostname=address)

    def meet(self) -> None:
        """Wait until every rank has arrived. All ranks get the same verdict, which names who is missing."""
        self._store.set(f"arrived/{self.world.rank}", "1")
        verdict = self._verdict() if self.world.rank else self._judge()
        if verdict:
            raise PeerSilent(verdict)

    def _judge(self) -> str:
        """The server's part. It goes with a bad verdict only when the others have heard it: the store may go with it."""
        missing = self._missing(range(self.world.size))
        verdict = self._complaint(missing)
        self._store.set("verdict", verdict)
        if missing:
            num_here = self.world.size - len(missing)
            self._until(lambda: self._store.add("heard", 0) == num_here - 1, GRACE_S)
        return verdict

    def _verdict(self) -> str:
        if self._missing([0]):
            return self._complaint([0])
        if not self._until(lambda: self._store.check(["verdict"]), self.timeout_s + GRACE_S):
            return f"rank 0 of {self.world.size} fell silent while the ranks met; see its output"
        verdict = str(self._store.get("verdict").decode())
        with suppress(RuntimeError):  # it may be gone now
            self._store.add("heard", 1)
        return verdict

    def _missing(self, ranks: Iterable[int]) -> list[int]:
        """The ranks that have not arrived when the time is over."""
        keys = {rank: f"arrived/{rank}" for rank in ranks}
        self._until(lambda: self._store.check(list(keys.values())), self.timeout_s)
        return [rank for rank, key in keys.items() if not self._store.check([key])]

    def _complaint(self, missing: list[int]) -> str:
        if not missing:
            return ""
        here = sorted(set(range(self.world.size)) - set(missing)) if self.world.rank == 0 else [self.world.rank]
        who = ", ".join(map(str, missing))
        return (
            f"rank {who} of {self.world.size} did not arrive within {self.timeout_s:g} s; arrived: "
            f"{', '.join(map(str, here))}; see the output of those missing, or raise --timeout_s"
        )

    def _until(self, happened: Callable[[], bool], limit_s: float) -> bool:
        deadline = monotonic() + limit_s
        while not happened():
            if monotonic() > deadline:
                return False
            sleep(POLL_S)
        return True

    def link(self, peer: int) -> Wire:
        """A new generation of the link to `peer`: the client asks, the server takes the newest that was asked for."""
        client = self.world.rank or peer
        try:
            self._generations[client] = generation = self._agree(client)
            if (near := self._shared(client, generation)) is not None:
                return near
            if self._far is not None:
                return self._far.link(client, generation, self.timeout_s)
            server = json.loads(self._store.get("server"))
            hosts = [self._host, *(host for host in server["hosts"] if host and not host.startswith("127."))]
            return sockets.call(hosts, server["port"], server["secret"], client, generation, self.timeout_s)
        except (RuntimeError, ConnectionError) as error:
            raise PeerLost(f"rank {peer}: no link to it could be made: {_reason(error)}") from None

    def _shared(self, client: int, generation: int) -> Wire | None:
        """A link through memory, if the client finds the server on its machine: it says so in the store."""
        name, said = self._store.get("listener").decode(), f"shared/{client}/{generation}"
        if not name:
            return None
        if self.world.rank:
            wire = shared.call(name, client, generation)
            self._store.set(said, "" if wire is None else "yes")
            return wire
        if not self._until(lambda: self._store.check([said]), self.timeout_s):
            raise PeerLost(f"rank {client} did not come back to its link within {self.timeout_s:g} s")
        assert self._near is not None
        return self._near.link(client, generation) if self._store.get(said) else None

    def gather_all(self, generation: int) -> GlooTogether:
        """A process group of all ranks, once all of them are here."""
        try:
            store = PrefixStore(f"together/{generation}", self._prefixed)
            return GlooTogether(store, self.world.rank, self.world.size, self._device, self.timeout_s)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.world.rank}: no collective could be made: {_reason(error)}") from None

    def asks(self, client: int) -> bool:
        """Whether this client wants a newer link than it had."""
        return int(self._store.add(f"asked/{client}", 0)) > self._generations.get(client, 0)

    def _agree(self, client: int) -> int:
        """A client that is not new waits for as long as the store is there: the server looks for it between two rounds."""
        asked, known = f"asked/{client}", self._generations.get(client, 0)
        if self.world.rank:
            generation = int(self._store.add(asked, 1))
            if generation > 1:
                told = "this job has or had such a rank; where the run goes on without it, it is let in between two rounds"
                print(f"fedmpi: rank {client} asks to be let in: {told}", flush=True)
            while generation > 1 and int(self._store.add(f"granted/{client}", 0)) < generation:
                sleep(POLL_S)
            return generation
        if not self._until(lambda: self._store.add(asked, 0) > known, self.timeout_s):
            raise PeerLost(f"rank {client} did not come back to its link within {self.timeout_s:g} s")
        generation = int(self._store.add(asked, 0))
        self._store.add(f"granted/{client}", generation - known)
        return generation


def open(world: World, *, timeout_s: float, chunk_bytes: int = CHUNK_BYTES, apart: bool = False) -> Transport:
    """Meet the other ranks and link up: the server to every client rank, a client rank to the server.

    Ranks of one machine lend each other memory, unless they are to behave as if they were apart.
    """
    if world.size == 1:
        return Transport(0, 1, {}, _nobody, timeout_s=timeout_s, chunk_bytes=chunk_bytes)
    rendezvous = Rendezvous(world, timeout_s, apart)
    try:
        rendezvous.meet()
        wires = {peer: rendezvous.link(peer) for peer in ([0] if world.rank else range(1, world.size))}
    except PeerSilent:
        raise
    except (LinkError, RuntimeError) as error:
        raise PeerLost(
            f"rank {world.rank} of {world.size} could not meet the others ({_reason(error)}); see the output of rank 0, "
            f"and who else uses {world.store}"
        ) from None
    return Transport(
        world.rank, world.size, wires, rendezvous.link, timeout_s=timeout_s, chunk_bytes=chunk_bytes,
        gather_all=rendezvous.gather_all, asks=rendezvous.asks,
    )  # fmt: skip


def _nobody(peer: int) -> Wire:
    raise LinkError(f"there is no rank {peer} in a world of one")
