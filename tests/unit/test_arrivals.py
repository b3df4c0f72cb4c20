"""Updates at the server, in pieces or whole: the same mean, the same books, and no mean where an update breaks off."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedmpi.aggregation import Check, Spool, exact_mean
from fedmpi.aggregation.check import Look
from fedmpi.aggregation.mean import mean_of
from fedmpi.aggregation.pieces import Streamed
from fedmpi.errors import PeerLost, ProtocolError, TrainingError
from fedmpi.federation import Conductor, Federation, Outcome, Update
from fedmpi.federation.arrivals import Arrivals, Tally
from fedmpi.federation.post import Post
from fedmpi.ledger import Ledger
from fedmpi.manifest import Packed, manifest_of
from fedmpi.messages import Header, Kind
from fedmpi.round import Round, place
from fedmpi.tensors import Tensors
from fedmpi.transports import in_process
from fedmpi.transports.base import Transport
from fedmpi.transports.outgoing import Outgoing

CHUNK_BYTES, CLIENTS = 4096, 5  # of which the first two share a rank, and the next two


@dataclass(frozen=True)
class Client:
    id: int
    owned: Tensors | None = None


@dataclass
class Seen:
    """What the server found."""

    result: Tensors = field(default_factory=dict)
    counted: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    error: BaseException | None = None
    scale: int = 0


def made(client: Client) -> Update:
    """An update of two dtypes that takes several chunks."""
    if client.id == 3:
        raise ValueError("no data today")
    generator = torch.Generator().manual_seed(client.id)
    tensors = {name: torch.randn(1500, generator=generator) for name in "ab"}
    return Update(client.id, tensors | {"c": torch.full((700,), client.id, dtype=torch.bfloat16)}, {"examples": client.id + 1.0})


def federation(transport: Transport | None, goes_on: bool = False) -> Federation:
    rank, size = (0, 1) if transport is None else (transport.rank, transport.size)
    fed = Federation(place(CLIENTS, size), rank, None if transport is None else Post(transport), goes_on=goes_on)
    fed.greet("test", {client: client + 1 for client in fed.placement.hosted_by(rank)})
    if rank == 0:
        fed.conductor = Conductor([client + 1 for client in range(CLIENTS)], 1, 0, CLIENTS)
    fed.welcome({}, 1 << 30)
    return fed


def run(
    aggregate: Callable[[object, Round], Tensors],
    size: int,
    work: Callable[[Federation, Round], None] | None = None,
    check: Check | None = None,
    goes_on: bool = False,
) -> Seen:
    """One round; `work` replaces what rank 1 does in it. The server's error is kept."""
    seen = Seen()

    def part(transport: Transport | None) -> None:
        fed = federation(transport, goes_on)
        clients = {client: Client(client) for client in fed.placement.hosted_by(fed.rank)}
        for rnd in fed.rounds():
            if fed.rank == 1 and work is not None:
                work(fed, rnd)
                return
            received = fed.gather(rnd, clients, made, check)
            if fed.conductor is not None:
                seen.result, seen.scale = aggregate(received, rnd), rnd.scale
                seen.counted, seen.up = fed.outcome.counted, dict(fed.ledger.up)
                seen.failed = {client: str(failure) for client, failure in fed.outcome.failures.items()}
        fed.farewell()

    def rank(transport: Transport) -> None:
        try:
            with transport, transport.turn:
                part(transport)
        except BaseException as error:  # noqa: BLE001 - a test looks at it
            seen.error = error if transport.rank == 0 else seen.error

    if size == 1:
        part(None)
        return seen
    transports = in_process.open_all(size, chunk_bytes=CHUNK_BYTES)
    threads = [threading.Thread(target=rank, args=(transport,)) for transport in transports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def in_pieces(received: object, rnd: Round) -> Tensors:
    return exact_mean(received, rnd.scale)  # type: ignore[arg-type]


def whole(received: object, rnd: Round) -> Tensors:
    return exact_mean(iter(received), rnd.scale)  # type: ignore[call-overload, no-any-return]


def put_together(received: object, rnd: Round) -> Tensors:
    """Whole, though they came in chunks: as where clients were faster than the server's decision."""
    assert isinstance(received, Arrivals)
    return exact_mean(received.tally.judged(received._whole()), rnd.scale)


def taped(received: object, rnd: Round) -> Tensors:
    """As a round of the program does it, where nothing is to be kept."""
    assert isinstance(received, Streamed)
    with Spool(None) as spool:
        return mean_of(spool.taping(received.pieces(), keep=False), rnd.scale)


def taped_in_scratch(received: object, rnd: Round) -> Tensors:
    """The same where the pieces are too many to be held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmpi.aggregation.spool.HELD_BYTES", 2 * CHUNK_BYTES)
        return taped(received, rnd)


def kept(received: object, rnd: Round) -> Tensors:
    """The same where the updates are wanted afterwards; what the spool then holds gives the same mean."""
    assert isinstance(received, Streamed)
    with Spool(None) as spool:
        mean = mean_of(spool.taping(received.pieces(), keep=True), rnd.scale)
        for name, tensor in mean.items():
            there = sum(share * spool.get(client, name) for client, share in spool.shares.items())
            assert torch.allclose(there, tensor.double(), rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
        return mean


@pytest.mark.parametrize("size", [4, 6])
@pytest.mark.parametrize("aggregate", [in_pieces, whole, put_together])
def test_the_mean_of_pieces_is_that_of_whole_updates(aggregate: Callable[[object, Round], Tensors], size: int) -> None:
    alone, seen = run(in_pieces, 1), run(aggregate, size)
    assert seen.error is None and sorted(seen.counted) == [0, 1, 2, 4]
    assert all(torch.equal(seen.result[name], alone.result[name]) for name in "abc")
    assert seen.up == alone.up == dict.fromkeys((0, 1, 2, 4), 2 * 1500 * 4 + 700 * 2)


def nearly_all(client: int, like: Tensors) -> Look:
    """Refuses client 1 for its names, client 2 for its last elements."""
    if client == 1:
        raise TrainingError("not wanted at all")

    def look(first: int, values: torch.Tensor) -> float:
        if client == 2 and first + values.numel() > 3000:
            raise TrainingError("not wanted from here on")
        return float(values.abs().max())

    return look


@pytest.mark.parametrize("size", [4, 6])
@pytest.mark.parametrize("aggregate", [taped, taped_in_scratch, kept, whole, put_together])
def test_an_update_that_is_refused_on_its_way_leaves_no_trace(aggregate: Callable[[object, Round], Tensors], size: int) -> None:
    seen = run(aggregate, size, check=nearly_all)
    assert seen.error is None and sorted(seen.counted) == [0, 4]
    assert {client: seen.failed[client] for client in (1, 2)} == {
        1: "TrainingError: not wanted at all",
        2: "TrainingError: not wanted from here on",
    }
    assert seen.up == dict.fromkeys((0, 1, 2, 4), 2 * 1500 * 4 + 700 * 2)  # it came, whatever became of it
    fair = [made(Client(client)) for client in (0, 4)]
    alone = exact_mean([replace(update, weight=update.client + 1) for update in fair], seen.scale)
    assert all(torch.equal(seen.result[name], alone[name]) for name in "abc")


def test_without_a_tape_there_is_no_mean_of_what_was_refused_half_way() -> None:
    seen = run(in_pieces, 6, check=nearly_all)
    assert isinstance(seen.error, TrainingError) and "update 2 broke off" in str(seen.error) and not seen.result


def test_what_is_summed_over_clients_does_not_depend_on_who_came_first() -> None:
    conductor = Conductor([1, 1, 1], 1, 0, 3)
    tally = Tally(conductor.next_round(), conductor, Outcome(), Ledger())
    assert [update.client for update in tally.judged([Update(client, {}, {}) for client in (2, 0, 1)])] == [2, 0, 1]
    assert list(tally.outcome.metrics) == [0, 1, 2] and tally.outcome.counted == [2, 0, 1]


def breaks(fed: Federation, rnd: Round) -> None:
    """Two of the three chunks of an update, and the link is closed."""
    assert fed.post is not None
    tensors = made(Client(0)).tensors
    manifest = manifest_of(tensors)
    fed.post._announce(0, manifest)
    link = fed.post.transport._links[0]
    header = Header(Kind.UPDATE, rnd.index, 0, manifest=manifest.hash)
    message = Outgoing(header, Packed(tensors, manifest), CHUNK_BYTES, b'{"metrics": {"examples": 1.0}, "owned": ""}')
    for _, parts in zip(range(2), message.parts(), strict=False):
        link._wire.write(*parts)
    link.close()


@pytest.mark.parametrize("aggregate", [taped, taped_in_scratch, kept, whole])
def test_an_update_that_breaks_off_leaves_nothing_where_the_run_goes_on(aggregate: Callable[[object, Round], Tensors]) -> None:
    def fails(fed: Federation, rnd: Round) -> None:
        assert fed.post is not None
        fed.post.send_json(0, Kind.FAILURE, {"kind": "PeerLost", "message": "its rank is gone"}, rnd.index, 0)
        for _ in fed.rounds():
            raise AssertionError("the last round is over")
        fed.farewell()

    without, seen = run(aggregate, 6, fails), run(aggregate, 6, breaks, goes_on=True)
    assert seen.error is None and without.error is None
    assert sorted(seen.counted) == sorted(without.counted) == [1, 2, 4] and seen.failed[0].startswith("PeerLost: rank 1 is gone")
    assert all(torch.equal(seen.result[name], without.result[name]) for name in "abc")


@pytest.mark.parametrize("aggregate", [in_pieces, whole, put_together])
def test_where_an_update_breaks_off_there_is_no_mean(aggregate: Callable[[object, Round], Tensors]) -> None:
    seen = run(aggregate, 6, breaks)
    assert isinstance(seen.error, PeerLost) and "8192 of 13400 bytes of its UPDATE" in str(seen.error)
    assert not seen.result


@pytest.mark.parametrize("note", [b"", b"{}", b'{"metrics": 3, "owned": ""}', b"[1]"])
def test_an_update_without_its_note_is_refused(note: bytes) -> None:
    def bare(fed: Federation, rnd: Round) -> None:
        assert fed.post is not None
        tensors = made(Client(0)).tensors
        manifest = manifest_of(tensors)
        fed.post._announce(0, manifest)
        header = Header(Kind.UPDATE, rnd.index, 0, manifest=manifest.hash)
        fed.post._send((0,), header, Packed(tensors, manifest), note)

    seen = run(in_pieces, 6, bare)
    assert isinstance(seen.error, ProtocolError) and "rank 1 sent" in str(seen.error)
