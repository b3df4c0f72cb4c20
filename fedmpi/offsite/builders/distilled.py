"""The layers that uniform dropping keeps, to be trained in all their weights: Xiao et al., Offsite-Tuning, arXiv 2302.04870."""

from collections.abc import Sequence
from typing import Any

from fedmpi.data import Batch
from fedmpi.offsite import Config
from fedmpi.offsite.builders import Emulator, uniform
from fedmpi.offsite.layers import Layout


def build(model: Any, layout: Layout, public: Sequence[Batch], config: Config) -> Emulator:
    """As uniform; pre-alignment is where the two part."""
    return uniform.build(model, layout, public, config)
