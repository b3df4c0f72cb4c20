"""Updates are refused for what they are, at the first wrong piece, and an update in pieces is judged as the same one whole."""

import math

import pytest
import torch

from fedmpi.aggregation import Config, Wanted, begin, most_move
from fedmpi.aggregation.check import FAR, MEDIAN, parts, whole
from fedmpi.errors import NonFinite, TrainingError
from fedmpi.tensors import Tensors

ORIGIN = {"x": torch.zeros(2)}
WANTED = Wanted(ORIGIN, most=64.0, most_move=2.0, origin=ORIGIN)


def judge(wanted: Wanted, tensors: Tensors) -> None:
    whole(begin(wanted, tensors), tensors)


def test_a_fair_update_passes() -> None:
    judge(WANTED, {"x": torch.ones(2)})


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({}, TrainingError, r"lacks \['x'\] and brings \[\]"),
        ({"y": torch.ones(2)}, TrainingError, r"lacks \['x'\] and brings \['y'\]"),
        ({"x": torch.ones(3)}, TrainingError, r"x is \(3,\)"),
        ({"x": torch.ones(2, dtype=torch.float16)}, TrainingError, "float16"),
        ({"x": torch.tensor([1.0, math.nan])}, NonFinite, "x holds"),
        ({"x": torch.tensor([1.0, -math.inf])}, NonFinite, "x holds"),
        ({"x": torch.tensor([30.0, 40.0])}, TrainingError, "moved by 50, aggregation.most_norm allows 2"),
    ],
)
def test_others_are_refused(tensors: Tensors, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        judge(WANTED, tensors)


def test_an_update_may_not_outgrow_the_grid() -> None:
    judge(Wanted(ORIGIN, most=64.0), {"x": torch.tensor([0.0, -64.0])})
    with pytest.raises(TrainingError, match="grown to 65, more than 64"):
        judge(Wanted(ORIGIN, most=64.0), {"x": torch.tensor([0.0, -65.0])})


def test_an_adaptive_bound_goes_by_the_round_before() -> None:
    adaptive = Config(most_norm="adaptive")
    assert most_move(adaptive, {}) == math.inf
    assert most_move(adaptive, {MEDIAN: torch.tensor(0.5)}) == 0.5 * FAR
    assert most_move(Config(), {}) == math.inf and most_move(Config(most_norm=3.0), {}) == 3.0


def test_a_move_is_measured_over_pieces_that_end_anywhere() -> None:
    origin = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2)}
    there = {name: tensor + 1 for name, tensor in origin.items()}
    flat, length = torch.cat([tensor.reshape(-1) for tensor in there.values()]), math.sqrt(17)  # c is not measured
    bounded = {name: origin[name] for name in "ab"}
    for step in (1, 5, 19):
        begin_ = begin(Wanted(origin, most_move=length * 1.0001, origin=bounded), there)
        for start in range(0, 19, step):
            assert begin_(start, flat[start : start + step]) == float(flat[start : start + step].abs().max())
        too_far = begin(Wanted(origin, most_move=length * 0.9999, origin=bounded), there)
        with pytest.raises(TrainingError, match="allows 4.12"):
            for start in range(0, 19, step):
                too_far(start, flat[start : start + step])


def test_the_parts_of_a_piece_are_found() -> None:
    like = {"a": torch.empty(2), "b": torch.empty(0), "c": torch.empty(3)}
    found = [(name, values.tolist(), before) for name, values, before in parts(like, 1, torch.tensor([1.0, 2.0, 3.0]))]
    assert found == [("a", [1.0], 1), ("c", [2.0, 3.0], 0)]
