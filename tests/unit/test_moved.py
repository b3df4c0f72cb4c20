"""Broadcasts of which a part stays: who had the one before gets what is new, everybody else all of it."""

import torch

from fedmpi.federation.moved import Moved
from fedmpi.tensors import Tensors


def adapter(a: float, b: float) -> Tensors:
    return {"A": torch.full((2, 3), a), "B": torch.full((3, 2), b)}


def told(moved: Moved, tensors: Tensors, holders: set[int]) -> dict[int, list[str]]:
    """The names that each holder is sent."""
    return {holder: sorted(part) for part, those in moved.parts(tensors, holders) for holder in those}


def test_only_who_had_the_last_broadcast_is_spared_what_stayed() -> None:
    moved = Moved()
    assert told(moved, adapter(0, 0), {1, 2}) == {1: ["A", "B"], 2: ["A", "B"]}
    assert told(moved, adapter(0, 1), {1, 3}) == {1: ["B"], 3: ["A", "B"]}
    assert told(moved, adapter(2, 1), {1, 2, 3}) == {1: ["A"], 2: ["A", "B"], 3: ["A"]}  # 2 left a round out


def test_a_round_that_is_repeated_is_sent_whole() -> None:
    moved = Moved()
    told(moved, adapter(0, 0), {1, 2})
    assert told(moved, adapter(0, 0), {1, 2}) == {1: ["A", "B"], 2: ["A", "B"]}
    assert told(moved, adapter(0, 1), {1}) == {1: ["B"]}


def test_who_joins_anew_holds_nothing() -> None:
    moved = Moved()
    told(moved, adapter(0, 0), {1, 2})
    moved.forget(2)
    assert told(moved, adapter(3, 0), {1, 2}) == {1: ["A"], 2: ["A", "B"]}
