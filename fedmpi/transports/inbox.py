"""What has come and was not yet asked for, and the few buffers that large payloads, or chunks of them, may lie in.

Receiver threads take a buffer before they read a large payload or the next chunk of one. With a fixed number of buffers a
server's memory does not grow with its clients; the others simply are not read from until it is their turn. This module
must never know links or wires.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedmpi.messages import Header
from fedmpi.tensors import room


@dataclass
class Message:
    """A message that came, or a part of one: the chunk of its payload from `first` to `stop`; the note comes with the first part.

    The payload may lie in a re-used buffer: `release` it when nothing looks at it any more, or `keep` it for good.
    """

    peer: int
    header: Header
    payload: torch.Tensor | None
    note: bytes = b""
    first: int = 0
    stop: int = 0
    _give: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def last(self) -> bool:
        """Whether the payload ends here."""
        return self.stop >= self.header.length

    def release(self) -> None:
        """Hand the payload's buffer back. May be called twice."""
        give, self._give, self.payload = self._give, None, None
        if give is not None:
            give()

    def keep(self) -> torch.Tensor | None:
        """The payload; its buffer belongs to the caller from now on."""
        give, self._give = self._give, None
        if give is not None:
            give()
        return self.payload


class Inbox:
    """Messages in arrival order, and buffers under a permit; all guarded by the condition given."""

    def __init__(self, state: threading.Condition) -> None:
        self._state = state
        self._messages: deque[Message] = deque()
        self._awaited: list[frozenset[int]] = []
        self._filling: dict[int, torch.Tensor] = {}  # by the peer whose message is on its way into the buffer
        self._in_use = 0

    def take(self, peer: int, num_bytes: int, num_buffers: int, unwanted: Callable[[], bool]) -> torch.Tensor | None:
        """Wait for one of so many buffers for what comes from `peer`; None as soon as that is unwanted."""
        with self._state:
            self._state.wait_for(lambda: unwanted() or self._may_take(peer, num_buffers))
            if unwanted():
                return None
            self._in_use += 1
            self._filling[peer] = room(num_bytes, torch.uint8)
            return self._filling[peer]

    def _may_take(self, peer: int, num_buffers: int) -> bool:
        """Past the limit, only what somebody waits for, when nothing else of what he waits for is there or on its way.

        Without that exception, buffers full of messages that nobody asks for yet would stop the one that is asked for.
        """
        if self._in_use < num_buffers:
            return True
        there = self._filling.keys() | {message.peer for message in self._messages}
        return any(peer in wanted and wanted.isdisjoint(there) for wanted in self._awaited)

    def give(self) -> None:
        """A buffer is not in use any more; its memory is taken again once nobody holds it."""
        with self._state:
            self._in_use -= 1
            self._state.notify_all()

    def spoil(self, peer: int) -> None:
        """A message from `peer` that was on its way will not come."""
        with self._state:
            if self._filling.pop(peer, None) is not None:
                self._in_use -= 1  # its memory is not used again while the wire's library, which may still write there, holds it
                self._state.notify_all()

    def put(self, message: Message) -> None:
        """A whole message has come, or a part of one."""
        with self._state:
            if self._filling.pop(message.peer, None) is not None:
                message._give = self.give
            self._messages.append(message)
            self._state.notify_all()

    def next(self, wanted: frozenset[int], otherwise: Callable[[], None]) -> Message:
        """The first message of any of these peers; while there is none, `otherwise` may raise."""
        with self._state:
            self._awaited.append(wanted)
            self._state.notify_all()  # a permit may be due now
            try:
                while (message := self._pop(wanted)) is None:
                    otherwise()
                    self._state.wait()
                return message
            finally:
                self._awaited.remove(wanted)

    def holds(self, wanted: frozenset[int]) -> bool:
        """Whether a message of any of these peers is there."""
        with self._state:
            return any(message.peer in wanted for message in self._messages)

    def _pop(self, wanted: frozenset[int]) -> Message | None:
        for index, message in enumerate(self._messages):
            if message.peer in wanted:
                del self._messages[index]
                return message
        return None

    def drop(self, peer: int) -> None:
        """Throw away what has come from `peer`."""
        with self._state:
            for message in [message for message in self._messages if message.peer == peer]:
                self._messages.remove(message)
                message.release()
