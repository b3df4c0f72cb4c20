"""Collectives: one buffer from rank 0 to all ranks, or the sum of all ranks' float64 buffers to rank 0, in a static, healthy world.

Whatever it is made of (gloo, MPI, threads), a collective moves nothing before every rank has entered it, so ranks enter only what
rank 0 has announced over the links. The links also say who is lost: a wait here ends as soon as a link or the job does. A
collective that failed is of no use any more, and with it the job. This module must never know what the numbers are.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from time import monotonic, sleep
from typing import TYPE_CHECKING, Protocol

import torch

from fedmpi.errors import LinkError

if TYPE_CHECKING:
    from fedmpi.transports.base import Transport

POLL_S = 0.05
BROADCAST_BYTES = 16 << 20  # pieces: on a tree of ranks, one travels on while the next comes; smaller ones cost more than that wins
SUM_BYTES = 32 << 20


class Body(Protocol):
    """What a library brings. Calls block; ConnectionError says that one failed; closing wakes who is in one."""

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's bytes into everybody's buffer of the same size."""

    def add(self, data: torch.Tensor) -> None:
        """The sum of everybody's float64 values into rank 0's buffer; what the others have in theirs afterwards is nobody's."""

    def close(self) -> None:
        """May be called twice."""


class Together:
    """All ranks of a transport, one collective at a time, in a thread that may be given up."""

    def __init__(self, transport: "Transport", body: Body) -> None:
        self._transport, self._body = transport, body
        self._orders: queue.SimpleQueue[tuple[Callable[[torch.Tensor], None], torch.Tensor, Future[None]] | None]
        self._orders = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="together", daemon=True)
        self._thread.start()

    def broadcast(self, data: torch.Tensor, phase: str) -> None:
        """Rank 0's bytes into everybody's buffer. As on the links, rank 0 counts them for every peer."""
        begun = [self._begin(self._body.broadcast, part) for part in torch.split(data, BROADCAST_BYTES)]
        for one in begun:
            self.wait(one, phase)
        for way in (self._transport.received if self._transport.rank else self._transport.sent).values():
            way.payload_bytes += data.numel()

    def add(self, values: torch.Tensor) -> "Future[None]":
        """Begin to add float64 values up; they are rank 0's, or free again, when the wait for it is over."""
        for way in (self._transport.sent if self._transport.rank else self._transport.received).values():
            way.payload_bytes += 8 * values.numel()
        return self._begin(self._body.add, values)

    def wait(self, begun: "Future[None]", phase: str) -> None:
        """Until it is done, or until it is known that it never will be."""
        try:
            while True:
                try:
                    return begun.result(POLL_S)
                except Late:
                    self._transport.alive(phase)
        except ConnectionError as error:
            self._say_why(phase)
            raise LinkError(f"{phase}: a collective failed: {error}; the output of the other ranks says why") from None
        except BaseException:
            self._body.close()  # or its thread would keep the program from ending
            raise

    def close(self) -> None:
        """Leave; what others do with their part is theirs."""
        self._orders.put(None)
        self._thread.join(self._transport.timeout_s)
        self._body.close()

    def _begin(self, what: Callable[[torch.Tensor], None], data: torch.Tensor) -> "Future[None]":
        begun: Future[None] = Future()
        self._orders.put((what, data, begun))
        return begun

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            what, data, begun = order
            try:
                what(data)
                begun.set_result(None)
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                begun.set_exception(error)

    def _say_why(self, phase: str) -> None:
        """A library names no rank; the links do, a moment later."""
        self._body.close()
        deadline = monotonic() + min(3.0, self._transport.timeout_s)
        while monotonic() < deadline:
            self._transport.alive(phase)
            sleep(POLL_S)
