"""Who is benched, from the record alone."""

from typing import Any

from fedmpi.errors import QuorumLost
from fedmpi.federation import Conductor
from fedmpi.federation.bench import Bench
from fedmpi.round import sample

FAILS = "RuntimeError: it fails"


def line(index: int, counted: list[int], failures: dict[int, str]) -> dict[str, Any]:
    """As it stands in metrics.jsonl, where keys are strings."""
    return {"round": index, "counted": counted, "failures": {str(client): why for client, why in failures.items()}}


def test_failures_in_a_row_bench_a_client_for_some_rounds() -> None:
    bench = Bench(after=2, rounds=3)
    bench.note(0, [0, 2], {1: FAILS})
    assert bench.sitting(1) == ()
    bench.note(1, [0], {1: FAILS, 2: FAILS})
    assert [bench.sitting(index) for index in (2, 3, 4, 5)] == [(1,), (1,), (1,), ()]
    bench.note(2, [0, 2], {})
    bench.note(3, [0], {2: FAILS})  # not in a row
    assert bench.sitting(4) == (1,)
    bench.note(5, [0, 2], {1: FAILS})  # it begins anew
    assert bench.sitting(6) == ()


def test_who_was_late_or_without_a_rank_has_not_failed() -> None:
    bench = Bench(after=1, rounds=3)
    bench.note(0, [0], {1: "Late: it is still in round 0", 2: "PeerLost: rank 3 is gone"})
    assert bench.sitting(1) == ()
    never = Bench()
    never.note(0, [], {1: FAILS})
    assert never.sitting(1) == ()


def test_the_record_gives_the_same_bench_as_the_rounds_did() -> None:
    """An attempt that was lost has no word of who counted, and stands there twice where the run was stopped after it."""
    lead, replayed = Conductor([10, 20, 30], 9, 0, 3, "all", min_clients=2, bench=Bench(2, 2)), Bench(2, 2)
    lines: list[dict[str, Any]] = []
    for counted, failures in [([1, 2], {0: FAILS}), ([0], {1: FAILS, 2: FAILS}), ([1, 2], {0: FAILS}), ([2, 1], {0: FAILS})]:
        rnd = lead.next_round()
        try:
            lead.judge(rnd, counted, failures)
            lines.append(line(rnd.index, counted, failures))
        except QuorumLost:
            lost = line(rnd.index, [], failures)
            del lost["counted"]
            lines += [{"event": "quorum_lost", **lost}, {"round": rnd.index, "event": "resume"}, {"event": "quorum_lost", **lost}]
    replayed.replay(lines)
    assert replayed == lead.bench and lead.bench.sitting(2) == (0,)


def test_nobody_sits_out_a_round_that_could_not_count_then() -> None:
    lead = Conductor([10, 20, 30], 9, 0, 3, "all", min_clients=2, bench=Bench(1, 2))
    lead.judge(lead.next_round(), [1, 2], {0: FAILS})
    assert (lead.next_round().cohort, lead.benched) == ((1, 2), (0,))
    lead.judge(lead._last, [0, 1, 2], {2: FAILS})  # type: ignore[arg-type]
    assert (lead.next_round().cohort, lead.benched) == ((0, 1, 2), ())


def test_a_cohort_is_drawn_from_who_does_not_sit_out() -> None:
    weights = [1, 2, 3, 4, 5, 6]
    for sampling in ("uniform", "weighted"):
        drawn = {client for index in range(50) for client in sample(sampling, 3, weights, 0, index, 0, out=(2, 4))}
        assert drawn == {0, 1, 3, 5}
    assert sample("uniform", 5, weights, 0, 0, 0, out=(2, 4)) == (0, 1, 3, 5)
    assert sample("fixed:0,2,5", 3, weights, 0, 0, 0, out=(2,)) == (0, 5)
