"""Scores on rows that stay where they are: the server sends tensors, and each client's rank answers with figures of its own rows.

It knows links and who sits where; never what is scored, or how.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fedmpi.errors import ProtocolError
from fedmpi.federation.post import Post
from fedmpi.messages import Kind
from fedmpi.round import Placement
from fedmpi.tensors import Tensors
from fedmpi.transports.inbox import Message

Figures = dict[int, Mapping[str, Any]]  # by client
Answer = Callable[[Tensors], Figures]


def ask(post: Post, placement: Placement, tensors: Tensors) -> Figures:
    """The server's side, between two rounds: the figures of all clients."""
    post.send_tensors(placement.leaders, Kind.QUESTION, tensors, -1)
    found: Figures = {}
    for peer, told in post.from_each(Kind.ANSWER, "waiting for the clients' scores", placement.leaders):
        if sorted(map(int, told)) != sorted(placement.hosted_by(peer)):
            raise ProtocolError(f"rank {peer} tells scores of clients {sorted(told)}, it hosts {placement.hosted_by(peer)}")
        found |= {int(client): figures for client, figures in told.items()}
    return found


def reply(post: Post, message: Message, answer: Answer) -> None:
    """A client rank's side."""
    found = answer(post.keep(message))
    message.release()
    post.send_json(message.peer, Kind.ANSWER, {str(client): figures for client, figures in found.items()})
