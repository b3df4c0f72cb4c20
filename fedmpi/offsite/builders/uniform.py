"""Layers dropped at equal distances (Sajjad et al., 2023), as offsite tuning and FedBiOT do it: the default, for comparability."""

from collections.abc import Sequence
from typing import Any

from fedmpi.data import Batch
from fedmpi.offsite import Config
from fedmpi.offsite.assembly import assemble
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.layers import Layout


def build(model: Any, layout: Layout, batches: Sequence[Batch], config: Config) -> Emulator:
    """The layers of the uniform split, no weight changed."""
    return Emulator(assemble(model, layout.order), layout)
