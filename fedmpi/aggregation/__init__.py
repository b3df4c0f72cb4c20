"""Aggregation: pure functions from updates to one adapter. They know weights and tensors; never clients, ranks or links."""

from typing import TYPE_CHECKING

from ..lazy import door

if TYPE_CHECKING:
    from .mean import Weighted as Weighted
    from .mean import exact_mean as exact_mean
    from .mean import grid_scale as grid_scale

__getattr__ = door(__name__, {"exact_mean": "mean", "grid_scale": "mean", "Weighted": "mean"})
