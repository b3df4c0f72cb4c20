"""Virtual tokens: what prefix tuning, P-tuning and prompt tuning put before a text, and how a model is asked in spite of them."""

from typing import Any

import torch

from fedmpi.models.library import PeftModel


def virtual_positions(model: Any) -> int:
    """Positions that virtual tokens take from a text."""
    model = _adapted(model)
    learns = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return int(model.active_peft_config.num_virtual_tokens) if learns else 0


def rows_in_front(model: Any) -> int:
    """Rows of logits before a text's own: a prefix has none, it stands in the cache."""
    return virtual_positions(model) if _embedded(_adapted(model)) else 0


def to_continue(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    """Who generates, and from what: texts that are padded on their left.

    peft puts embedded virtual tokens before the padding and drops positions, so that rows of unequal length would read a gap.
    Here they stand between the padding and the text, and the backbone goes on from embeddings; it then gives new tokens alone.
    """
    if not _embedded(model):
        return model, {"input_ids": ids, "attention_mask": mask}
    backbone = model.get_base_model()
    words = backbone.get_input_embeddings()(ids)
    said = model.get_prompt(batch_size=1)[0].to(words.dtype)
    embeds = torch.stack([torch.cat([row[~real], said, row[real]]) for row, real in zip(words, mask.bool(), strict=True)])
    seen = torch.cat([mask, mask.new_ones(len(mask), len(said))], 1)
    return backbone, {"inputs_embeds": embeds, "attention_mask": seen}


def _embedded(model: Any) -> bool:
    """Whether the virtual tokens are embeddings before those of the text."""
    return isinstance(model, PeftModel) and model.peft_config[model.active_adapter].peft_type in ("P_TUNING", "PROMPT_TUNING")


def _adapted(model: Any) -> Any:
    """The model inside the wrapper of an engine."""
    return model.module if hasattr(model, "module") else model
