"""What goes on beside training: updates that leave, and scores of the round before. The same bytes and numbers as without."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fedmpi.errors import ConfigError, LinkError
from fedmpi.federation.arrivals import Arrivals, Begun
from fedmpi.federation.outbox import Outbox
from fedmpi.federation.post import Post
from fedmpi.messages import Kind
from fedmpi.transports import in_process
from fedmpi.transports.base import Transport
from fedmpi.transports.outgoing import Outgoing
from tests.lockstep.ranks import STOPS, adapter, recipe, run
from tests.lockstep.test_failures import Fails
from tests.lockstep.test_sums import HOOK, plain

SCORED = ["--eval_every=1", "--data.num_rows=60", "--train.optimizer_state=keep"]


@pytest.fixture(autouse=True)
def anew() -> None:
    Fails.turns, Fails.seen = set(), []


def told(folder: Path) -> list[Any]:
    """The figures of a run that no way of running it may change."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    kept = ("round", "event", "counted", "train_loss", "eval_loss", "up_bytes", "down_bytes")
    return [[line.get(key) for key in kept] for line in lines if line.get("event") != "resume"]


@pytest.fixture(scope="module")
def without(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without")
    assert run(recipe(*plain(model_folder), *SCORED), folder, 3) == [0] * 3
    return folder


def test_scores_behind_the_next_round_change_no_number(model_folder: Path, tmp_path: Path, without: Path) -> None:
    """Kept optimisers are files that clients write while the round before is committed: none of them may be lost."""
    assert run(recipe(*plain(model_folder), *SCORED, "--eval.overlap=true"), tmp_path, 3) == [0] * 3
    assert adapter(tmp_path) == adapter(without)
    assert told(tmp_path) == told(without)


def test_a_stop_between_a_round_and_its_scores_loses_neither(model_folder: Path, tmp_path: Path, without: Path) -> None:
    wanted = recipe(*plain(model_folder), *SCORED, "--eval.overlap=true", STOPS)
    assert run(wanted, tmp_path, 3, stop_rank=1, stop_turn=7) == [75] * 3
    assert run(recipe(*plain(model_folder), *SCORED, STOPS), tmp_path, 2) == [0] * 2
    assert adapter(tmp_path) == adapter(without)
    assert [line[:5] for line in told(tmp_path)] == [line[:5] for line in told(without)]


def test_a_round_that_does_not_count_is_scored_before_it(model_folder: Path, tmp_path: Path) -> None:
    wanted = [*plain(model_folder), *SCORED, HOOK, "--min_clients=2"]
    for name, overlap in (("with", "true"), ("without", "false")):
        Fails.turns, Fails.seen = set(range(5, 10)), []
        assert run(recipe(*wanted, f"--eval.overlap={overlap}"), tmp_path / name, 2) == [0] * 2
    assert adapter(tmp_path / "with") == adapter(tmp_path / "without")
    assert sorted(map(str, told(tmp_path / "with"))) == sorted(map(str, told(tmp_path / "without")))


def test_a_slow_link_holds_up_nobody_but_its_own_rank(
    model_folder: Path, tmp_path: Path, without: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broadcast leaves for rank 2 only when an update of rank 1, which has it, is there."""
    monkeypatch.setattr("fedmpi.transports.outgoing.SMALL_BYTES", 1024)  # what is small goes at once
    deliver, end, arrived, in_time = Transport._deliver, Arrivals._end, threading.Event(), []

    def late(self: Transport, peer: int, message: Outgoing) -> None:
        if self.rank == 0 and peer == 2 and message.header.kind is Kind.BROADCAST:
            in_time.append(arrived.wait(20))
            arrived.clear()
        deliver(self, peer, message)

    def ends(self: Arrivals, begun: Begun) -> None:
        arrived.set()
        end(self, begun)

    monkeypatch.setattr(Transport, "_deliver", late)
    monkeypatch.setattr(Arrivals, "_end", ends)
    assert run(recipe(*plain(model_folder), *SCORED), tmp_path, 3) == [0] * 3
    assert in_time and in_time[0]
    assert adapter(tmp_path) == adapter(without)
    assert told(tmp_path) == told(without)


def test_seconds_of_communication_are_told(without: Path) -> None:
    lines = [json.loads(line) for line in (without / "metrics.jsonl").open()]
    for line in lines:
        if "event" not in line:
            assert 0 <= line["exposed_s"] <= line["round_s"] and 0 <= line["hidden_s"] <= line["round_s"]


def test_one_update_is_under_way_at_a_time_and_its_error_is_raised() -> None:
    with in_process.open_all(1)[0] as transport, transport.turn:
        outbox, gate, order = Outbox(Post(transport)), threading.Event(), []
        outbox.put(lambda: order.append(gate.wait(20)))
        threading.Timer(0.1, gate.set).start()
        outbox.put(lambda: order.append("second"))  # waits for the first
        assert order[0] is True
        assert outbox.wait() >= 0 and order == [True, "second"]

        def broken() -> None:
            raise LinkError("the link broke")

        outbox.put(broken)
        with pytest.raises(LinkError, match="the link broke"):
            outbox.wait()


@pytest.mark.parametrize(("given", "why"), [("--early_stop=2", "early_stop 2 cannot wait"), ("--eval_every=0", "eval_every is 0")])
def test_what_does_not_go_with_late_scores_is_refused(given: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        recipe("--eval.overlap=true", given)
