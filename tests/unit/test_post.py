"""Tensors over the post: what is decoded does not depend on how they lie in the sender's memory."""

import threading
from collections.abc import Mapping

import pytest
import torch

from fedmpi.federation.post import Post
from fedmpi.manifest import Packed, manifest_of
from fedmpi.messages import Kind
from fedmpi.transports import in_process

VALUES = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4, dtype=torch.int64),
    "c": torch.empty(0, 2),
    "d": torch.tensor(-1.5),
}


def side_by_side(order: str, gap: int = 0) -> dict[str, torch.Tensor]:
    """The tensors as views of one buffer, in this order, with unused elements between them."""
    lengths = [VALUES[name].numel() + gap for name in order]
    parts = torch.split(torch.zeros(3 + sum(lengths))[3:], lengths)
    made = {}
    for name, part in zip(order, parts, strict=True):
        made[name] = part[: VALUES[name].numel()].view(VALUES[name].shape).copy_(VALUES[name])
    return {name: made[name] for name in sorted(made)}


def carried(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the sender says will be decoded, and what the receiver decodes."""
    decoded: dict[str, torch.Tensor] = {}
    server, client = in_process.open_all(2)

    def receive() -> None:
        with client, client.turn:
            post = Post(client)
            message = post.expect(0, Kind.BROADCAST, 0, "test")
            decoded.update({name: tensor.clone() for name, tensor in post.tensors(message).items()})
            message.release()

    thread = threading.Thread(target=receive)
    thread.start()
    with server, server.turn:
        said = Post(server).send_tensors((1,), Kind.BROADCAST, dict(tensors), 0)
    thread.join()
    return said, decoded


@pytest.mark.parametrize(
    "tensors",
    [
        VALUES,
        side_by_side("acd"),
        side_by_side("dca"),
        side_by_side("acd", gap=1),
        {"a": torch.arange(6.0).view(3, 2).t(), "d": VALUES["d"]},
        {"c": VALUES["c"]},
    ],
    ids=["apart", "as the manifest has them", "in another order", "with gaps", "transposed", "nothing"],
)
def test_what_is_said_is_what_is_decoded(tensors: dict[str, torch.Tensor]) -> None:
    said, decoded = carried(tensors)
    assert said.keys() == decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(decoded[name], tensor) and torch.equal(said[name], tensor)


def test_tensors_that_lie_as_the_manifest_has_them_are_not_copied() -> None:
    together, apart = side_by_side("acd"), {name: VALUES[name] for name in "acd"}
    for tensors, copied in ((together, False), (apart, True)):
        packed = Packed(tensors, manifest_of(tensors))
        start = torch.frombuffer(packed[:], dtype=torch.uint8).data_ptr()
        assert (start != tensors["a"].data_ptr()) == copied


def test_what_is_kept_outlives_the_message() -> None:
    """The buffer of a kept message is not used for the next one."""
    server, client = in_process.open_all(2, chunk_bytes=4096)
    values = [{"a": torch.full((40_000,), float(number))} for number in range(3)]
    kept: list[torch.Tensor] = []

    def receive() -> None:
        with client, client.turn:
            post = Post(client)
            for number in range(3):
                message = post.expect(0, Kind.BROADCAST, number, "test")
                kept.append(post.keep(message)["a"])
                message.release()

    thread = threading.Thread(target=receive)
    thread.start()
    with server, server.turn:
        for number, tensors in enumerate(values):
            Post(server).send_tensors((1,), Kind.BROADCAST, tensors, number)
    thread.join()
    assert all(torch.equal(kept[number], values[number]["a"]) for number in range(3))
    assert client._inbox._in_use == 0
