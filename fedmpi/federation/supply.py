"""What clients are given before the first round because they cannot read it for themselves: facts, files, tensors one by one.

Nobody here holds more than one tensor besides what it keeps. It must never know what the tensors are for.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmpi.errors import ProtocolError, Stopped, WorldError
from fedmpi.federation.post import Post
from fedmpi.messages import Kind
from fedmpi.round import SERVER
from fedmpi.tensors import num_bytes

FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
        *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    }
)


@dataclass(frozen=True)
class Supply:
    """What is given: plain facts, the tokenizer's files, and named tensors that are asked for one by one, once."""

    facts: Mapping[str, Any]
    files: Mapping[str, bytes]
    tensors: Iterable[tuple[str, torch.Tensor]]


def hand_out(post: Post, experiment: str, supply: Supply, holders: Collection[int]) -> int:
    """Give every rank facts and files and the holders the tensors; gives the bytes of tensors and files that were sent."""
    for peer, greeting in post.from_each(Kind.HELLO, "greeting the clients"):
        same(peer, greeting, experiment)
    return give(post, post.transport.peers, supply, holders)


def same(peer: int, greeting: Mapping[str, Any], experiment: str) -> None:
    """Refuse who is here for something else."""
    if greeting["experiment"] != experiment:
        raise WorldError(
            f"rank {peer} runs experiment {greeting['experiment']}, the server {experiment}: give all ranks equal settings"
        )


def give(post: Post, peers: Collection[int], supply: Supply, holders: Collection[int]) -> int:
    """Send it to these ranks, the tensors to those of them that hold clients; gives the bytes of tensors and files.

    Ends with the first of them that is lost, also where the run goes on without ranks.
    """
    for peer in peers:
        post.send_json(peer, Kind.WELCOME, {"facts": supply.facts, "holds": peer in holders})
    files = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in supply.files.items() if content}
    post.send_tensors(peers, Kind.SUPPLY, files, -1)
    sent = num_bytes(files) * len(peers)
    for name, tensor in supply.tensors if holders else ():
        post.send_tensors(sorted(holders), Kind.SUPPLY, {name: tensor.contiguous()}, -1)
        for peer in holders:
            if (lost := post.transport.failures.get(peer)) is not None:
                raise lost
        sent += num_bytes({name: tensor}) * len(holders)
    post.send_tensors(sorted(holders), Kind.SUPPLY, {}, -1)  # the end
    return sent


def call_off(post: Post, why: str) -> None:
    """Tell every rank that nothing comes: the job stops."""
    for peer in post.transport.peers:
        post.send_json(peer, Kind.WELCOME, {"stopped": why})


def take_over(post: Post, experiment: str) -> Supply:
    """What the server gives to this rank; the tensors come while they are asked for, and all of them must be."""
    post.send_json(SERVER, Kind.HELLO, {"experiment": experiment})
    said = post.json(post.expect(SERVER, Kind.WELCOME, -1, "waiting for what the server gives to its clients"))
    if "stopped" in said:
        raise Stopped(said["stopped"])
    files = {name: content.numpy().tobytes() for name, content in _next(post).items()}
    if foreign := sorted(files.keys() - FILES):
        raise ProtocolError(f"rank {SERVER} sent the files {', '.join(foreign[:3])}: none of a tokenizer's")
    return Supply(said["facts"], files, _stream(post) if said["holds"] else ())


def _stream(post: Post) -> Iterator[tuple[str, torch.Tensor]]:
    while tensors := _next(post):
        yield from tensors.items()


def _next(post: Post) -> dict[str, torch.Tensor]:
    message = post.expect(SERVER, Kind.SUPPLY, -1, "receiving what the server gives to its clients")
    tensors = post.keep(message)
    message.release()
    return tensors
