"""Clients that hang, come late or are lost with their rank: the round goes on without them, and nothing waits for ever."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedmpi.errors import Aborted, LinkError, PeerLost
from fedmpi.federation import turns
from fedmpi.federation.roll import Roll
from fedmpi.training import Hook
from tests.lockstep.ranks import HERE, recipe, run, stepping_back

STEADY = ["--clients=3", "--clients_per_round=3", "--timeout_s=1", "--eval_every=0"]


@dataclass(frozen=True)
class Hangs(Hook):
    """In its round `at`, a rank's turn hangs until it is let go, which happens when another rank comes to round `until`."""

    rank: ClassVar[int] = 0
    at: ClassVar[int] = -1
    until: ClassVar[int] = -1
    rounds: ClassVar[Counter[int]] = Counter()
    let_go: ClassVar[threading.Event] = threading.Event()

    def before_step(self, step: Any) -> None:
        rank = HERE.transport.rank if hasattr(HERE, "transport") else 0
        if step.index == 1:
            self.rounds[rank] += 1
            if (rank, self.rounds[rank] - 1) == (Hangs.rank, Hangs.at):
                self.hang(rank)
            elif self.rounds[rank] - 1 == Hangs.until:
                Hangs.let_go.set()

    def hang(self, rank: int) -> None:
        with stepping_back() if rank else nullcontext():
            assert Hangs.let_go.wait(60)


class Falls(Hook):
    """In its second round, rank 2 is gone: as a process that dies, or with an error that is not a client's."""

    error: ClassVar[BaseException | None] = None
    turns: ClassVar[Counter[int]] = Counter()

    def before_step(self, step: Any) -> None:
        rank = HERE.transport.rank
        self.turns[rank] += 1
        if (rank, self.turns[rank]) == (2, 4):
            if self.error is None:
                HERE.transport._links[0].close()
            raise self.error or SystemExit


class Returns(Hook):
    """Rank 2 loses its link in its second round. It asks for another in the last one, and greets when the last header is out."""

    turns: ClassVar[Counter[int]] = Counter()
    last: ClassVar[threading.Event] = threading.Event()
    announced: ClassVar[threading.Event] = threading.Event()

    def before_fit(self, model: Any) -> None:
        transport = HERE.transport
        self.turns[transport.rank] += 1
        if (transport.rank, self.turns[transport.rank]) == (2, 2):
            connect = transport._reconnect
            transport._reconnect = lambda peer: self.late(connect, peer)
            transport._links[0].close()
        elif (transport.rank, self.turns[transport.rank]) == (1, 4):
            Returns.last.set()
            with stepping_back():
                while not transport._asks(2):
                    time.sleep(0.01)

    def late(self, connect: Callable[[int], Any], peer: int) -> Any:
        assert Returns.last.wait(60)
        wire = connect(peer)
        assert Returns.announced.wait(60)
        return wire


@pytest.fixture(autouse=True)
def anew() -> None:
    Hangs.rank, Hangs.at, Hangs.until, Hangs.let_go = 0, -1, -1, threading.Event()
    Hangs.rounds.clear()
    Falls.turns.clear()
    Falls.error = None
    Returns.turns.clear()
    Returns.last, Returns.announced = threading.Event(), threading.Event()


