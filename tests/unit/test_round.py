"""Rounds, sampling and placement: pure functions against values that can be worked out by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmpi.errors import ConfigError, ProtocolError, WorldError
from fedmpi.round import End, Round, Verdict, cohort_size, place, sample

clients = st.sets(st.integers(0, 40))


@given(clients, clients, st.integers(-1, 2**31 - 1), st.integers(0, 2**63 - 1), st.sampled_from(Verdict), st.sampled_from(End))
def test_a_header_reads_back_and_has_one_size(cohort, counted, index, seed, verdict, end) -> None:
    rnd = Round(index, 1, tuple(sorted(cohort)), seed, 40, 41, verdict, tuple(sorted(counted)), index - 1, end)
    assert len(rnd.pack()) == len(Round(0, 0, (), 0, 0, 41).pack())
    assert Round.unpack(rnd.pack(), 41) == rnd


def test_a_header_for_other_clients_is_refused() -> None:
    with pytest.raises(ProtocolError, match="for 100 clients"):
        Round.unpack(Round(0, 0, (), 0, 0, 41).pack(), 100)


@pytest.mark.parametrize(("asked", "size"), [(None, 9), (5, 5), ("5", 5), (0.05, 1), ("0.5", 4), (1, 1), ("1.0", 9), (0.999, 8)])
def test_cohort_size(asked, size: int) -> None:
    assert cohort_size(asked, 9) == size


@pytest.mark.parametrize("asked", [0, 10, -1, "1.5", "many", "0", "1/0"])
def test_impossible_cohort_sizes(asked) -> None:
    with pytest.raises(ConfigError, match="clients_per_round"):
        cohort_size(asked, 9)


def test_sampling_is_a_function_of_seed_round_and_attempt() -> None:
    weights = [10] * 20
    first = sample("uniform", 5, weights, 1, 3, 0)
    assert first == sample("uniform", 5, weights, 1, 3, 0)
    others = {sample("uniform", 5, weights, *key) for key in ((2, 3, 0), (1, 4, 0), (1, 3, 1))}
    assert first not in others and len(others) == 3
    assert len(set(first)) == 5 and list(first) == sorted(first)


def test_uniform_sampling_takes_everybody_equally_often() -> None:
    drawn = Counter(c for index in range(2000) for c in sample("uniform", 3, [1, 1000, 1, 1, 1, 1], 0, index, 0))
    assert all(850 < drawn[client] < 1150 for client in range(6))  # 1000 expected, sigma 22


def test_weighted_sampling_prefers_large_clients() -> None:
    drawn = Counter(c for index in range(500) for c in sample("weighted", 1, [1, 8, 1], 0, index, 0))
    assert 350 < drawn[1] < 450  # 400 expected, sigma 9


def test_fixed_and_all() -> None:
    assert sample("fixed:5,0,3", 3, [1] * 9, 0, 7, 0) == (0, 3, 5)
    assert sample("all", 9, [1] * 9, 0, 7, 0) == tuple(range(9))
    for wrong in ("fixed:9", "fixed:-1", "fixed:", "fixed:a", "fixed:0,0"):
        with pytest.raises(ConfigError, match="sampling"):
            sample(wrong, 1, [1] * 9, 0, 0, 0)


def test_places() -> None:
    assert place(3, 1).leader_of == (0, 0, 0)
    assert place(3, 4).leader_of == (1, 2, 3)
    assert place(5, 3).leader_of == (1, 2, 1, 2, 1)
    surplus = place(2, 5)
    assert surplus.leaders == (1, 2) and surplus.hosted_by(4) == () and surplus.hosted_by(0) == ()
    clustered = place(3, 8, groups=(4, 2, 1))
    assert clustered.seats == ((1, 2, 3, 4), (5, 6), (7,)) and clustered.leader_of == (1, 5, 7)
    assert clustered.hosted_by(3) == (0,) and clustered.seat_of(6) == (5, 6)
    assert clustered.clustered and place(1, 2, groups=(1,)).clustered and not place(1, 2).clustered
    assert place(4, 5, ranks_per_client=2).leader_of == (1, 3, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((0, 4), ConfigError, "at least 1"),
        ((3, 6, 2), WorldError, "start"),
        ((3, 6, 1, (4, 2, 1)), WorldError, "start 8 ranks"),
        ((1, 5, 2), WorldError, "2 groups of ranks for 1 clients"),
        ((3, 6, 2, (5,)), ConfigError, "not both"),
        ((3, 2, 3), WorldError, "start 4 ranks"),
        ((3, 3, 1, (2, 0)), ConfigError, "at least 1 rank"),
        ((3, 1, 2), WorldError, "start 3 ranks"),
        ((3, 1, 1, (2, 1)), WorldError, "start 4 ranks"),
    ],
)
def test_impossible_places(arguments, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        place(*arguments)
