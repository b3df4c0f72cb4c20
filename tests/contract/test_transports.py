"""The contract of a transport, held by each of them: see `transport_cases` for what is asked."""

from functools import cache

import pytest
from transport_cases import GENTLE, TIMEOUT_S
from transport_launchers import LAUNCHERS, MPIRUN, Spawned, over_mpi
from transport_ranks import Report

NEEDS_MPIRUN = [pytest.mark.mpi, pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install 'fedmpi[mpi]'")]
TRANSPORTS = [pytest.param(name, marks=NEEDS_MPIRUN if name == "mpi" else []) for name in LAUNCHERS]
GENTLE_NAMES = [*(case.__name__ for case in GENTLE), "leaves"]


@cache
def gentle(transport: str) -> dict[int, Report]:
    """The gentle cases of a transport, in one launch."""
    return LAUNCHERS[transport](GENTLE_NAMES, 4, TIMEOUT_S)


def outcome(reports: dict[int, Report], rank: int, name: str) -> str:
    """What a rank said of a case."""
    return dict(reports.get(rank, [])).get(name, f"rank {rank} did not come to {name}: {reports.get(rank)}")


@pytest.mark.parametrize("name", GENTLE_NAMES)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_contract(transport: str, name: str) -> None:
    for rank in range(4):
        said = outcome(gentle(transport), rank, name)
        assert said == ("rank 1 has left in good order" if (name, rank) == ("leaves", 0) else "ok"), said


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_everybody_leaves_in_good_order(transport: str) -> None:
    assert [len(gentle(transport).get(rank, [])) for rank in range(4)] == [len(GENTLE_NAMES)] * 4


@pytest.mark.parametrize("transport", ["in_process", "tcp", "shared"])
def test_a_peer_that_dies_is_named_at_once(transport: str) -> None:
    reports = LAUNCHERS[transport](["dies"], 3, 60.0)
    assert "rank 2 is gone" in outcome(reports, 0, "dies")
    assert outcome(reports, 1, "dies") == "ok"


@pytest.mark.parametrize("transport", ["in_process", "tcp", "shared"])
def test_a_peer_that_dies_inside_a_message_in_chunks_is_named_at_once(transport: str) -> None:
    reports = LAUNCHERS[transport](["breaks_off"], 3, 60.0)
    assert "rank 2 is gone after" in outcome(reports, 0, "breaks_off")
    assert outcome(reports, 1, "breaks_off") == "ok"


@pytest.mark.parametrize("transport", ["in_process", "tcp"])
def test_a_peer_that_dies_before_a_collective_is_named_and_nobody_hangs(transport: str) -> None:
    reports = LAUNCHERS[transport](["dies_together"], 4, 60.0)
    assert "rank 2 is gone" in outcome(reports, 0, "dies_together")
    for rank in (1, 3):
        said = outcome(reports, rank, "dies_together")
        assert "rank 2 is gone" in said or "a collective failed" in said, said


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_peer_that_hangs_is_named_at_the_deadline(transport: str) -> None:
    reports = LAUNCHERS[transport](["silent"], 3, TIMEOUT_S)
    assert [outcome(reports, rank, "silent") for rank in (0, 1, 2)] == ["ok"] * 3


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_abort_reaches_everyone_with_its_text(transport: str) -> None:
    reports = LAUNCHERS[transport](["abort"], 4, 60.0)
    for rank in (0, 2, 3):
        assert outcome(reports, rank, "abort") == "rank 1 ended the job: OSError: the disk is full at all"


@pytest.mark.parametrize("apart", [True, False])
def test_a_restarted_process_comes_back_on_a_new_generation(apart: bool) -> None:
    ranks = Spawned(60.0, 3, apart)
    ranks.start(["welcome_back"], 0)
    ranks.start(["welcome_back"], 1)
    ranks.start(["dies"], 2)
    ranks.started[2][1].join(60)
    ranks.start(["welcome_back"], 2)
    reports = ranks.reports()
    assert [outcome(reports, rank, "welcome_back") for rank in (0, 1, 2)] == ["ok"] * 3


def test_over_tcp_a_rank_that_never_arrives_is_named_everywhere() -> None:
    ranks = Spawned(2.0, 3)
    ranks.start([], 0)
    ranks.start([], 1)
    for rank, report in ranks.reports().items():
        assert "rank 2 of 3 did not arrive within 2 s; arrived: 0, 1" in outcome({rank: report}, rank, "open")


def test_over_tcp_a_missing_server_is_named() -> None:
    ranks = Spawned(2.0, 2)
    ranks.start([], 1)
    assert "found no store of rank 0 within 2 s" in outcome(ranks.reports(), 1, "open")


@pytest.mark.mpi
@pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install 'fedmpi[mpi]'")
def test_over_mpi_a_rank_that_never_arrives_is_named_everywhere() -> None:
    reports = over_mpi(["absent"], 3, 2.0)
    assert set(reports) == {0, 1}
    for rank in (0, 1):
        assert "rank 2 of 3 did not arrive within 2 s; arrived: 0, 1" in outcome(reports, rank, "open")