HANGS, FALLS, RETURNS = (f"--train.hooks=[{__name__}.{name}]" for name in ("Hangs", "Falls", "Returns"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if "event" not in line]


def test_a_turn_that_hangs_is_interrupted_and_its_clients_failure(settings: list[str], tmp_path: Path) -> None:
    """In one process: the sleep ends in an error at its place, and the next client has its turn."""
    Hangs.at = 4
    assert run(recipe(*settings, *STEADY, HANGS), tmp_path) == [0]
    rounds = rounds_of(tmp_path)
    assert [line["counted"] for line in rounds] == [[0, 1, 2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert rounds[1]["failures"]["1"].startswith("Stuck: no step for") and "threading.py" in rounds[1]["failures"]["1"]


def test_what_cannot_be_interrupted_is_left_out_and_its_late_update_dropped(settings: list[str], tmp_path: Path) -> None:
    Hangs.rank, Hangs.at, Hangs.until = 2, 1, 3
    assert run(recipe(*settings, *STEADY, HANGS, "--rounds=7"), tmp_path, 4) == [0] * 4
    rounds = rounds_of(tmp_path)
    assert [line["counted"] for line in rounds[:4]] == [[0, 1, 2], [0, 2], [0, 2], [0, 2]]
    assert rounds[-1]["counted"] == [0, 1, 2] and all(line["cohort"] == [0, 1, 2] for line in rounds)
    assert "Stuck: no step for" in rounds[1]["failures"]["1"] and rounds[2]["failures"]["1"].startswith("Late: ")
    late = [line["late_bytes"] for line in rounds if "late_bytes" in line]
    assert late == [rounds[0]["up_bytes"] // 3]
    assert all(line["control_bytes"] >= 0 for line in rounds)


def test_who_hangs_when_the_run_ends_is_let_go_of(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process would end; here it is a thread."""
    codes: list[int] = []
    monkeypatch.setattr(turns.os, "_exit", lambda code: (codes.append(code), Hangs.let_go.set()))
    Hangs.rank, Hangs.at = 2, 3
    results = run(recipe(*settings, *STEADY, HANGS), tmp_path, 4)
    assert [results[rank] for rank in (0, 1, 3)] == [0] * 3 and isinstance(results[2], Aborted)
    assert codes and set(codes) == {1}
    assert [line["counted"] for line in rounds_of(tmp_path)] == [[0, 1, 2]] * 3 + [[0, 2]]


@pytest.mark.parametrize("error", [None, MemoryError("no memory for the links")])
def test_the_run_goes_on_without_a_rank_that_is_gone(settings: list[str], tmp_path: Path, error: BaseException | None) -> None:
    Falls.error = error and SystemExit(str(error))
    results = run(recipe(*settings, *STEADY, FALLS, "--on_rank_lost=continue"), tmp_path, 4)
    assert [results[rank] for rank in (0, 1, 3)] == [0] * 3
    assert [line["counted"] for line in rounds_of(tmp_path)] == [[0, 1, 2]] + [[0, 2]] * 3
    (lost,) = [line for line in lines_of(tmp_path) if line.get("event") == "rank_lost"]
    assert (lost["round"], lost["rank"], lost["clients"]) == (1, 2, [1])
    assert error is None or str(error) in lost["message"]


def test_who_comes_back_in_the_last_round_holds_up_nobody(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let in behind the last header, it would wait for another one, and the server for its farewell."""
    close = Roll.close

    def closes(roll: Roll) -> None:
        Returns.announced.set()
        with roll.post.apart():
            while not roll.post.transport.holds({2}):
                time.sleep(0.01)
        close(roll)

    monkeypatch.setattr(Roll, "close", closes)
    results = run(recipe(*settings, *STEADY, RETURNS, "--on_rank_lost=continue", "--timeout_s=20"), tmp_path, 4)
    assert [results[rank] for rank in (0, 1, 3)] == [0] * 3 and isinstance(results[2], LinkError)
    assert [line["counted"] for line in rounds_of(tmp_path)] == [[0, 1, 2]] + [[0, 2]] * 3
    assert not [line for line in lines_of(tmp_path) if line.get("event") == "rank_back"]


def test_without_enough_others_the_run_gives_up(settings: list[str], tmp_path: Path) -> None:
    results = run(recipe(*settings, *STEADY, FALLS, "--on_rank_lost=continue", "--min_clients=3"), tmp_path, 4)
    assert [results[rank] for rank in (0, 1, 3)] == [1] * 3
    assert [line["attempt"] for line in lines_of(tmp_path) if line.get("event") == "quorum_lost"] == [0, 1, 2, 3]


def test_a_round_closes_when_the_asked_share_has_come(settings: list[str], tmp_path: Path) -> None:
    """Nobody waits for the client that hangs, whose deadline is far; what it sends in the end is late."""
    Hangs.rank, Hangs.at, Hangs.until = 2, 0, 3
    wanted = recipe(*settings, *STEADY, HANGS, "--rounds=7", "--timeout_s=60", "--close_share=0.6")
    assert run(wanted, tmp_path, 4) == [0] * 4
    rounds = rounds_of(tmp_path)
    assert all(len(line["counted"]) >= 2 and line["cohort"] == [0, 1, 2] for line in rounds) and 1 not in rounds[0]["counted"]
    failed = [why for line in rounds for why in line["failures"].values()]
    assert "Late: round 0 was closed before its update came" in failed and all(why.startswith("Late: ") for why in failed)
    assert sum(line.get("late_bytes", 0) for line in rounds) >= rounds[0]["up_bytes"] // 2


def test_otherwise_a_rank_that_is_gone_ends_the_run_on_all(settings: list[str], tmp_path: Path) -> None:
    results = run(recipe(*settings, *STEADY, FALLS), tmp_path, 4)
    assert isinstance(results[0], PeerLost) and "rank 2" in str(results[0])
    assert all(isinstance(result, LinkError) for result in (results[1], results[3]))
