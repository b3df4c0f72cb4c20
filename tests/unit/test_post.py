"""Tensors over the post: what is decoded does not depend on how they lie in the sender's memory."""

import threading
from collections.abc import Mapping

import pytest
import torch

from fedmpi.federation.post import Post
from fedmpi.manifest import Packed, manifest_of
from fedmpi.messages import Kind
from fedmpi.transports import in_process
from fedmpi.transports.base import Transport
from fedmpi.transports.outgoing import Outgoing

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


def test_members_hear_once_their_own_leader_has_all_and_nobody_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmpi.transports.outgoing.SMALL_BYTES", 64)  # what is small goes at once
    ranks, may_leave, order = in_process.open_all(4), threading.Event(), []
    heard = {rank: threading.Event() for rank in (1, 2, 3)}
    deliver = Transport._deliver

    def late(self: Transport, peer: int, message: Outgoing) -> None:
        if self.rank == 0 and peer == 1 and message.header.kind is Kind.BROADCAST:
            assert may_leave.wait(20)
        deliver(self, peer, message)

    def receive(rank: Transport) -> None:
        with rank, rank.turn:
            post = Post(rank)
            order.append((rank.rank, post.expect(0, Kind.BROADCAST, 0, "test").header.length))
            heard[rank.rank].set()

    monkeypatch.setattr(Transport, "_deliver", late)
    threads = [threading.Thread(target=receive, args=(rank,)) for rank in ranks[1:]]
    for thread in threads:
        thread.start()
    with ranks[0] as server, server.turn:
        post = Post(server)
        values = {"a": torch.zeros(64)}
        post.send_tensors((1,), Kind.BROADCAST, values, 0, behind=True, told={1: (2,)})  # comes back though it cannot leave
        post.send_bytes((3,), Kind.BROADCAST, b"", 0)  # another link: not behind it
        with post.apart():
            assert heard[3].wait(20)
        assert order == [(3, 0)]
        may_leave.set()
        assert post.all_left() == set()
        with post.apart():
            assert heard[1].wait(20) and heard[2].wait(20)
    for thread in threads:
        thread.join()
    assert sorted(order) == [(1, 256), (2, 0), (3, 0)]
