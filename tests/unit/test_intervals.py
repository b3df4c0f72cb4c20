"""Intervals against published and worked-out numbers."""

import pytest

from fedmpi.evaluation.intervals import bootstrap, wilson


def test_wilson_of_eight_in_ten():
    """(0.8 + 0.19207) / 1.38415 plus and minus 0.22660: by hand."""
    found = wilson(8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.49016, 0.94331), abs=1e-4)


def test_wilson_stays_in_range_and_knows_nothing_of_nothing():
    assert wilson(0, 20)["low"] == 0 and 0 < wilson(0, 20)["high"] < 0.2
    assert wilson(20, 20)["high"] == 1 and 0.8 < wilson(20, 20)["low"] < 1
    assert (wilson(0, 0)["low"], wilson(0, 0)["high"]) == (0.0, 1.0)


def test_bootstrap_is_the_normal_interval_for_many_rows():
    """Half zeros, half ones: the mean's deviation is 0.5 / sqrt(400) = 0.025."""
    found = bootstrap([0.0, 1.0] * 200)
    assert (found["low"], found["high"]) == pytest.approx((0.451, 0.549), abs=0.008)
    assert found == bootstrap([0.0, 1.0] * 200) != bootstrap([0.0, 1.0] * 200, seed=1)


def test_bootstrap_weighs_rows_by_their_tokens():
    """A loss per token: every row has 2 per token, however many tokens it has."""
    found = bootstrap([2.0, 20.0, 200.0], [1, 10, 100])
    assert (found["low"], found["high"]) == pytest.approx((2, 2))
