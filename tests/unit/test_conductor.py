"""The server's decisions, without any rank."""

import pytest

from fedmpi.errors import QuorumLost
from fedmpi.federation import Conductor
from fedmpi.round import End, Verdict


def conductor(**changes: object) -> Conductor:
    settings: dict[str, object] = {"num_examples": [10, 20, 30, 40], "rounds": 3, "seed": 0, "cohort_size": 2}
    return Conductor(**{**settings, **changes})  # type: ignore[arg-type]


def test_rounds_count_up_and_the_last_header_carries_the_verdict() -> None:
    lead = conductor()
    for index in range(3):
        rnd = lead.next_round()
        assert (rnd.index, rnd.attempt, rnd.end) == (index, 0, End.NO)
        assert rnd.verdict is (Verdict.COUNTED if index else Verdict.NONE)
        lead.judge(rnd, rnd.cohort, {})
    last = lead.next_round()
    assert (last.end, last.cohort, last.verdict) == (End.FINISHED, (), Verdict.COUNTED)


def test_a_resumed_run_draws_the_cohorts_of_an_undisturbed_one() -> None:
    whole, resumed = conductor(rounds=9), conductor(rounds=9, first_round=5)
    for _ in range(5):
        whole.judge(rnd := whole.next_round(), rnd.cohort, {})
    assert whole.next_round().cohort == resumed.next_round().cohort


def test_too_few_updates_are_repeated_four_times_at_most() -> None:
    lead = conductor(min_clients=2)
    cohorts = []
    for attempt in range(4):
        rnd = lead.next_round()
        assert (rnd.index, rnd.attempt) == (0, attempt)
        assert rnd.verdict is (Verdict.REPEAT if attempt else Verdict.NONE) and rnd.counted == ()
        cohorts.append(rnd.cohort)
        with pytest.raises(QuorumLost, match="1 updates of 2, --min_clients is 2.*client 9: no disk"):
            lead.judge(rnd, rnd.cohort[:1], {9: "no disk"})
    assert lead.next_round().end is End.GIVEN_UP
    assert len(set(cohorts)) > 1


def test_weights_come_from_the_start_of_the_run() -> None:
    assert [conductor().weight(c, 999) for c in range(4)] == [10, 20, 30, 40]
    assert [conductor(weights="equal").weight(c, 999) for c in range(4)] == [1, 1, 1, 1]
    processed = conductor(weights="processed")
    assert [processed.weight(3, value) for value in (0, 7, 999)] == [1, 7, 40]
