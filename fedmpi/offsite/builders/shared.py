"""Neighbours that do the same share one layer, which is passed for each of them: Zhang et al., CRaSh, arXiv 2310.15477.

As many layers are held and sent as uniform dropping keeps, but all places are passed: it saves bytes, not operations.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fedmpi.data import Batch
from fedmpi.offsite import Config
from fedmpi.offsite.assembly import assemble
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.builders.influence import influence
from fedmpi.offsite.layers import Layout


def build(model: Any, layout: Layout, public: Sequence[Batch], config: Config) -> Emulator:
    """Groups of neighbours, parted before the layers that change the hidden state most; the middle one stands for its group."""
    inner = layout.inner
    change = influence(model, public) if public else [0.0] * layout.num_layers
    parted = sorted(inner[1:], key=lambda number: (-change[number], number))[: len(layout.emulator) - 1]
    groups = pairwise([inner.start, *sorted(parted), inner.stop])
    layout = layout.keeping((start + stop - 1) // 2 for start, stop in groups for _ in range(start, stop))
    return Emulator(assemble(model, layout.order), layout)
