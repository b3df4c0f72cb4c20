"""The checker is silent about a sound history and speaks up about each way in which one can be wrong."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.campaign.faults import PHASES, possible
from tests.campaign.history import COUNTED, History, faults_of
from tests.campaign.plan import NUM_RANKS, NUM_ROUNDS, plan

Story = dict[str, Any]


def sound() -> Story:
    """A job of two ranks that was killed after round 1 was committed, started again, and finished three rounds."""
    first = [*events(0, 0, 2), *events(1, 0, 2)]
    second = [*events(0, 2, 4), *events(1, 2, 4)]
    metrics = [line(number) for number in range(3)]
    return {"processes": [first, second], "metrics": [{"round": -1, "event": "evaluation"}, *metrics], "final": "F"}


def line(number: int) -> Story:
    return {"round": number, "cohort": [0, 1], "counted": [0, 1], "failures": {}, "attempt": 0, "train_loss": 1.0}


def events(rank: int, first: int, end: int) -> list[Story]:
    """What one rank notes from round `first` to before `end`; the fourth header ends the run."""
    told: list[Story] = []
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
    return faults_of(History(**story), "F")


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
    story["processes"][1].insert(0, {"event": "holds", "rank": 0, "round": 1, "sha": "C"})


def round_again(story: Story) -> None:
    story["processes"][0].append(dict(find(story, 0, "round", 0), rank=1))


def committed_backwards(story: Story) -> None:
    find(story, 0, "committed", 1)["round"] = 5


def not_a_number(story: Story) -> None:
    story["metrics"][1]["train_loss"] = float("nan")


@pytest.mark.parametrize(
    ("doctor", "says"),
    [
        (other_bytes, "no contribution was lost"),
        (round_twice, "each once"),
        (round_missing, "none missing"),
        (counted_twice, "counted of the cohort"),
        (counted_unseen, "were added"),
        (promise_broken, "was told that"),
        (ranks_disagree, "different adapters"),
        (restart_with_another_past, "different adapters"),
        (round_again, "must grow"),
        (committed_backwards, "in the order"),
        (not_a_number, "not a number"),
    ],
)
def test_what_is_wrong_is_seen(doctor: Callable[[Story], None], says: str) -> None:
    story = copy.deepcopy(sound())
    doctor(story)
    assert any(says in fault for fault in check(story)), check(story)


def test_other_bytes_are_right_where_a_contribution_was_lost() -> None:
    story = sound()
    story["final"], story["metrics"][1]["counted"], story["metrics"][1]["failures"] = "G", [0], {"1": "RuntimeError"}
    for event in story["processes"][0]:
        if event["event"] == "round" and event["round"] == 1:
            event["counted"] = [0]
    assert check(story) == []


@pytest.mark.parametrize("launcher", ["in_process", "torchrun", "mpirun"])
def test_a_long_campaign_leaves_no_possible_cell_empty(launcher: str) -> None:
    planned = plan(2500, 1, [launcher])
    made = {(fault.kind, fault.phase) for run in planned for fault in run.faults}
    assert made == {(kind, phase) for kind, phases in PHASES.items() for phase in phases if possible(kind, launcher)}
    assert sum(len(run.faults) for run in planned) >= 2500
    assert all(fault.rank < NUM_RANKS and fault.round < NUM_ROUNDS - 1 for run in planned for fault in run.faults)
    assert plan(2500, 1, [launcher]) == planned != plan(2500, 2, [launcher])
