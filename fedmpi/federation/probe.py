"""The probe: before the rounds, how fast the links really are and how fast every rank codes, for who chooses a chain.

All ranks take part, at the same time, as in a round: links that share a wire are measured sharing it, and ranks that share cores
too. It takes about a second. This module must never know what will be sent.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from fedmpi.codecs import choice
from fedmpi.codecs.choice import Cost, Way
from fedmpi.federation.post import Post, content
from fedmpi.messages import Kind
from fedmpi.round import SERVER

SMALL_BYTES, MOST_BYTES = 1 << 10, 8 << 20
ENOUGH_S = 0.15  # a message that takes so long says enough
GROWTH = 4


@dataclass(frozen=True)
class Found:
    """What was measured: each way of the links, for one message by every rank, and each chain on the slowest rank."""

    down: Way
    up: Way
    costs: dict[str, Cost]


def lead(post: Post, candidates: Sequence[str]) -> Found:
    """The server's side."""
    peers = post.transport.peers
    for peer in peers:
        post.send_json(peer, Kind.QUESTION, {"chains": list(candidates)})
    costs = [choice.measure(candidates)]
    for _, told in post.from_each(Kind.ANSWER, "measuring codecs"):
        costs.append({chain: Cost(**cost) for chain, cost in told.items()})
    down = _grown(lambda size: _exchange(post, size, 0), len(peers))
    up = _grown(lambda size: _exchange(post, 0, size), len(peers))
    post.send_bytes(peers, Kind.QUESTION, b"")
    return Found(down, up, choice.slowest(costs))


def follow(post: Post) -> None:
    """Everybody else's: answer until nothing is asked any more."""
    asked = post.json(post.expect(SERVER, Kind.QUESTION, -1, "measuring codecs"))
    post.send_json(SERVER, Kind.ANSWER, {chain: asdict(cost) for chain, cost in choice.measure(asked["chains"]).items()})
    while said := content(post.expect(SERVER, Kind.QUESTION, -1, "measuring the link")):
        size = min(int.from_bytes(said[:8], "little"), MOST_BYTES)
        post.send_bytes((SERVER,), Kind.ANSWER, bytes(size))


def tell(post: Post, chain: str) -> None:
    """What was chosen, to everybody."""
    for peer in post.transport.peers:
        post.send_json(peer, Kind.ANSWER, {"chain": chain})


def told(post: Post) -> str:
    """What the server has chosen."""
    return str(post.json(post.expect(SERVER, Kind.ANSWER, -1, "waiting for the choice of a codec"))["chain"])


def _exchange(post: Post, down_bytes: int, up_bytes: int) -> float:
    """Seconds until everybody has had so many bytes and has answered with so many."""
    began = time.perf_counter()
    post.send_bytes(post.transport.peers, Kind.QUESTION, up_bytes.to_bytes(8, "little") + bytes(down_bytes))
    waiting = set(post.transport.peers)
    while waiting:
        message = post.receive(waiting, "measuring the links")
        waiting.discard(message.peer)
        message.release()
    return time.perf_counter() - began


def _grown(exchange: Callable[[int], float], copies: int) -> Way:
    """Larger and larger messages, until one takes long enough to be told from what a message costs in any case.

    What the last growth has added tells the speed: what a link lets pass at once, like its latency, is in both.
    """
    exchange(SMALL_BYTES)  # opens windows, touches memory
    least = seconds = min(exchange(SMALL_BYTES) for _ in range(3))
    size, byte_s = SMALL_BYTES, 0.0
    while size < MOST_BYTES and seconds - least < ENOUGH_S:
        smaller, before = size, seconds
        size = min(GROWTH * size, MOST_BYTES)
        seconds = exchange(size)
        byte_s = max(0.0, seconds - before) / (copies * (size - smaller))
    return Way(least, byte_s, copies)
