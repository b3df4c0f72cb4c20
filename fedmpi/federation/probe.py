"""The probe: before the rounds, how fast the links really are and how fast every rank codes, for who chooses a chain.

All ranks take part, at the same time, as in a round: links that share a wire are measured sharing it, and ranks that share cores
too. It takes about a second. This module must never know what will be sent.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from fedmpi.codecs import chains, choice
from fedmpi.codecs.choice import Cost, Way
from fedmpi.federation.coding import CHUNK, Encoding, Known
from fedmpi.federation.post import Post, content
from fedmpi.messages import Kind
from fedmpi.round import SERVER

SMALL_BYTES, MOST_BYTES = 1 << 10, 8 << 20
ENOUGH_S = 0.15  # a message that takes so long says enough
GROWTH = 4
CHUNKS, EMPTY = 8, chains("zstd")  # coded chunks by which it is measured what each of them costs


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
    chunk_s = max(0.0, _exchange_coded(post, 1 + CHUNKS) - _exchange_coded(post, 1)) / CHUNKS
    post.send_bytes(peers, Kind.QUESTION, b"")
    return Found(replace(down, chunk_s=chunk_s), replace(up, chunk_s=chunk_s), choice.slowest(costs))


def follow(post: Post) -> None:
    """Everybody else's: answer until nothing is asked any more."""
    asked = post.json(post.expect(SERVER, Kind.QUESTION, -1, "measuring codecs"))
    post.send_json(SERVER, Kind.ANSWER, {chain: asdict(cost) for chain, cost in choice.measure(asked["chains"]).items()})
    while True:
        message, size = post.receive({SERVER}, "measuring the link"), 0
        if message.header.kind is Kind.CODED:
            post.decode(message, EMPTY, Known(), "measuring coded chunks")
        elif said := content(post.expected(message, Kind.QUESTION, -1)):
            size = min(int.from_bytes(said[:8], "little"), MOST_BYTES)
        else:
            return
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
    return _answered(post, lambda peers: post.send_bytes(peers, Kind.QUESTION, up_bytes.to_bytes(8, "little") + bytes(down_bytes)))


def _exchange_coded(post: Post, num: int) -> float:
    """Seconds until everybody has had so many coded chunks with next to nothing in them."""
    coded = Encoding(EMPTY, {"nothing": torch.zeros(num * CHUNK)}, 0, Known())
    return min(_answered(post, lambda peers: post.send_coded(peers, coded, -1)) for _ in range(2))


def _answered(post: Post, send: Callable[[Collection[int]], None]) -> float:
    began = time.perf_counter()
    send(post.transport.peers)
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
