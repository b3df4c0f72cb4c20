"""Each metric against numbers worked out by hand, and against a second way to compute it."""

import math
from itertools import permutations

import pytest

from fedmpi.evaluation.metrics import best, exact, f1, ndcg, normal, quasi_exact, reciprocal_rank, rouge2


def test_normal_form():
    assert normal("  The  U.S. president, a man -- an IDEA ") == "us president man idea"


@pytest.mark.parametrize(
    ("metric", "gold", "said", "score"),
    [
        (exact, "Paris", " Paris\n", 1),
        (exact, "Paris", "paris", 0),
        (quasi_exact, "the Eiffel Tower", "Eiffel tower.", 1),
        (quasi_exact, "Yes", "yes it is", 0),
        (f1, "14 December 1972", "December 1972", 2 * 2 / (3 + 2)),
        (f1, "the cat sat", "a cat, a cat!", 2 * 1 / (2 + 1)),
        (f1, "yes", "no", 0),
        (f1, "the", "a", 1),
        (rouge2, "the cat sat on the mat", "the cat lay on the mat", 2 * 3 / (5 + 5)),
        (rouge2, "a b a b", "a b", 2 * 1 / (3 + 1)),
        (rouge2, "one", "one", 0),
    ],
)
def test_texts(metric, gold, said, score):
    assert metric(gold, said) == pytest.approx(score)


def test_the_gold_that_fits_best_counts():
    assert best(f1, ["14 December 1972 UTC", "December 1972"], "in December 1972") == pytest.approx(4 / 5)


def test_reciprocal_rank():
    assert reciprocal_rank([0, 0, 1, 1]) == 1 / 3
    assert reciprocal_rank([0] * 10 + [1]) == 0 == reciprocal_rank([])


def test_ndcg_by_hand():
    """Gains 3, 0, 2 where 3, 2, 0 were best."""
    assert ndcg([3, 0, 2]) == pytest.approx((3 + 2 / math.log2(4)) / (3 + 2 / math.log2(3)))
    assert ndcg([0, 0]) == 0


def test_ndcg_is_one_for_the_best_order_only():
    gains = (3.0, 1.0, 0.0, 2.0)
    found = {order: ndcg(order) for order in permutations(gains)}
    assert found[(3.0, 2.0, 1.0, 0.0)] == 1 and sum(value == 1 for value in found.values()) == 1
    assert min(found, key=found.__getitem__) == (0.0, 1.0, 2.0, 3.0)


def test_ndcg_knows_what_lies_beyond_the_cut():
    assert ndcg([0.0] * 10 + [1.0]) == 0 and ndcg([1.0] + [0.0] * 20) == 1
