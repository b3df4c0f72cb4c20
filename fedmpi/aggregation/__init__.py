"""Aggregation: pure functions from updates to one adapter. They know weights and tensors; never clients, ranks or links."""

from typing import TYPE_CHECKING

from fedmpi.lazy import door

if TYPE_CHECKING:
    from fedmpi.aggregation.mean import Weighted as Weighted
    from fedmpi.aggregation.mean import exact_mean as exact_mean
    from fedmpi.aggregation.mean import grid_scale as grid_scale
    from fedmpi.aggregation.mean import largest as largest

__getattr__ = door(__name__, dict.fromkeys(("exact_mean", "grid_scale", "largest", "Weighted"), "mean"))
