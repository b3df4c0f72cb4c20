"""A turn that is stuck: who tells the server, and how often."""

from types import SimpleNamespace

import pytest

from fedmpi.codecs import Chains
from fedmpi.federation.meeting import Meeting
from fedmpi.federation.owned import Owned
from fedmpi.federation.turns import Turns
from fedmpi.round import SERVER, Round, place


@pytest.mark.parametrize(("rank", "told"), [(1, [SERVER]), (2, [])])
def test_of_a_client_of_two_ranks_the_leader_tells_once(rank: int, told: list[int]) -> None:
    """A member's word would come first where the server expects its farewell, after all rounds, and end the run."""
    alarms: list[int] = []
    transport = SimpleNamespace(check=lambda: None, failures={})
    post = SimpleNamespace(alarm=lambda peer, *rest: alarms.append(peer), transport=transport)
    turns = Turns(Meeting(place(1, 3, 2), rank, post, None), Owned(None, False), Chains(), "cpu")  # type: ignore[arg-type]
    report = turns._alarm(Round(0, 0, (0,), 5, 40, 1), 0)
    report("no step for 61 s")
    report("no step for 61 s")
    assert alarms == told
