"""The checker is silent about a sound history and speaks up about each way in which one can be wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.campaign.faults import PHASES
from tests.campaign.history import COUNTED, History, costs, faults_of, lost
from tests.campaign.plan import LOSSY, MOST_PER_RUN, NUM_RANKS, NUM_ROUNDS, plan
from tests.campaign.report import empty, totals

Story = dict[str, Any]


def sound() -> Story:
    """A job of two ranks that was killed after round 1 was committed, started again, and finished three rounds."""
    first = [*events(0, 0, 2), *events(1, 0, 2)]
    second = [*events(0, 2, 4), *events(1, 2, 4)]
    metrics = [line(number) for number in range(3)]
    for second_of_the_day, event in enumerate([*first, *second]):
        event["t"] = float(second_of_the_day)
    return {"processes": [first, second], "metrics": [{"round": -1, "event": "evaluation"}, *metrics], "final": "F"}


def line(number: int) -> Story:
    return {"round": number, "cohort": [0, 1], "counted": [0, 1], "failures": {}, "attempt": 0, "train_loss": 1.0}


def events(rank: int, first: int, end: int) -> list[Story]:
    """What one rank notes from round `first` to before `end`; the fourth header ends the run."""
    told: list[Story] = [{"event": "begin", "rank": rank, "round": -1}]
    for number in range(first, end):
        settled = {"verdict": COUNTED, "counted": [0, 1]} if number > first else {"verdict": 0, "counted": []}
        told.append({"event": "round", "rank": rank, "round": number, "attempt": 0, "durable": number - 1, **settled})
        if number == 3:
            break
        told.append({"event": "holds", "rank": rank, "round": number, "sha": f"A{number}"})
        if rank == 0:
            told += [{"event": "added", "rank": 0, "round": number, "client": client} for client in (0, 1)]
            told.append({"event": "committed", "rank": 0, "round": number})
    return told


def check(story: Story) -> list[str]:
    return faults_of(History(story["processes"], story["metrics"]), story["final"], "F")


def test_a_sound_history_is_sound() -> None:
    assert check(sound()) == []


def find(story: Story, process: int, event: str, round_index: int) -> Story:
    return next(e for e in story["processes"][process] if (e["event"], e["round"]) == (event, round_index))


def other_bytes(story: Story) -> None:
    story["final"] = "G"


def round_twice(story: Story) -> None:
    story["metrics"].append(line(2))


def round_missing(story: Story) -> None:
    del story["metrics"][2]


def counted_twice(story: Story) -> None:
    story["metrics"][1]["counted"] = [0, 0, 1]


def counted_unseen(story: Story) -> None:
    story["processes"][1] = [e for e in story["processes"][1] if (e["event"], e.get("client")) != ("added", 1)]


def promise_broken(story: Story) -> None:
    story["metrics"][1]["counted"] = [0]


def ranks_disagree(story: Story) -> None:
    find(story, 0, "holds", 1)["sha"] = "B"


def restart_with_another_past(story: Story) -> None:
    again = {"event": "round", "rank": 0, "round": 1, "attempt": 0, "durable": 0, "verdict": 0, "counted": [], "t": 99.0}
    story["processes"].append([again, {"event": "holds", "rank": 0, "round": 1, "sha": "C", "t": 99.0}])


def round_again(story: Story) -> None:
    story["processes"][0].append(dict(find(story, 0, "round", 0), rank=1))


def committed_backwards(story: Story) -> None:
    find(story, 0, "committed", 0)["round"] = 5


def committed_and_done_again(story: Story) -> None:
    find(story, 1, "round", 2).update(round=1, verdict=0, counted=[])


def not_a_number(story: Story) -> None:
    story["metrics"][1]["train_loss"] = float("nan")


@pytest.mark.parametrize(
    ("doctor", "says"),
    [
        (other_bytes, "the same without faults"),
        (round_twice, "each once"),
        (round_missing, "none missing"),
        (counted_twice, "counted of the cohort"),
        (counted_unseen, "were added"),
        (promise_broken, "was told that"),
        (ranks_disagree, "different adapters"),
        (restart_with_another_past, "different adapters"),
        (round_again, "must grow"),
        (committed_backwards, "in the order"),
        (committed_and_done_again, "was begun again, though round 1 had been committed"),
        (not_a_number, "not a number"),
    ],
)
def test_what_is_wrong_is_seen(doctor: Callable[[Story], None], says: str) -> None:
    story = copy.deepcopy(sound())
    doctor(story)
    assert any(says in fault for fault in check(story)), check(story)


def test_a_checkpoint_that_was_destroyed_may_be_made_again() -> None:
    story = sound()
    committed_and_done_again(story)
    story["processes"][0].append({"event": "fault", "rank": 0, "round": 1, "kind": "truncate", "t": 50.0})
    for event in story["processes"][1]:
        event["t"] = event["t"] + 100
    assert check(story) == []


def test_a_round_that_was_not_durable_may_count_others_when_it_is_done_again() -> None:
    story = sound()
    find(story, 0, "round", 1)["counted"] = [0]
    find(story, 0, "holds", 1)["sha"] = "B"
    story["processes"][0] = [event for event in story["processes"][0] if event["rank"] == 0 or event["round"] < 1]
    assert not any("different adapters" in fault for fault in check(story))


def test_what_was_lost_is_what_the_repeated_run_has_to_lose() -> None:
    story = sound()
    story["metrics"][1].update(counted=[0], failures={"1": "Late: it has not answered"})
    assert lost(History(story["processes"], story["metrics"])) == ({"0": {"1": "Late"}}, False)
    story["metrics"][3]["attempt"] = 1
    assert lost(History(story["processes"], story["metrics"]))[1]


def test_times_are_those_from_a_fault_to_what_it_caused() -> None:
    def at(t: float, event: str, rank: int, round_index: int, **more: str) -> Story:
        return {"event": event, "rank": rank, "round": round_index, "t": t, **more}

    first = [at(0.0, "begin", 0, -1), at(1.0, "round", 0, 0), at(2.0, "round", 0, 1), at(2.5, "fault", 1, 1, kind="kill")]
    first += [at(2.6, "lost", 0, 1), at(2.7, "lost", 2, 1)]
    second = [at(5.0, "begin", 0, -1), at(6.5, "round", 0, 1), at(7.0, "fault", 2, 1, kind="freeze"), at(9.0, "lost", 0, 1)]
    third = [at(20.0, "begin", 0, -1), at(21.0, "round", 0, 2)]
    told = costs(History([first, second, third], []))
    assert told == {"gone_s": [0.1], "silent_s": [2.0], "resume_s": [4.0], "redone": 1}


@pytest.mark.parametrize("shares", [{"in_process": 1}, {"torchrun": 3, "srun": 1}])
def test_a_long_campaign_leaves_no_possible_cell_empty(shares: dict[str, int]) -> None:
    planned = plan(2500, 1, shares)
    made = [
        {"launcher": run.launcher, "made": [(f.kind, f.phase) for f in run.faults], "wrong": [], "codes": [0]} for run in planned
    ]
    assert empty(made, tuple(shares)) == []
    assert totals(made)["faults"] >= 2500 and totals(made)["hangs"] == 0
    assert all(fault.rank < NUM_RANKS and fault.round < NUM_ROUNDS - 1 for run in planned for fault in run.faults)
    assert all(len(run.faults) <= MOST_PER_RUN and run.launcher in shares for run in planned)
    without_loss = [run for run in planned if not any(fault.kind in LOSSY for fault in run.faults)]
    assert len(without_loss) > len(planned) / 2  # these must end in the undisturbed bytes
    assert plan(2500, 1, shares) == planned != plan(2500, 2, shares)
    assert {kind for run in planned for kind in (fault.kind for fault in run.faults)} == set(PHASES)
