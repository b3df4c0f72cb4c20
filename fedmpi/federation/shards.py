"""One job's questions shared by its ranks in fixed chunks, so that no answer depends on how many ranks there are.

Rank 0 hands out which chunks are open, asks its own share, and takes the others' answers in turn. It never knows what is asked.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedmpi.errors import ProtocolError
from fedmpi.federation.post import Post
from fedmpi.messages import Kind

HEAD = 0
Chunk = list[int]
Ask = Callable[[Sequence[int]], dict[str, Any]]


def handed_out(post: Post | None, chunks: Sequence[Chunk], ask: Ask) -> Iterator[dict[str, Any]]:
    """On rank 0: what was said to each chunk, in their order."""
    if post is None:
        yield from map(ask, chunks)
        return
    for peer in post.transport.peers:
        post.send_json(peer, Kind.QUESTION, {"chunks": list(chunks)})
    size = post.transport.size
    for first in range(0, len(chunks), size):
        yield ask(chunks[first])
        for peer in range(1, min(size, len(chunks) - first)):
            message = post.expect(peer, Kind.ANSWER, -1, f"waiting for chunk {first + peer} of {len(chunks)}")
            yield post.json(message)


def help_out(post: Post, ask: Ask) -> int:
    """On every other rank: ask one's share; gives how many chunks that was."""
    told = post.json(post.expect(HEAD, Kind.QUESTION, -1, "waiting to be told what to ask"))
    chunks = told.get("chunks")
    if not isinstance(chunks, list):
        raise ProtocolError("rank 0 named no chunks to ask")
    mine = chunks[post.transport.rank :: post.transport.size]
    for chunk in mine:
        post.send_json(HEAD, Kind.ANSWER, ask(chunk))
    return len(mine)
