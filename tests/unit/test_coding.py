"""Messages under codec chains: truth on both sides, chunk by chunk, and what a chain remembers."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedmpi.aggregation import scratch
from fedmpi.codecs import Chain, Chains, chains
from fedmpi.codecs.coder import Coder
from fedmpi.errors import ConfigError, NonFinite, ProtocolError, TrainingError
from fedmpi.federation import coding
from fedmpi.federation.coding import CHUNK, CHUNK_BYTES, Code, Decoding, Downlink, Encoding
from fedmpi.federation.known import Known
from fedmpi.federation.post import Post
from fedmpi.messages import Kind, chunks
from fedmpi.round import Round, Verdict
from fedmpi.tensors import Tensors, num_bytes
from fedmpi.transports import in_process

NOTHING = Known()


def some(seed: int, num: int = 700) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num, 3, generator=generator) for name in ("b", "a")}


def encoded(text: str, tensors: Tensors, seed: int = 0, before: Known = NOTHING, lost: Known = NOTHING) -> Encoding:
    return Encoding(chains(text), tensors, seed, before, lost, told=True).finished()


def said(coded: Encoding, text: str, before: Known = NOTHING, against: int | None = None) -> torch.Tensor:
    """What a receiver decodes, flat."""
    decoding = Decoding(chains(text), coded.manifest, before, coded.against if against is None else against)
    return torch.cat([decoding.values(place, coded[place]) for place in chunks(len(coded), CHUNK_BYTES)])


def flat(coded: Encoding) -> torch.Tensor:
    return torch.cat([coded.tensors[spec.name].reshape(-1) for spec, _ in coded.manifest.places])


@pytest.mark.parametrize(
    "text", ["bf16", "delta,int4:stochastic,zstd", "topk:0.3,int8,ef", "int4; own=topk:0.5,bf16", "raw; own=delta,int8"]
)
def test_both_sides_have_the_same_bits(text: str) -> None:
    """Over several chunks, one of which has parts of two groups; the place of a chunk alone says what its bytes mean."""
    more = {"own/c": torch.randn(CHUNK // 2 + 77, generator=torch.Generator().manual_seed(9))}
    before = Known({**some(1, CHUNK // 4), **more})
    now = {name: tensor + 0.01 for name, tensor in before.tensors.items()}
    coded = encoded(text, now, 7, before, Known(some(3, CHUNK // 4)))
    assert torch.equal(said(coded, text, before), flat(coded)) and coded.num_bytes < num_bytes(now)
    places = list(chunks(len(coded), CHUNK_BYTES))
    assert len(places) == 3 and [name for name, _ in coded.manifest.spans] == ["adapter", "own"]
    for place in places:
        assert len(coded[place]) <= Code(chains(text), coded.manifest).most_bytes(place)


def test_a_chunk_that_was_thrown_away_is_coded_again_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "NUM_KEPT", 2)
    tensors = {"a": torch.randn(CHUNK * 5, generator=torch.Generator().manual_seed(0))}
    coded = Encoding(chains("int4:stochastic,ef"), tensors, 3, NOTHING, told=True)
    places = list(chunks(len(coded), CHUNK_BYTES))
    first = bytes(coded[places[0]])
    rest = [bytes(coded[place]) for place in places[1:]]
    lost = coded.finished().lost["a"].clone()
    assert bytes(coded[places[0]]) == first and coded.num_bytes == len(first) + sum(map(len, rest))
    assert torch.equal(coded.lost["a"], lost)


def test_what_is_lost_is_sent_later() -> None:
    """With error feedback the sum of all that was decoded stays near the sum of all that was meant; without it drifts away."""
    meant, told, told_without = torch.zeros(700, 3), torch.zeros(700, 3), torch.zeros(700, 3)
    lost: Tensors = {}
    for seed in range(40):
        now = {"a": torch.full((700, 3), 0.01) + 0.05 * torch.randn(700, 3, generator=torch.Generator().manual_seed(seed))}
        coded = encoded("topk:0.05,int4,ef", now, 0, NOTHING, Known(lost))
        told_without += encoded("topk:0.05,int4", now).tensors["a"]
        lost = coded.lost
        meant, told = meant + now["a"], told + coded.tensors["a"]
    assert torch.allclose(meant - told, lost["a"], atol=1e-4)
    assert (meant - told).norm() < 0.6 * (meant - told_without).norm()


def test_only_groups_that_feed_back_have_residuals() -> None:
    link, tensors = Downlink(chains("int4,ef; own=int4")), {**some(1), "own/c": torch.randn(30)}
    assert encoded("int4,ef; own=int4", tensors).lost.keys() == {"a", "b"}
    now = link.encode(tensors, Round(0, 0, (0,), 0, 1, 3)).finished().lost  # parked, and the same
    link.settle(Round(1, 0, (0,), 1, 1, 3, verdict=Verdict.COUNTED))
    assert now.keys() == {"a", "b"} and link.saved(0).keys() == {"lost/a", "lost/b"}


def test_a_difference_from_another_state_is_refused() -> None:
    coded = encoded("delta,int8", some(1), 0, Known(some(2)))
    with pytest.raises(ProtocolError, match="cannot be used"):
        said(coded, "delta,int8", Known(some(3)))


@pytest.mark.parametrize("text", ["int8", "int8; own=bf16"])
def test_chunks_that_lie_are_refused(text: str) -> None:
    coded = encoded(text, {**some(1), "own/c": torch.randn(30)})
    (place,) = chunks(len(coded), CHUNK_BYTES)
    data = bytes(coded[place])
    decoding = Decoding(chains(text), coded.manifest, NOTHING, 0)
    for wrong in (b"", data[:3], data[:40], data[:-1], data + b"more", b"\xff" * 4 + data[4:] if ";" in text else b""):
        with pytest.raises(ProtocolError):
            decoding.values(place, memoryview(wrong))


@pytest.mark.parametrize(
    ("text", "value"), [("int8", float("nan")), ("zstd", float("inf")), ("fp16", 1e6), ("raw; own=int4", float("nan"))]
)
def test_what_cannot_be_coded_is_found_before_a_byte_has_left(text: str, value: float) -> None:
    with pytest.raises(NonFinite, match="not finite"):
        Encoding(chains(text), {"a": torch.zeros(CHUNK), "own/b": torch.tensor([0.0, value])}, 0, NOTHING)


def test_a_codec_takes_float32() -> None:
    with pytest.raises(TrainingError, match="x is bfloat16"):
        Encoding(chains("int8"), {"x": torch.zeros(3, dtype=torch.bfloat16)}, 0, NOTHING)


@pytest.mark.parametrize("text", ["int8; control", "int8; =int4", "int8; control=", "int8; a=int4; a=int8", "int8; control=int44"])
def test_a_group_without_a_chain_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="codec_up"):
        chains(text, "codec_up")


def test_a_chain_for_all_is_one_for_each_group() -> None:
    assert chains("int8:block=64") == Chains(chains("int8:block=64").others)
    both = chains("raw; control = delta,int8:block=64,ef")
    assert both.of("control").number.block == 64 and both.of("adapter") == Chain() and both.delta and both.feedback and not both.raw


def test_who_missed_a_broadcast_gets_the_values_as_they_are() -> None:
    link = Downlink(chains("delta,int8"))

    def rnd(index: int, verdict: Verdict = Verdict.COUNTED) -> Round:
        return Round(index=index, attempt=0, cohort=(0,), seed=index, scale=1, num_clients=3, verdict=verdict)

    def sent(seed: int, index: int, *holders: int) -> tuple[Encoding, set[int]]:
        coded = link.encode(some(seed), rnd(index))
        able = link.readers(holders)
        coded.finished()
        link.told(holders)
        return coded, able

    first, able = sent(1, 0, 1, 2)
    assert able == set()  # nobody holds anything yet
    link.settle(rnd(1))
    second, able = sent(2, 1, 1)
    assert second.against == Known(first.tensors).fingerprint and able == {1}
    link.settle(rnd(2))
    assert sent(3, 2, 1, 2)[1] == {1}  # 2 still holds the first
    link.settle(rnd(3, Verdict.REPEAT))
    again, able = sent(3, 2, 1, 2)
    assert again.against == Known(second.tensors).fingerprint and able == set()  # they hold what did not count


@pytest.mark.parametrize("scratch_bytes", [0, 1 << 20])
def test_a_broadcast_that_did_not_count_is_made_again(scratch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes: what it goes on from was parked, in memory or in a file. A run that resumes has it too."""
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", scratch_bytes)
    link, other = (Downlink(chains("delta,int4,ef")) for _ in range(2))

    def made(of: Downlink, index: int) -> tuple[list[bytes], Tensors]:
        coded = of.encode(some(index, 3 * CHUNK // 2), Round(index, 0, (0,), index, 1, 3)).finished()
        return [bytes(coded[place]) for place in chunks(len(coded), CHUNK_BYTES)], coded.tensors

    made(link, 0)
    link.settle(Round(1, 0, (0,), 1, 1, 3, verdict=Verdict.COUNTED))
    first, saved = made(link, 1), link.saved(0)
    link.settle(Round(1, 1, (0,), 1, 1, 3, verdict=Verdict.REPEAT))
    again = made(link, 1)
    other.restore(saved)
    for found, tensors in (again, made(other, 1)):
        assert found == first[0] and all(torch.equal(tensors[name], first[1][name]) for name in tensors)


@pytest.mark.parametrize(("text", "num_clients"), [("int8", 1), ("delta,int4,ef,zstd", 3)])
def test_chunks_flow(monkeypatch: pytest.MonkeyPatch, text: str, num_clients: int) -> None:
    """The first chunk is decoded before the last is encoded, each is encoded once for all, and few are there at a time.

    However many senders there are, one thread encodes: malloc would keep for each what it had worked in.
    """
    events: list[tuple[str, int]] = []
    encoding: set[int] = set()

    def noted(what: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Code, place: slice, *more: Any) -> Any:
            result = method(self, place, *more)
            events.append((what, place.start // CHUNK_BYTES))
            encoding.update({threading.get_ident()} if what == "encoded" else ())
            return result

        return call

    monkeypatch.setattr(Code, "encode", noted("encoded", Code.encode))
    monkeypatch.setattr(Decoding, "values", noted("decoded", Decoding.values))
    num = 24
    tensors, before = {"a": torch.randn(num * CHUNK)}, Known({"a": torch.randn(num * CHUNK)})
    server, *clients = in_process.open_all(1 + num_clients)
    found: dict[int, Tensors] = {}

    def receive(rank: int) -> None:
        with clients[rank], clients[rank].turn:
            post = Post(clients[rank])
            message = post.expect(0, Kind.CODED, 0, "test")
            found[rank] = post.decode(message, chains(text), before, "test")

    coded = Downlink(chains(text), before).encode(tensors, Round(0, 0, (0,), 0, 1, 3))
    threads = [threading.Thread(target=receive, args=(rank,)) for rank in range(num_clients)]
    for thread in threads:
        thread.start()
    with server, server.turn:
        Post(server).send_coded(range(1, 1 + num_clients), coded, 0)
    for thread in threads:
        thread.join()
    sizes = [server.sent[1 + rank].payload_bytes for rank in range(num_clients)]
    assert sizes == [client.received[0].payload_bytes for client in clients]
    assert sizes == [coded.num_bytes + len(coded.manifest.to_json())] * num_clients
    assert all(torch.equal(there["a"], coded.tensors["a"]) for there in found.values()) and len(found) == num_clients
    assert events.index(("decoded", 0)) < events.index(("encoded", num - 1))
    assert [number for what, number in events if what == "encoded"] == list(range(num)) and len(encoding) == 1


def test_every_chain_says_how_long_its_chunks_may_be() -> None:
    """A link accepts a quarter more than a chunk stands for: no chain takes that."""
    for text in ("topk:0.99", "topk:0.9,int8:block=8,gzip", "zstd", "gzip", "shuffle,deflate", "int8:block=8", "fp16"):
        for num in (1, 7, 1000, CHUNK):
            assert Coder(chains(text).others).most_bytes(num) <= 5 * num + 1024
