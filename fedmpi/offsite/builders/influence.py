"""The layers dropped that change the hidden state least on public text: block influence, Men et al., ShortGPT, arXiv 2403.03853."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from fedmpi.data import Batch
from fedmpi.models.logits import supervised_logits
from fedmpi.offsite import Config
from fedmpi.offsite.assembly import assemble, find_layers
from fedmpi.offsite.builders import Emulator
from fedmpi.offsite.layers import Layout
from fedmpi.offsite.teacher import watching


def build(model: Any, layout: Layout, public: Sequence[Batch], config: Config) -> Emulator:
    """As many layers as the uniform split keeps, the most influential ones in their order."""
    if public:
        change = influence(model, public)
        kept = sorted(layout.inner, key=lambda number: (-change[number], number))[: len(layout.emulator)]
        layout = layout.keeping(sorted(kept))
    return Emulator(assemble(model, layout.order), layout)


@torch.no_grad()
def influence(model: Any, public: Sequence[Batch]) -> list[float]:
    """1 - cos(what goes into a layer, what comes out), mean over tokens, for each layer."""
    layers = find_layers(model)[1]
    total, count = [0.0] * len(layers), 0
    for batch in public:
        real = batch.attention_mask.bool().to(model.device)
        count += batch.num_tokens

        def see(number: int, given: torch.Tensor, gave: torch.Tensor, real: torch.Tensor = real) -> None:
            total[number] += float((1 - cosine_similarity(given[real].float(), gave[real].float(), dim=-1)).double().sum())

        with watching(layers, see):
            supervised_logits(model, batch, model.device)
    return [change / count for change in total]
