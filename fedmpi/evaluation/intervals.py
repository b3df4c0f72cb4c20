"""Confidence intervals of 95 %: Wilson's for a share of right answers, the bootstrap for everything else. Pure functions."""

from collections.abc import Sequence
from typing import Any

import numpy

from fedmpi.seeding import seed_for

Z = 1.959963984540054  # of the normal distribution, two-sided 95 %
RESAMPLES = 1000


def wilson(right: int, num: int) -> dict[str, Any]:
    """The interval of a share; without rows it is everything."""
    if not num:
        return {"method": "wilson 95%", "low": 0.0, "high": 1.0}
    share, z2 = right / num, Z * Z
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = Z * (share * (1 - share) / num + z2 / (4 * num * num)) ** 0.5 / (1 + z2 / num)
    return {"method": "wilson 95%", "low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> dict[str, Any]:
    """The interval of a mean, by drawing rows again. With weights, of sum(values) / sum(weights): a loss per token."""
    tops = numpy.asarray(values, dtype=numpy.float64)
    bottoms = numpy.ones_like(tops) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    rng = numpy.random.default_rng(seed_for(seed, "bootstrap"))
    means = []
    for _ in range(RESAMPLES if len(tops) else 0):
        drawn = rng.integers(len(tops), size=len(tops))
        means.append(tops[drawn].sum() / max(bottoms[drawn].sum(), 1e-12))
    low, high = numpy.percentile(means, [2.5, 97.5]).tolist() if means else (None, None)
    return {"method": f"bootstrap 95%, {RESAMPLES} resamples of rows, seed {seed}", "low": low, "high": high}
