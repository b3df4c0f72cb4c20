"""Scores on rows that stay where they are: the server sends tensors, and each client's rank answers with figures of its own rows.

It knows links and who sits where; never what is scored, or how.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fedmpi.errors import ProtocolError
from fedmpi.federation.post import Post
from fedmpi.federation.roll import Roll
from fedmpi.messages import Kind
from fedmpi.tensors import Tensors
from fedmpi.transports.inbox import Message

Figures = dict[int, Mapping[str, Any]]  # by client
Answer = Callable[[Tensors], Figures]


def ask(roll: Roll, leaders: Collection[int], tensors: Tensors) -> Figures:
    """The server's side, between two rounds: the figures of the clients that these ranks speak for."""
    roll.post.send_tensors(leaders, Kind.QUESTION, tensors, -1)
    found: Figures = {}
    missing = set(leaders) - roll.gone.keys()
    while missing:
        message = roll.receive(missing, "waiting for the clients' scores")
        if message is not None:
            missing.discard(message.peer)
            found |= _figures(roll, message)
        missing -= roll.gone.keys()
    return found


def _figures(roll: Roll, message: Message) -> Figures:
    hosted, told = roll.placement.hosted_by(message.peer), roll.post.json(roll.post.expected(message, Kind.ANSWER, -1))
    if sorted(map(int, told)) != sorted(hosted):
        raise ProtocolError(f"rank {message.peer} tells scores of clients {sorted(told)}, it hosts {hosted}")
    return {int(client): figures for client, figures in told.items()}


def reply(post: Post, message: Message, answer: Answer) -> None:
    """A client rank's side."""
    found = answer(post.keep(message))
    message.release()
    post.send_json(message.peer, Kind.ANSWER, {str(client): figures for client, figures in found.items()})
